import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
from lightning import LightningModule
from torchmetrics import Metric, MetricCollection

from calib_lightning import metrics
from calib_lightning.metrics import (
    CORE,
    FULL,
    REPORT,
    EvaluationState,
    OODDetection,
    SoftLabelScores,
    SquaredKernelCalibrationError,
    devices,
)
from calib_lightning.metrics import parts as parts_module
from calib_lightning.metrics import state as state_module
from calib_lightning.metrics import table as table_module
from tests.metrics.golden import GOLDEN, GOLDEN_COUNTS, KEYS, golden_set, random_set, reference
from tests.metrics.table import ALL, METRICS, OOD, SINGLE, TAKES_NO_CONFIDENCE, TERMS, name_of, value_of

EVERY = [EvaluationState, *SINGLE]
FULL_STATE = partial(EvaluationState, FULL)


def feed(metric, logits, labels, sizes=(50,), confidence=None):
    start = turn = 0
    while start < len(labels):
        cut = slice(start, start + sizes[turn % len(sizes)])
        metric.update(logits[cut], labels[cut], None if confidence is None else confidence[cut])
        start, turn = cut.stop, turn + 1
    return metric


def numbers(metric):
    value = metric.compute()
    return {k: v.item() for k, v in value.items()} if isinstance(value, dict) else value.item()


@pytest.fixture
def deferred(monkeypatch):
    """Treat the CPU like a device whose values cannot be read without a wait."""
    monkeypatch.setattr(devices, "checks_at_once", lambda device: False)


def test_golden_values_in_batches():
    state = feed(EvaluationState(), *golden_set(), sizes=(7, 64, 1))
    values = state.compute()
    assert tuple(values) == KEYS
    assert all(v.dtype == torch.float64 and v.shape == () for v in values.values())
    assert numbers(state) == pytest.approx(GOLDEN, abs=1e-12)
    assert state.bins[:, 0].tolist() == GOLDEN_COUNTS
    assert state.settings == {
        "rows": 500,
        "classes": 5,
        "input": "logits",
        "n_bins": 15,
        "bins": "(lo, hi]",
        "ranking": "exact",
    }
    assert "n_bins=15, input='logits'" in repr(state)


def test_the_table_has_every_metric():
    assert sorted(ALL) == sorted(FULL)
    assert "classwise_ece" in REPORT
    assert "ovo_auroc" not in REPORT
    exported = [getattr(metrics, name) for name in metrics.__all__]
    classes = {each for each in exported if isinstance(each, type) and issubclass(each, Metric)}
    others = {EvaluationState, SoftLabelScores, SquaredKernelCalibrationError, OODDetection}
    assert {type(maker()) for maker in [*SINGLE, *OOD.values()]} == classes - others


@pytest.mark.parametrize("key", ALL)
def test_golden_value_of_every_class_and_function(key):
    logits, labels = golden_set()
    maker, _, golden, precision = ALL[key]
    value = numbers(feed(maker(), logits, labels, (64, 3)))
    value = value if key in METRICS else value[key]
    assert value_of(key, logits, labels).item() == pytest.approx(value, abs=1e-14)
    if golden is not None:
        assert value == pytest.approx(golden, abs=precision)


def all_numbers(logits, labels, sizes, confidence=None, **options):
    """By key: of the classes one by one, and of one state for all."""
    single = {key: numbers(feed(METRICS[key][0](**options), logits, labels, sizes, confidence)) for key in METRICS}
    for maker in dict.fromkeys(row[0] for row in TERMS.values()):
        single |= numbers(feed(maker(**options), logits, labels, sizes, confidence))
    return single, numbers(feed(FULL_STATE(**options), logits, labels, sizes, confidence))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["logits", "probs", "confidence"])
def test_class_equals_function_and_state(dtype, kind):
    logits, labels = random_set(400, 6)
    options, confidence = {}, None
    if kind == "probs":
        dtype = dtype if dtype in (torch.float64, torch.float32) else torch.float32
        logits, options = logits.softmax(1), {"input": "probs"}
    elif kind == "confidence":
        confidence = torch.rand(400, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits = logits.to(dtype)
    single, whole = all_numbers(logits, labels, (33, 150, 3), confidence, **options)
    expected = {key: value_of(key, logits, labels, confidence, **options).item() for key in ALL}
    assert single == pytest.approx(expected, abs=1e-12)
    assert whole == pytest.approx(expected, abs=1e-12)
    assert not any(math.isnan(value) for value in expected.values())


@pytest.mark.parametrize("maker", SINGLE)
def test_values_are_float64_scalars(maker):
    value = feed(maker(), *random_set(100, 6)).compute()
    for each in value.values() if isinstance(value, dict) else [value]:
        assert each.dtype == torch.float64
        assert each.shape == ()


@pytest.mark.parametrize("key", sorted(TAKES_NO_CONFIDENCE))
def test_a_given_confidence_does_not_reach_what_has_none(key):
    logits, labels = random_set(200, 6)
    given = numbers(feed(FULL_STATE(), logits, labels, confidence=torch.rand(200)))
    assert given[key] == numbers(feed(FULL_STATE(), logits, labels))[key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1,), (7,), (1000,), (1, 0, 130)])
