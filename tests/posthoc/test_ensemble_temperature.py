"""Ensemble temperature scaling."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from calib_lightning.posthoc.ensemble_temperature import EnsembleTemperature
from tests.metrics.golden import golden_set, random_set
from tests.posthoc.test_temperature import AT_BOUND, CONSTANT, drawn, fits_of_golden

GOLDEN = {
    "mse": (0.4975439, [0.961315, 0.0, 0.038685], 0.0697846948),
    "nll": (0.5968839, [0.963405, 0.036595, 0.0], 0.669575606),
}


def loss_of(q, labels, loss):
    one_hot = np.eye(q.shape[1])[labels.numpy()]
    return ((q - one_hot) ** 2).mean() if loss == "mse" else -np.log((q * one_hot).sum(axis=1)).mean()


def softmax(z):
    odds = np.exp(z - z.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def mixture(logits, temperature, weights):
    z = logits.double().numpy()
    return weights[0] * softmax(z / temperature) + weights[1] * softmax(z) + weights[2] / z.shape[1]


@pytest.mark.parametrize("loss", GOLDEN)
def test_golden_fit(loss):
    logits, labels = fits_of_golden()
    temperature, weights, value = GOLDEN[loss]
    calibrator = EnsembleTemperature(loss).fit(logits, labels)
    assert calibrator.temperature == pytest.approx(temperature, abs=1e-7)
    assert calibrator.weights.tolist() == pytest.approx(weights, abs=5e-7)
    assert loss_of(calibrator(logits).exp().numpy(), labels, loss) == pytest.approx(value, abs=5e-10)
    assert calibrator.report.converged
    assert calibrator.report.gradient_norm < 1e-6
    assert calibrator.report.accuracy_change == 0.0


SETS = {
    "over-confident": drawn(2.5, rows=400),
    "under-confident": drawn(0.3, rows=400),
    "golden": golden_set(),
    "few right": random_set(60, 20, scale=6.0),
    "absent classes": (drawn(2.5, rows=200)[0], drawn(2.5, rows=200)[1] % 3),
    "two classes": drawn(3.0, rows=200, classes=2),
    "float32": (drawn(2.5, rows=400)[0].float(), drawn(2.5, rows=400)[1]),
    "label noise": (
        drawn(4.0, rows=400)[0],
        torch.where(torch.arange(400) % 4 > 0, drawn(4.0, rows=400)[1], torch.arange(400) % 10),
    ),
}


@pytest.mark.parametrize("loss", GOLDEN)
@pytest.mark.parametrize("name", SETS)
def test_weights_are_the_best_of_the_simplex(name, loss):
    """Against scipy's solver from several starts, and against every small step between two weights."""
    logits, labels = SETS[name]
    calibrator = EnsembleTemperature(loss).fit(logits, labels)
    temperature, weights = calibrator.temperature, calibrator.weights.numpy()
    assert weights.min() >= 0.0
    assert weights.sum() == pytest.approx(1.0, abs=1e-15)
    ours = loss_of(mixture(logits, temperature, weights), labels, loss)
    for start in ([0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.3, 0.3, 0.4]):
        theirs = minimize(
            lambda w: loss_of(mixture(logits, temperature, w), labels, loss),
            start,
            method="SLSQP",
            bounds=[(1e-12, 1.0)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0},
            options={"ftol": 1e-12},
        )
        assert ours <= theirs.fun + 1e-9
    for a in range(3):
        for b in range(3):
            if a != b and weights[a] >= 1e-4:
                moved = weights + 1e-4 * (np.arange(3) == b) - 1e-4 * (np.arange(3) == a)
                assert loss_of(mixture(logits, temperature, moved), labels, loss) >= ours - 1e-14
    assert calibrator.report.converged


@pytest.mark.parametrize("name", SETS)
def test_temperature_of_least_squares(name):
    logits, labels = SETS[name]
    calibrator = EnsembleTemperature().fit(logits, labels)

    def squares(log_t):
        return loss_of(mixture(logits, np.exp(log_t), (1.0, 0.0, 0.0)), labels, "mse")

    ours = squares(np.log(calibrator.temperature))
    assert ours <= min(map(squares, np.linspace(-6, 6, 800))) + 1e-12
    for step in (-1e-3, 1e-3):
        assert squares(np.log(calibrator.temperature) + step) > ours


