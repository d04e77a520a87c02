"""The kernel calibration error against its definition, and its test of calibration."""

import math

import numpy as np
import pytest
import torch

from calib_lightning.metrics import SquaredKernelCalibrationError
from calib_lightning.metrics.functional import kernel, kernel_calibration_test, skce
from tests.metrics.golden import golden_set


def _term(p, y, q, z, bandwidth):
    left, right = -p, -q
    left[y] += 1
    right[z] += 1
    return np.exp(-0.5 * np.abs(p - q).sum() / bandwidth) * (left @ right)


def _reference(probs, labels, bandwidth=1.0):
    pairs = [
        _term(probs[i].copy(), labels[i], probs[j].copy(), labels[j], bandwidth)
        for i in range(len(labels))
        for j in range(len(labels))
        if i != j
    ]
    return np.mean(pairs)


@pytest.mark.parametrize("bandwidth", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("at_once", [1, 300, 2**22])
def test_estimate_is_the_mean_over_pairs(monkeypatch, bandwidth, at_once):
    monkeypatch.setattr(kernel, "_AT_ONCE", at_once)
    logits, labels = golden_set()
    logits, labels = logits[:60].double(), labels[:60]
    expected = _reference(logits.softmax(1).numpy(), labels.numpy(), bandwidth)
    assert skce(logits, labels, bandwidth=bandwidth).item() == pytest.approx(expected, abs=1e-14)
    assert skce(logits.softmax(1), labels, bandwidth=bandwidth, input="probs").item() == pytest.approx(
        expected, abs=1e-14
    )
    order = torch.randperm(60)
    assert skce(logits[order], labels[order], bandwidth=bandwidth).item() == pytest.approx(expected, abs=1e-14)


def test_certain_answers():
    """Two sure rows: right 0; wrong in both, the distance of opposite answers is 1."""
    sure = torch.eye(2, dtype=torch.float64)
    assert skce(sure, torch.tensor([0, 1]), input="probs").item() == 0
    assert skce(sure, torch.tensor([1, 0]), input="probs").item() == pytest.approx(-2 * math.exp(-1), abs=1e-15)
    assert skce(sure[[0, 0]], torch.tensor([1, 1]), input="probs").item() == pytest.approx(2, abs=1e-15)


def _sets(sharpen, n=200):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        logits = 2 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        yield sharpen * logits, labels


def test_estimate_is_unbiased_and_the_test_keeps_its_level():
    results = [kernel_calibration_test(*case, n_resamples=199) for case in _sets(1.0)]
    values = np.array([result.skce.item() for result in results])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert (values < 0).any()
    assert np.mean([result.p_value.item() <= 0.1 for result in results]) < 0.25
    assert np.mean([result.p_value.item() <= 0.5 for result in results]) > 0.25


def test_overconfidence_is_found():
    results = [kernel_calibration_test(*case, n_resamples=99) for case in _sets(3.0)]
    assert np.mean([result.p_value.item() <= 0.05 for result in results]) > 0.9


def test_the_test_has_the_estimate_and_its_seed():
    logits, labels = golden_set()
    result = kernel_calibration_test(logits, labels, n_resamples=50, seed=3)
    assert result.skce.item() == pytest.approx(skce(logits, labels).item(), abs=1e-15)
    assert result == kernel_calibration_test(logits, labels, n_resamples=50, seed=3)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_have_no_pairs(n):
    logits, labels = torch.zeros(n, 3), torch.zeros(n, dtype=torch.int64)
    with pytest.warns(UserWarning, match="nan"):
        assert skce(logits, labels).isnan()
    with pytest.warns(UserWarning, match="nan"):
        assert all(value.isnan() for value in kernel_calibration_test(logits, labels))


def test_impossible_settings_are_named():
    logits, labels = golden_set()
    for bandwidth in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="bandwidth"):
            skce(logits, labels, bandwidth=bandwidth)
    with pytest.raises(ValueError, match="n_resamples"):
        kernel_calibration_test(logits, labels, n_resamples=0)


@pytest.mark.parametrize("as_probs", [False, True])
@pytest.mark.parametrize("bandwidth", [0.3, 1.0])
def test_the_metric_is_the_function_of_all_batches(as_probs, bandwidth):
    logits, labels = golden_set()
    logits, labels = logits[:200].double(), labels[:200]
    scores, words = (logits.softmax(1), {"input": "probs"}) if as_probs else (logits, {})
    metric = SquaredKernelCalibrationError(bandwidth, **words)
    for _ in range(2):
        for start in range(0, 200, 64):
            metric.update(scores[start : start + 64], labels[start : start + 64])
        assert metric.compute().item() == pytest.approx(skce(logits, labels, bandwidth=bandwidth).item(), abs=1e-14)
        metric.reset()
    with pytest.raises(ValueError, match=r"batch 1: 1 of 1 rows have invalid labels"):
        metric.update(scores[:1], torch.tensor([99]))
    metric.update(scores[:1], labels[:1])
    with pytest.warns(UserWarning, match="SquaredKernelCalibrationError: these 1 rows do not define it"):
        assert metric.compute().isnan()
    with pytest.raises(ValueError, match="bandwidth is 0; it must be above 0"):
        SquaredKernelCalibrationError(0)