def test_cutting_into_batches_does_not_matter(dtype, sizes):
    logits, labels = random_set(1500, 11, scale=5.0)
    logits = logits.to(dtype)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    whole = numbers(feed(FULL_STATE(), logits, labels, (1500,)))
    parts = numbers(feed(FULL_STATE(), logits[order], labels[order], sizes))
    assert parts == pytest.approx(whole, rel=1e-12, abs=1e-15, nan_ok=True)
    for key in ("accuracy", "top5_accuracy", "correctness_auroc", "fpr95", "augrc", "ovo_auroc"):
        assert parts[key] == whole[key]


def test_bins_and_kind_are_settings():
    logits, labels = golden_set()
    assert numbers(feed(metrics.ExpectedCalibrationError(n_bins=4), logits, labels)) == pytest.approx(
        reference(logits, labels, 4)["ece"], abs=1e-12
    )
    assert numbers(feed(EvaluationState(n_bins=4, input="probs"), logits.softmax(1), labels))["ece"] == pytest.approx(
        reference(logits, labels, 4)["ece"], abs=1e-12
    )
    for metric in EVERY:
        with pytest.raises(ValueError, match="input is 'probabilities'"):
            metric(input="probabilities")
    with pytest.raises(ValueError, match="n_bins is 0"):
        EvaluationState(n_bins=0)


# --- what the state holds


def test_a_metric_holds_only_what_it_needs():
    shared = {"num_classes", "count", "faults", "first_fault"}
    rows = {"rank_scores", "rank_correct"}
    held = {key: set(METRICS[key][0]().metric_state) - shared for key in METRICS}
    of_part = {"ranks": rows, "scores": {"scores", "score_labels"}}
    of_part |= {part: {part} for part in ("bins", "fine_bins", "moments", "classwise")}
    for key, states in held.items():
        parts = table_module.METRICS[key].parts
        assert states == set().union(*(of_part.get(part, {f"{part}_sum"}) for part in parts)), key
    assert held["accuracy"] == {"correct_sum"}
    assert held["signed_gap"] == {"correct_sum", "confidence_sum"}
    assert held["ece"] == {"bins"}
    assert held["aurc"] == held["aece_split"] == rows
    assert set(EvaluationState(REPORT).metric_state) - shared == {"moments"} | set().union(
        *(held[key] for key in METRICS if key in REPORT)
    )


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 5), (torch.bfloat16, 5), (torch.float64, 9)])
def test_bytes_of_the_state(dtype, width):
    logits, labels = random_set(300, 5)
    state = feed(EvaluationState(), logits.to(dtype), labels)
    rows = sum(t.nbytes for name in ("rank_scores", "rank_correct") for t in getattr(state, name))
    assert rows == width * 300
    without = feed(EvaluationState(["accuracy", "nll", "brier", "ece", "signed_gap"]), logits.to(dtype), labels)
    assert sum(t.nbytes for t in without.metric_state.values()) <= 1024
    assert tuple(without.compute()) == KEYS[:-1]


def test_rows_of_many_batches_are_one_tensor_and_merged_ones_are_not_written_to():
    logits, labels = random_set(5000, 5)
    first = feed(EvaluationState(), logits[:3000], labels[:3000], (7,))
    assert [len(rows) for rows in first.rank_scores] == [3000]
    assert first.rank_scores[0].untyped_storage().nbytes() <= 2 * 3000 * 8
    other = EvaluationState()
    other.merge_state(first)
    feed(other, logits[3000:4000], labels[3000:4000])
    feed(first, logits[4000:], labels[4000:])  # goes on in the buffer that the other one holds a part of
    expected = numbers(feed(EvaluationState(), logits[:4000], labels[:4000]))
    assert numbers(other) == pytest.approx(expected, rel=1e-12)
    assert numbers(other)["correctness_auroc"] == expected["correctness_auroc"]
    rest = torch.cat([logits[:3000], logits[4000:]]), torch.cat([labels[:3000], labels[4000:]])
    assert numbers(first) == pytest.approx(numbers(feed(EvaluationState(), *rest)), rel=1e-12)


