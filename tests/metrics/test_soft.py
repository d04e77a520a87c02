"""Scores against distributions of labels: the definitions in float64 numpy, and the votes of people on CIFAR-10."""

import math

import numpy as np
import pytest
import torch
from scipy.special import entr, log_softmax, softmax

from calib_lightning.metrics import SOFT, SoftLabelScores
from calib_lightning.metrics.functional import label_entropy, nll, soft_brier, soft_nll
from tests.metrics import ddp_cases

THREE = {
    "soft_nll": soft_nll,
    "soft_brier": soft_brier,
    "label_entropy": lambda logits, labels, **options: label_entropy(labels),
}


def reference(logits, p):
    z = np.asarray(logits, dtype=np.float64)
    return {
        "soft_nll": -(p * log_softmax(z, axis=1)).sum(1).mean(),
        "soft_brier": ((softmax(z, axis=1) - p) ** 2).sum(1).mean(),
        "label_entropy": entr(p).sum(1).mean(),
    }


def made(rows=57, classes=6, scale=3.0, seed=0):
    draw = np.random.default_rng(seed)
    counts = draw.multinomial(20, draw.dirichlet(np.ones(classes) / 3, rows))
    return scale * draw.standard_normal((rows, classes)), counts / counts.sum(1, keepdims=True)


@pytest.mark.parametrize("scale", [3.0, 300.0])
@pytest.mark.parametrize("key", SOFT)
def test_values_are_those_of_scipy(key, scale):
    z, p = made(scale=scale)
    assert (p == 0).any()  # 0 log 0
    logits, labels = torch.from_numpy(z), torch.from_numpy(p)
    assert float(THREE[key](logits, labels)) == pytest.approx(reference(z, p)[key], rel=1e-12)
    if scale == 3.0:  # the softmax of the others is 0 here and there
        assert float(THREE[key](logits.softmax(1), labels, input="probs")) == pytest.approx(
            reference(z, p)[key], rel=1e-12
        )


def test_sums_are_wide_whatever_comes_in():
    z, p = made(rows=4000)
    z, p = z.astype(np.float32), p.astype(np.float32)
    for key, function in THREE.items():
        found = function(torch.from_numpy(z), torch.from_numpy(p))
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(reference(z, p.astype(np.float64))[key], rel=1e-12)


def test_no_prediction_is_better_than_the_distribution_itself():
    z, p = made()
    labels = torch.from_numpy(p)
    least = float(label_entropy(labels))
    assert float(soft_nll(labels, labels, input="probs")) == pytest.approx(least, rel=1e-12)
    assert float(soft_nll(torch.from_numpy(z), labels)) > least + 0.1
    assert float(soft_brier(labels, labels, input="probs")) == 0


@pytest.mark.parametrize("batch", [1, 7, 57])
def test_the_metric_is_the_functions_however_the_rows_come(batch):
    z, p = made()
    logits, labels = torch.from_numpy(z), torch.from_numpy(p)
    metric = SoftLabelScores()
    for start in range(0, len(z), batch):
        metric.update(logits[start : start + batch], labels[start : start + batch])
    found = metric.compute()
    assert list(found) == list(SOFT)
    assert {key: float(value) for key, value in found.items()} == pytest.approx(reference(z, p), rel=1e-13)
    half = SoftLabelScores()
    half.update(logits[:20], labels[:20])
    rest = SoftLabelScores()
    rest.update(logits[20:], labels[20:])
    half.merge_state(rest)
    assert {key: float(value) for key, value in half.compute().items()} == pytest.approx(reference(z, p), rel=1e-13)
    of_batch = half(logits[:9], labels[:9])
    assert {key: float(value) for key, value in of_batch.items()} == pytest.approx(reference(z[:9], p[:9]), rel=1e-13)


def test_class_numbers_are_certain_labels():
    z, _ = made()
    labels = torch.arange(57) % 6
    metric = SoftLabelScores()
    metric.update(torch.from_numpy(z), labels)
    found = metric.compute()
    assert float(found["soft_nll"]) == pytest.approx(float(nll(torch.from_numpy(z), labels)), rel=1e-13)
    assert float(found["label_entropy"]) == 0


@pytest.mark.parametrize("world", [2, 3])
def test_all_processes_read_what_one_reads(request, world):
    for result in request.getfixturevalue(f"pool{world}").run(ddp_cases.case_soft_labels):
        assert result["ours"] == pytest.approx(result["alone"], rel=1e-13)
        assert result["ours"]["label_entropy"] > 0.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda z, p: (z, p[:, :5]), ValueError, r"must have the shape \(57, 6\)"),
        (lambda z, p: (z, (20 * p).long()), TypeError, "torch.int64; they must be floating point"),
        (lambda z, p: (z, 20 * p), ValueError, "57 of 57 rows have invalid soft labels; row 0 .* sums to 20"),
        (lambda z, p: (z, p - 0.1 * (torch.arange(57) == 3)[:, None]), ValueError, "row 3 has a smallest entry of"),
        (lambda z, p: (z, torch.where(torch.arange(57)[:, None] == 4, torch.nan, p)), ValueError, "row 4 .* nan"),
        (lambda z, p: (z / (torch.arange(57) != 5)[:, None], p), ValueError, "row 5 has -?(inf|nan) for class"),
        (lambda z, p: (z[0], p[0]), ValueError, r"must have shape \(N, K\)"),
    ],
)
def test_what_is_no_distribution_is_refused(change, error, message):
    z, p = (torch.from_numpy(part) for part in made())
    logits, labels = change(z, p)
    for function in (soft_nll, soft_brier):
        with pytest.raises(error, match=message):
            function(logits, labels)
    metric = SoftLabelScores()
    with pytest.raises((ValueError, TypeError)):  # whole numbers are taken for class numbers, of a wrong shape
        metric.update(logits, labels)
    metric.update(z, p)
    assert float(metric.compute()["soft_nll"]) == float(soft_nll(z, p))


def test_the_entropy_of_what_is_no_distribution_is_refused():
    with pytest.raises(TypeError, match=r"torch.int64 of shape \(2, 3\); it must be floating point of shape \(N, K\)"):
        label_entropy(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"of shape \(3,\)"):
        label_entropy(torch.ones(3) / 3)
    with pytest.raises(ValueError, match=r"row 0 .* sums to 3"):
        label_entropy(torch.ones(2, 3))


def test_no_rows_are_nan_with_a_warning():
    empty = torch.empty(0, 3)
    for function in THREE.values():
        with pytest.warns(UserWarning, match="no rows"):
            assert math.isnan(function(empty, empty))


# Peterson et al. 2019: the votes of people, and two networks of theirs in the order of the official test set.
@pytest.mark.parametrize("network", ["resnet_basic_110", "wrn_28_10"])
def test_votes_of_people_on_cifar10(real_data, network):
    counts = np.load(real_data / "cifar-10h" / "cifar10h-counts.npy")
    stored = np.load(real_data / "logits" / "cifar10_human_experiments" / f"{network}_test.npz")
    p = counts / counts.sum(1, keepdims=True)
    assert (p.argmax(1) == stored["labels"]).mean() > 0.99
    metric = SoftLabelScores()
    for start in range(0, len(p), 512):
        rows = slice(start, start + 512)
        metric.update(torch.from_numpy(stored["logits"][rows]), torch.from_numpy(p[rows]))
    found = {key: float(value) for key, value in metric.compute().items()}
    assert found == pytest.approx(reference(stored["logits"], p), rel=1e-11)
    assert found["label_entropy"] < found["soft_nll"]
