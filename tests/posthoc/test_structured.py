"""Structured vector and matrix scaling."""

import numpy as np
import pytest
import torch

from calib_lightning.posthoc.structured import StructuredMatrixScaling, StructuredVectorScaling, smoothed_log_probs
from calib_lightning.posthoc.vector import VectorScaling
from tests.metrics.golden import golden_set, random_set

BOTH = (StructuredVectorScaling, StructuredMatrixScaling)
AT_BOUND = ("wrong", "one row")
"""Rows whose best temperature lies at a bound."""


def golden():
    logits, labels = golden_set()
    return logits / 1.6, labels


def full(fitted):
    """Its map as a matrix."""
    return fitted.weight.diag().numpy() if fitted.weight.ndim == 1 else fitted.weight.numpy()


def reference(fitted, logits):
    """The equations in numpy, float64: smoothed probabilities and the result."""
    p = np.exp(float(fitted.beta) * logits.numpy())
    p /= p.sum(1, keepdims=True)
    x = np.log((1 - float(fitted.share)) * p + float(fitted.share) / p.shape[1])
    q = np.exp(x @ full(fitted).T + fitted.bias.numpy())
    return x, q / q.sum(1, keepdims=True)


def objective(fitted, logits, labels):
    n, k = logits.shape
    q = reference(fitted, logits)[1]
    change = full(fitted) - np.eye(k)
    on = (np.diag(change) ** 2).sum() + (fitted.bias.numpy() ** 2).sum()
    off = (change**2).sum() - (np.diag(change) ** 2).sum()
    return -np.log(q[np.arange(n), labels.numpy()]).mean() + k / n * on + k * (k - 1) / n * off


@pytest.mark.parametrize(
    ("cls", "least", "nll"), [(BOTH[0], 0.659095193, 0.656671469), (BOTH[1], 0.631180568, 0.624150915)]
)
def test_golden_values(cls, least, nll):
    logits, labels = golden()
    fitted = cls().fit(logits, labels)
    assert fitted.report.converged
    assert objective(fitted, logits, labels) == pytest.approx(least, abs=1e-9)
    assert fitted.report.nll_after == pytest.approx(nll, abs=1e-9)
    assert float(fitted.beta) == pytest.approx(1.675367561955, abs=1e-9)
    assert float(fitted.share) == 1 / 501
    assert float(fitted.bias.mean()) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("cls", BOTH)
def test_transform_is_the_equation(cls):
    logits, labels = golden()
    fitted = cls().fit(logits, labels)
    expected = reference(fitted, logits)[1]
    assert np.allclose(fitted(logits).exp().numpy(), expected, atol=1e-13)
    assert np.allclose(fitted(logits.float()).exp().numpy(), expected, atol=1e-5)
    assert torch.allclose(fitted(logits + 100.0), fitted(logits), atol=1e-10)


@pytest.mark.parametrize("cls", BOTH)
def test_no_small_change_lowers_the_objective(cls):
    logits, labels = golden()
    fitted = cls().fit(logits, labels)
    best = objective(fitted, logits, labels)
    generator = torch.Generator().manual_seed(0)
    weight, bias = fitted.weight.clone(), fitted.bias.clone()
    for _ in range(20):
        fitted.weight = weight + 1e-3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        fitted.bias = bias + 1e-3 * torch.randn(5, generator=generator, dtype=torch.float64)
        assert objective(fitted, logits, labels) > best


@pytest.mark.parametrize(("cls", "name"), [(BOTH[0], "SVSCalibrator"), (BOTH[1], "SMSCalibrator")])
def test_agrees_with_probmetrics(cls, name):
    """Its solver stops at a gradient of about 1e-5, and its temperature has float32 digits: it ends above."""
    probmetrics = pytest.importorskip("probmetrics.calibrators")
    logits, labels = golden()
    fitted = cls().fit(logits, labels)
    other = getattr(probmetrics, name)()
    other.fit(logits.softmax(1).numpy(), labels.numpy())
    theirs = other.predict_proba(logits.softmax(1).numpy())
    assert np.allclose(fitted(logits).exp().numpy(), theirs, atol=1e-3)
    nll = -np.log(theirs[np.arange(500), labels.numpy()]).mean()
    assert fitted.report.nll_after == pytest.approx(nll, abs=1e-5)


def test_the_ridge_fades_with_rows():
    logits, labels = golden()
    many = StructuredVectorScaling().fit(logits.repeat(1000, 1), labels.repeat(1000))
    inputs = smoothed_log_probs(logits, many.beta, many.share)
    free = VectorScaling(ridge=0.0).fit(inputs, labels)
    assert many.report.nll_after == pytest.approx(free.report.nll_after, abs=1e-7)
    few = StructuredVectorScaling().fit(logits[:20], labels[:20])
    assert float((few.weight - 1).abs().max()) < 0.2 < float((free.weight - 1).abs().max())


@pytest.mark.parametrize("cls", BOTH)
def test_perfect_rows_are_smoothed(cls):
    logits, _ = golden()
    with pytest.warns(UserWarning, match="bound"):
        fitted = cls().fit(logits, logits.argmax(1))
    assert fitted.report.at_bound
    assert fitted.report.nll_after < 2e-3
    assert float(fitted.weight.abs().max()) < 2
    assert float(fitted(logits).exp().min()) > 1e-6  # no probability is zero


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("kind", ["wrong", "one class", "one row", "constant", "absent"])
def test_hard_rows(cls, kind):
    logits, labels = golden()
    if kind == "wrong":
        labels = logits.argmin(1)
    elif kind == "one class":
        labels = torch.zeros_like(labels)
    elif kind == "one row":
        logits, labels = logits[:1], labels[:1]
    elif kind == "constant":
        logits = torch.ones_like(logits)
    else:
        logits, labels = logits[labels != 3], labels[labels != 3]
    with pytest.warns() if kind != "constant" else torch.no_grad():
        fitted = cls().fit(logits, labels)
    assert fitted.report.at_bound == (kind in AT_BOUND)
    assert fitted.report.converged == (kind not in AT_BOUND)
    assert fitted.report.nll_after <= fitted.report.nll_before + 1e-9
    assert float(fitted.weight.abs().max()) < 3
    assert fitted(logits.float()).isfinite().all()


def test_smoothed_log_probs_far_below_one():
    logits = torch.tensor([[0.0, -500.0, -800.0]])
    one = torch.ones(())
    found = smoothed_log_probs(logits, one, one / 11)
    assert found[0, 1:].exp().tolist() == pytest.approx([1 / 33, 1 / 33])
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_a_thousand_classes():
    logits, labels = random_set(1500, 1000)
    with pytest.warns(UserWarning, match="have no calibration rows"):
        report = StructuredVectorScaling().fit(logits.float(), labels).report
    assert report.converged
    assert report.nll_after < report.nll_before


def test_more_classes_than_a_class_has_rows():
    logits, labels = random_set(400, 200, scale=3.0)
    with pytest.warns(UserWarning, match="have no calibration rows"):
        report = StructuredMatrixScaling().fit(logits, labels).report
    assert report.converged
    assert report.passes < 60
    assert report.nll_after < report.nll_before