def test_batches_may_grow():
    logits, labels = random_set(9000, 5)
    start, state = 0, EvaluationState(FULL, details=True)
    for size in (100, 1000, 1, 3000, 4899):
        state.update(logits[start : start + size], labels[start : start + size])
        start += size
    assert start == len(state.rows_of("rank_scores")) == 9000
    expected = numbers(feed(FULL_STATE(), logits, labels, (9000,)))
    assert numbers(state) == pytest.approx(expected, rel=1e-12, abs=1e-15, nan_ok=True)


def test_whoever_reads_a_state_finds_it_up_to_date():
    logits, labels = random_set(30, 4)
    read = {
        "attribute": lambda m: int(m.count),
        "settings": lambda m: m.settings["rows"],
        "metric_state": lambda m: int(m.metric_state["count"]),
        "copy": lambda m: int(copy.deepcopy(m).count),
        "pickle": lambda m: int(pickle.loads(pickle.dumps(m)).count),
        "merge": lambda m: int((other := EvaluationState(), other.merge_state(m))[0].count),
        "rows": lambda m: len(m.rows_of("rank_scores")),
        "move": lambda m: int(m.to("cpu").count),
    }
    for name, reader in read.items():
        state = EvaluationState()
        for batch in (slice(0, 10), slice(10, 11), slice(11, 30)):
            state.update(logits[batch], labels[batch])
        assert reader(state) == 30, name


def test_a_batch_may_be_overwritten_after_its_update():
    logits, labels = random_set(60, 4)
    state, batch, of_batch = (
        EvaluationState(),
        torch.empty(20, 4, dtype=torch.float64),
        torch.empty(20, dtype=torch.int64),
    )
    for start in range(0, 60, 20):
        batch.copy_(logits[start : start + 20])
        of_batch.copy_(labels[start : start + 20])
        state.update(batch, of_batch)
    batch.fill_(torch.nan)
    assert numbers(state) == pytest.approx(reference(logits, labels), abs=1e-12)


def test_a_copy_holds_no_more_than_the_rows():
    state = feed(EvaluationState(["ovo_auroc"]), *random_set(3, 1000))
    assert len(pickle.dumps(state)) < 3 * 1000 * 8 + 20_000


@pytest.mark.parametrize(
    "other", [{"metrics": ["nll"]}, {"metrics": ["accuracy"], "details": True}, {"metrics": ["accuracy"], "n_bins": 4}]
)
def test_states_that_do_not_go_together_are_not_merged(other):
    logits, labels = random_set(40, 5)
    state = feed(EvaluationState(["accuracy"]), logits, labels)
    before = numbers(state)
    with pytest.raises(ValueError, match=r"EvaluationState: .* of the other state is"):
        state.merge_state(feed(EvaluationState(**other), logits, labels))
    assert numbers(state) == before
    assert int(state.count) == 40


def test_scores_too_close_for_a_histogram_are_told():
    logits, labels = random_set(2000, 5)
    close = feed(EvaluationState(["correctness_auroc"], rank_bins=1024), 0.001 * logits, labels)
    with pytest.warns(UserWarning, match="so close together that the histogram of 1024 bins"):
        close.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(EvaluationState(["correctness_auroc"], rank_bins=16384), logits, labels).compute()


def test_given_confidence_sets_the_width_of_the_score():
    logits, labels = random_set(20, 3)
    state = feed(EvaluationState(), logits.float(), labels, confidence=torch.rand(20, dtype=torch.float64))
    assert state.rows_of("rank_scores").dtype == torch.float64


def test_a_part_and_a_metric_can_be_added(monkeypatch):
    largest = parts_module._mean_part("largest", lambda rows: rows.scores.amax(1))
    row = table_module.mean_of("largest score", "largest", "higher", high=math.inf)
    monkeypatch.setitem(parts_module.PARTS, "largest", largest)
    monkeypatch.setitem(table_module.METRICS, "mean_largest", row)

    class Single(state_module.SingleMetric):
        key = "mean_largest"

    logits, labels = random_set(100, 4)
    expected = logits.amax(1).mean().item()
    assert numbers(feed(EvaluationState([*CORE, "mean_largest"]), logits, labels))["mean_largest"] == pytest.approx(
        expected
    )
    assert numbers(feed(Single(), logits, labels)) == pytest.approx(expected)


