"""Small batches wait in one place; whoever reads or sets a state finds it as if nothing had waited."""

import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.wrappers import Running

from calib_lightning.metrics import (
    AURC,
    REPORT,
    Accuracy,
    CorrectnessAUROC,
    EvaluationState,
    NegativeLogLikelihood,
    devices,
    waiting,
)
from calib_lightning.metrics.row_metric import RowMetric
from tests.metrics.golden import random_set

STATES = tuple(EvaluationState(REPORT).metric_state)


def batches(sizes=(10, 1, 19), classes=4, seed=0):
    logits, labels = random_set(sum(sizes), classes, seed=seed)
    return list(zip(logits.split(sizes), labels.split(sizes), strict=True))


def waited(metric=None, **options):
    metric = EvaluationState(REPORT) if metric is None else metric
    for batch in batches(**options):
        metric.update(*batch)
    return metric


def joined(state):
    return state if isinstance(state, torch.Tensor) else torch.cat(state)


@pytest.fixture
def at_once(monkeypatch):
    """The same rows added batch by batch: nothing is small."""
    with monkeypatch.context() as patch:
        patch.setattr(waiting, "AT_ONCE", 0)
        return waited()


@pytest.fixture
def deferred(monkeypatch):
    monkeypatch.setattr(devices, "checks_at_once", lambda device: False)


@pytest.fixture
def adds(monkeypatch):
    """How many rows each pass over the parts had."""
    seen, original = [], RowMetric._add
    monkeypatch.setattr(RowMetric, "_add", lambda self, batch: seen.append(len(batch.labels)) or original(self, batch))
    return seen


@pytest.mark.parametrize("name", STATES)
def test_a_state_read_first_is_up_to_date(name, at_once):
    metric = waited()
    assert name not in vars(metric), "out of date, and there to be read"
    assert torch.allclose(joined(getattr(metric, name)), joined(getattr(at_once, name)), rtol=1e-13, atol=0)
    assert set(STATES) <= set(vars(metric))


def loaded(metric):
    other = EvaluationState(REPORT)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    return other


READERS = {
    "state_dict": lambda m: (m.persistent(True), loaded(m))[1],
    "metric_state": lambda m: (other := EvaluationState(REPORT), other.merge_state(m.metric_state))[0],
    "merge": lambda m: (other := EvaluationState(REPORT), other.merge_state(m))[0],
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "clone": lambda m: m.clone(),
    "move": lambda m: m.to("cpu"),
    "hash": lambda m: (hash(m), m)[1],
    "sync": lambda m: (m.sync(lambda x, group: [x], distributed_available=lambda: True), m)[1],
    "unsync": lambda m: (READERS["sync"](m), m.unsync(), m)[2],
    "collection": lambda m: MetricCollection({"a": m})["a"],
    "set_dtype": lambda m: m.set_dtype(torch.float16),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_finds_every_row(reader, at_once):
    metric = READERS[reader](waited())
    for name in STATES:
        assert torch.allclose(joined(getattr(metric, name)), joined(getattr(at_once, name)), rtol=1e-13, atol=0), name


def test_other_classes_of_torchmetrics_read_every_row():
    running = Running(NegativeLogLikelihood(), window=2)
    group = MetricCollection([NegativeLogLikelihood(), Accuracy()])
    whole = NegativeLogLikelihood()
    for batch in batches((10, 10, 10)):
        running.update(*batch)
        group.update(*batch)
        whole.update(*batch)
    last = NegativeLogLikelihood()
    for batch in batches((10, 10, 10))[1:]:
        last.update(*batch)
    assert float(running.compute()) == pytest.approx(float(last.compute()), rel=1e-12)
    assert float(group.compute()["NegativeLogLikelihood"]) == pytest.approx(float(whole.compute()), rel=1e-12)


def test_what_is_set_replaces_the_rows_that_wait():
    source = waited(seed=1, sizes=(7,))
    source.persistent(True)
    metric = waited()
    metric.load_state_dict(source.state_dict())
    assert int(metric.count) == 7
    metric.update(*batches((3,))[0])
    metric.count = torch.tensor(100)
    assert int(metric.count) == 100
    metric.update(*batches((3,))[0])
    assert int(metric.count) == 103


def test_reset_drops_the_rows_that_wait():
    metric = waited()
    metric.reset()
    assert int(metric.count) == 0
    assert int(waited(metric).count) == 30


def test_small_batches_are_added_in_few_passes(adds, monkeypatch):
    monkeypatch.setattr(waiting, "AT_ONCE", 4 * 25)
    assert int(waited(sizes=(10, 10, 10, 3, 20, 1)).count) == 54
    assert adds == [20, 13, 20, 1]  # 25 rows have room, and the batch of 20 is no small one


def test_small_batches_of_a_device_wait_too(adds, deferred, monkeypatch):
    monkeypatch.setattr(waiting, "AT_ONCE", 4 * 25)
    assert int(waited(sizes=(10,) * 5).count) == 50
    assert adds == [20, 20, 10]


@pytest.mark.parametrize(("bad", "first"), [((4,), 4), ((2, 4), 2), ((0, 5), 0)])
def test_a_fault_among_rows_that_waited_names_its_batch(bad, first, deferred, monkeypatch):
    monkeypatch.setattr(waiting, "AT_ONCE", 4 * 25)
    metric = EvaluationState()
    for number, (logits, labels) in enumerate(batches((10,) * 6)):
        if number in bad:
            logits = logits.clone()
            logits[3, 2] = torch.nan
        metric.update(logits, labels)
    with pytest.raises(
        ValueError, match=rf"{len(bad)} with invalid logits among 60 rows, the first in batch {first + 1} "
    ):
        metric.compute()


def test_batches_of_different_kinds_are_not_joined():
    (logits, labels), (more, of_more) = batches((10, 10))
    metric = EvaluationState(["correctness_auroc"])
    metric.update(logits.float(), labels)
    metric.update(more, of_more.to(torch.uint8))
    metric.update(more, of_more, torch.rand(10))
    assert [rows.dtype for rows in metric.rank_scores] == [torch.float32, torch.float64, torch.float32]
    with torch.inference_mode():
        metric.update(logits, labels)
    metric.update(more, of_more)
    assert int(metric.count) == 50


def test_a_failed_forward_leaves_everything_as_it_was():
    metric = waited(EvaluationState(compute_on_cpu=True))
    before = {name: vars(metric)[name] for name in ("_update_count", "compute_on_cpu", "_enable_grad", "_to_sync")}
    with pytest.raises(ValueError, match="batch 4: 1 of 1 rows have invalid logits"):
        metric(torch.tensor([[torch.nan, 0.0, 0.0, 0.0]]), torch.tensor([1]))
    assert {name: vars(metric)[name] for name in before} == before
    assert int(metric.count) == 30


def test_a_failed_forward_leaves_the_rows_of_others_in_a_collection():
    logits, labels = random_set(40, 3)
    collection = MetricCollection([CorrectnessAUROC(), AURC()], compute_groups=[["CorrectnessAUROC", "AURC"]])
    collection.update(logits, labels)
    expected = {name: float(value) for name, value in collection.compute().items()}
    with pytest.raises(ValueError, match="invalid logits"):
        collection["CorrectnessAUROC"](torch.full((1, 3), torch.nan), torch.tensor([1]))
    assert {name: float(value) for name, value in collection.compute().items()} == expected
    assert len(collection["AURC"].rows_of("rank_scores")) == 40