def test_of_several_minima_the_lowest_is_taken():
    """Rows that differ by little and rows that differ by much have temperatures of their own: two valleys."""
    logits = torch.tensor([[0.01, 0.0]] * 60 + [[30.0, 0.0]] * 50, dtype=torch.float64)
    for right, of_many in ((54, "much"), (59, "little")):
        labels = torch.tensor([0] * right + [1] * (60 - right) + [0] * 36 + [1] * 14)
        logs = np.linspace(-9, 9, 2001)
        values = np.array([loss_of(mixture(logits, np.exp(u), (1.0, 0.0, 0.0)), labels, "mse") for u in logs])
        valleys = (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])
        assert valleys.sum() == 2
        calibrator = EnsembleTemperature().fit(logits, labels)
        ours = loss_of(mixture(logits, calibrator.temperature, (1.0, 0.0, 0.0)), labels, "mse")
        assert ours <= values.min() + 1e-9, of_many
        assert calibrator.temperature == pytest.approx(np.exp(logs[values.argmin()]), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_mixture_of_log_probabilities(dtype, scale):
    """Far below float32's smallest number too, where probabilities of the parts would be zero."""
    logits, labels = drawn(2.5, rows=200)
    calibrator = EnsembleTemperature("nll").fit(logits, labels)
    scaled = (scale * logits).to(dtype)
    log_q = calibrator(scaled)
    assert log_q.dtype == dtype
    weights, beta = calibrator.weights.numpy(), float(calibrator.beta)
    z = scaled.double().numpy()
    parts = [s - s.max(axis=1, keepdims=True) for s in (beta * z, z)]
    parts = [s - np.log(np.exp(s).sum(axis=1, keepdims=True)) for s in parts]
    with np.errstate(divide="ignore"):
        parts = [np.log(weights[0]) + parts[0], np.log(weights[1]) + parts[1], np.log(weights[2] / 10) + 0.0 * z]
    expected = np.logaddexp(np.logaddexp(parts[0], parts[1]), parts[2])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(log_q.numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", GOLDEN)
@pytest.mark.parametrize("case", AT_BOUND)
def test_bounds_are_reported(case, loss):
    logits, labels = AT_BOUND[case]
    with pytest.warns(UserWarning, match="bound|uniform"):
        calibrator = EnsembleTemperature(loss).fit(logits, labels)
    report = calibrator.report
    assert (report.at_bound, report.converged) == (True, False)
    assert calibrator(logits).isfinite().all()
    assert float(calibrator.weights[2]) <= 1.0 - 1e-6
    if "wrong" in case and logits.dtype == torch.float64:
        assert torch.equal(calibrator(logits).argsort(1), logits.argsort(1))
    if loss == "nll":
        assert report.nll_after <= report.nll_before


@pytest.mark.parametrize("loss", GOLDEN)
def test_constant_logits(loss):
    calibrator = EnsembleTemperature(loss).fit(*CONSTANT)
    assert calibrator.temperature == 1.0
    assert calibrator.report.converged
    torch.testing.assert_close(calibrator(CONSTANT[0]).exp(), torch.full((6, 3), 1 / 3))


def test_many_classes_in_blocks():
    logits, labels = drawn(2.5, rows=1500, classes=1000)
    calibrator = EnsembleTemperature().fit(logits, labels)
    q = mixture(logits, calibrator.temperature, calibrator.weights.numpy())
    gram = np.array([mixture(logits, calibrator.temperature, w).ravel() for w in np.eye(3)])
    one_hot = np.eye(1000)[labels.numpy()].ravel()
    gradient = gram @ (q.ravel() - one_hot) / q.size
    assert abs(gradient - calibrator.weights.numpy() @ gradient)[calibrator.weights.numpy() > 0].max() < 1e-12
    assert (gradient - calibrator.weights.numpy() @ gradient).min() > -1e-12


def test_unknown_loss_is_named():
    with pytest.raises(ValueError, match=r"loss is 'brier'.*'mse' or 'nll'"):
        EnsembleTemperature("brier")