def test_directions():
    assert {key: table_module.METRICS[key].better for key in CORE} == {
        "accuracy": "higher",
        "nll": "lower",
        "brier": "lower",
        "ece": "lower",
        "signed_gap": "zero",
        "correctness_auroc": "higher",
    }
    for key, (maker, *_) in METRICS.items():
        metric = maker()
        expected = {"higher": True, "lower": False, "zero": None, "none": None}[table_module.METRICS[key].better]
        assert metric.higher_is_better is expected
        assert metric.is_differentiable is False
        assert metric.full_state_update is False


# --- behaviour as a torchmetrics metric


def test_reset_forgets_everything():
    logits, labels = random_set(100, 5)
    other = random_set(60, 3, seed=1)
    state = feed(EvaluationState(), logits, labels)
    state.compute()
    state.reset()
    assert int(state.count) == 0
    assert numbers(feed(state, *other)) == numbers(feed(EvaluationState(), *other))


def test_forward_returns_the_batch_and_keeps_the_set():
    logits, labels = random_set(90, 5)
    state = EvaluationState()
    for part in logits.split(30):
        start = int(state.count)
        values = state(part, labels[start : start + 30])
        expected = reference(part, labels[start : start + 30])
        assert {k: v.item() for k, v in values.items()} == pytest.approx(expected, abs=1e-12)
    assert numbers(state) == pytest.approx(reference(logits, labels), abs=1e-12)
    with pytest.raises(ValueError, match=r"EvaluationState, batch 4: logits have 4 classes but earlier batches had 5"):
        state(logits[:, :4], labels)


def test_merge_state():
    logits, labels = random_set(100, 5)
    left = feed(EvaluationState(), logits[:30], labels[:30])
    left.merge_state(feed(EvaluationState(), logits[30:], labels[30:]))
    assert numbers(left) == pytest.approx(reference(logits, labels), abs=1e-12)


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_carry_the_state(metric, clone):
    logits, labels = random_set(100, 5)
    first = feed(metric(), logits[:40], labels[:40])
    second = clone(first)
    feed(second, logits[40:], labels[40:])
    assert numbers(second) == pytest.approx(numbers(feed(metric(), logits, labels)), abs=1e-14)
    assert int(first.count) == 40


def test_metric_collection():
    logits, labels = random_set(120, 5)
    single = MetricCollection([METRICS[key][0]() for key in CORE])
    both = MetricCollection({"all": EvaluationState(), "ece10": metrics.ExpectedCalibrationError(n_bins=10)})
    for collection in (single, both):
        for part in range(0, 120, 25):
            collection.update(logits[part : part + 25], labels[part : part + 25])
    expected = reference(logits, labels)
    values = {key: single.compute()[METRICS[key][0].__name__].item() for key in CORE}
    assert values == pytest.approx(expected, abs=1e-12)
    values = {key: value.item() for key, value in both.compute().items()}
    assert values == pytest.approx(expected | {"ece10": reference(logits, labels, 10)["ece"]}, abs=1e-12)
    single.reset()
    single.update(logits[:60], labels[:60])
    assert single.compute()["Accuracy"].item() == pytest.approx(reference(logits[:60], labels[:60])["accuracy"])


def test_a_collection_of_every_class_shares_states_rightly():
    logits, labels = random_set(120, 6)
    names = {key: key.replace(".", "_") for key in METRICS}  # a module's name cannot hold a dot
    together = MetricCollection({name: METRICS[key][0]() for key, name in names.items()})
    for start in range(0, 120, 25):
        together.update(logits[start : start + 25], labels[start : start + 25])
    values = {name: value.item() for name, value in together.compute().items()}
    expected = {names[key]: numbers(feed(METRICS[key][0](), logits, labels, (25,))) for key in METRICS}
    assert values == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert len(together.compute_groups) < len(METRICS)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.float(),
        lambda m: m.type(torch.float16),
    ],
)
def test_the_dtype_of_the_module_does_not_reach_the_state(convert):
    class Holder(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.state = EvaluationState()

    logits, labels = random_set(80, 5)
    module = Holder()
    feed(module.state, logits[:40], labels[:40])
    dtypes = [t.dtype for t in module.state.metric_state.values() if not isinstance(t, list)]
    convert(module)
    assert [t.dtype for t in module.state.metric_state.values() if not isinstance(t, list)] == dtypes
    feed(module.state, logits[40:], labels[40:])
    assert numbers(module.state) == pytest.approx(reference(logits, labels), abs=1e-12)
    module.state.set_dtype(torch.float16)
    assert module.state.nll_sum.dtype == torch.float64


def test_a_device_without_float64_leaves_the_state_on_the_cpu(monkeypatch):
    # "meta" stands in for such a device: a state that went there would have lost its numbers.
    monkeypatch.setattr(devices, "has_float64", lambda device: device.type != "meta")
    logits, labels = random_set(80, 5)
    state = feed(EvaluationState(), logits[:40], labels[:40]).to("meta")
    assert all(t.device.type == "cpu" for t in state.metric_state.values() if not isinstance(t, list))
    assert numbers(feed(state, logits[40:], labels[40:])) == pytest.approx(reference(logits, labels), abs=1e-12)
    # Tensors of that device are moved before anything is computed.
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    moved = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.shape) or original(self))
    state.update(logits[:4], labels[:4], torch.rand(4))
    assert int(state.count) == 84
    assert moved == [(4, 5), (4,), (4,)]


def test_inference_mode_and_gradients():
    logits, labels = random_set(80, 5)
    state = EvaluationState()
    with torch.inference_mode():
        feed(state, logits[:20], labels[:20])
        state.reset()
        feed(state, logits[:40], labels[:40])
    trained = logits[40:].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state(trained, labels[40:])
    assert not any(t.requires_grad for t in (state.nll_sum, state.bins, *state.rank_scores))
    assert numbers(state) == pytest.approx(reference(logits, labels), abs=1e-12)


def test_the_inputs_are_not_changed():
    logits, labels = random_set(30, 4)
    confidence = torch.rand(30, dtype=torch.float64)
    before = [t.clone() for t in (logits, labels, confidence)]
    EvaluationState().update(logits, labels, confidence)
    EvaluationState(input="probs").update(probs := logits.softmax(1), labels)
    assert all(a.equal(b) for a, b in zip(before, (logits, labels, confidence), strict=True))
    assert probs.equal(logits.softmax(1))


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_memory_layout_does_not_matter(layout):
    logits, labels = random_set(60, 5)
    strided = logits.t().contiguous().t() if layout == "transposed" else logits.repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    assert numbers(feed(EvaluationState(), strided, labels)) == pytest.approx(reference(logits, labels), abs=1e-12)


# --- nothing, or nothing to rank


@pytest.mark.parametrize("metric", EVERY)
def test_only_empty_batches(metric):
    empty = metric()
    empty.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.warns(UserWarning, match=f"{name_of(metric)}: no rows") as caught:
        values = empty.compute()
    assert len(caught) == 1
    assert all(math.isnan(v) for v in (values.values() if isinstance(values, dict) else [values]))


@pytest.mark.parametrize("metric", EVERY)
def test_never_updated(metric):
    with pytest.warns(UserWarning, match="before the ``update``") as caught:
        values = metric().compute()
    assert len(caught) == 1
    assert all(math.isnan(v) for v in (values.values() if isinstance(values, dict) else [values]))


def test_empty_batches_in_between():
    logits, labels = random_set(50, 4)
    state = EvaluationState()
    state.update(logits[:0], labels[:0])
    feed(state, logits, labels)
    state.update(logits[:0], labels[:0])
    assert numbers(state) == pytest.approx(reference(logits, labels), abs=1e-12)


@pytest.mark.parametrize("classes", [1, 4])
def test_all_correct(classes):
    logits, _ = random_set(50, classes)
    state = feed(EvaluationState(), logits, logits.argmax(1))
    with pytest.warns(UserWarning, match="correctness_auroc is nan") as caught:
        values = numbers(state)
    assert len(caught) == 1
    assert math.isnan(values["correctness_auroc"])
    assert values["accuracy"] == 1.0
    assert values["ece"] == pytest.approx(1 - logits.softmax(1).amax(1).mean().item(), abs=1e-12)


# --- invalid values

FAULTY = {
    "nan": ("logits", 3, (slice(None), torch.nan)),
    "inf": ("logits", 5, (1, torch.inf)),
    "-inf": ("logits", 7, (0, -torch.inf)),
    "label": ("labels", 2, 4),
    "negative label": ("labels", 0, -1),
    "confidence": ("confidence", 6, 1.5),
    "nan confidence": ("confidence", 1, torch.nan),
}


def faulty_batch(case):
    logits, labels = random_set(10, 4)
    batch = {"logits": logits, "labels": labels, "confidence": torch.full((10,), 0.5)}
    name, row, value = FAULTY[case]
    if name == "logits":
        batch[name][row, value[0]] = value[1]
    else:
        batch[name][row] = value
    return batch, name, row


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize("case", FAULTY)
def test_invalid_values_raise_at_once_on_the_cpu(metric, case):
    logits, labels = random_set(20, 4)
    good = feed(metric(), logits, labels, (10,))
    before = numbers(good)
    batch, name, row = faulty_batch(case)
    message = rf"{name_of(metric)}, batch 3: 1 of 10 rows have invalid {name}; row {row} "
    with pytest.raises(ValueError, match=message):
        good(**batch)
    with pytest.raises(ValueError, match=message):
        good.update(**batch)
    assert numbers(good) == before
    assert int(good.count) == 20


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize("case", FAULTY)
@pytest.mark.parametrize("forward", [False, True])
def test_invalid_values_are_counted_elsewhere_and_raise_at_the_end(metric, case, forward, deferred):
    logits, labels = random_set(20, 4)
    bad = metric()
    batch, name, _ = faulty_batch(case)
    if forward:
        bad(logits, labels)
        with pytest.raises(ValueError, match=f"1 with invalid {name} among 10 rows, the first in batch 2 "):
            bad(**batch)
        return
    feed(bad, logits, labels, (10,))
    for _ in range(2):
        bad.update(**batch)
    feed(bad, logits, labels)
    message = rf"{name_of(metric)}: 2 with invalid {name} among 60 rows, the first in batch 3 "
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            bad.compute()
    bad.reset()
    assert numbers(feed(bad, logits, labels)) == pytest.approx(numbers(feed(metric(), logits, labels)), nan_ok=True)


def test_counted_faults_are_told_apart_and_merged(deferred):
    logits, labels = random_set(10, 4)
    probs = logits.softmax(1)
    state = EvaluationState(input="probs")
    state.update(probs, labels)
    other = EvaluationState(input="probs")
    other.update(probs * 1.01, torch.where(torch.arange(10) < 3, 9, labels))
    state.merge_state(other)
    with pytest.raises(ValueError, match="10 with invalid probs, 3 with invalid labels among 20 rows"):
        state.compute()


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_the_deferred_path_gives_the_same_numbers(kind, deferred):
    logits, labels = random_set(100, 5)
    expected = reference(logits, labels)
    state = feed(EvaluationState(input=kind), logits if kind == "logits" else logits.softmax(1), labels)
    assert numbers(state) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("own_confidence", [False, True])
def test_the_deferred_path_never_reads_a_value(kind, own_confidence, deferred):
    # A meta tensor has no values, so whatever would have to wait for a device raises here.
    state = EvaluationState(input=kind).to("meta")
    confidence = torch.empty(8, device="meta") if own_confidence else None
    labels = torch.empty(8, dtype=torch.int64, device="meta")
    for _ in range(2):
        state.update(torch.empty(8, 5, device="meta"), labels, confidence)
    assert state.bins.shape == (15, 3)
    assert [t.shape for t in state.rank_scores] == [(16,)]


@pytest.mark.parametrize("metric", EVERY)
def test_wrong_shapes_and_dtypes_raise_at_once_everywhere(metric, deferred):
    logits, labels = random_set(10, 4)
    bad = metric()
    bad.update(logits, labels)
    name = name_of(metric)
    with pytest.raises(TypeError, match=f"{name}, batch 2: labels is torch.float32.*must be class numbers"):
        bad.update(logits, labels.float())
    with pytest.raises(ValueError, match=rf"{name}, batch 3: labels has shape .* must have shape \(10,\)"):
        bad.update(logits, labels[:9])
    with pytest.raises(ValueError, match=f"{name}, batch 4: logits have 3 classes but earlier batches had 4"):
        bad.update(logits[:, :3], labels)
    with pytest.raises(ValueError, match=rf"{name}, batch 5: confidence has shape .* must have shape \(10,\)"):
        bad.update(logits, labels, torch.zeros(10, 1))


@pytest.mark.gpu
def test_on_a_device():
    logits, labels = random_set(500, 7)
    state = EvaluationState().to("cuda")
    batch = logits.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.update(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers(state) == pytest.approx(reference(logits, labels), abs=1e-12)
    labels[7] = 9
    state.update(logits.cuda(), labels.cuda())
    with pytest.raises(ValueError, match="1 with invalid labels among 1000 rows, the first in batch 2"):
        state.compute()
