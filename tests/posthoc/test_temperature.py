"""Temperature scaling by likelihood, by recipes of papers and by the focal loss."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar

from calib_lightning.metrics.functional import temperature as functional
from calib_lightning.posthoc import Calibrator, FixedTemperature, build, parse
from calib_lightning.posthoc.solver import LBFGS, AdamDescent, GradientDescent, PlainLBFGS
from calib_lightning.posthoc.temperature import FocalTemperature, Temperature
from tests.metrics.golden import golden_set, random_set


def fits_of_golden():
    logits, labels = golden_set()
    return logits / 1.6, labels


def drawn(temperature, rows=2000, classes=10, seed=0):
    """Labels drawn from ``softmax(z)``, and the logits ``temperature * z``: that is their best temperature."""
    generator = torch.Generator().manual_seed(seed)
    z = 2.0 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return temperature * z, torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)


def one_wrong():
    logits, _ = random_set(400, 5, seed=4)
    labels = logits.argmax(1)
    labels[7] = logits[7].argmin()
    return logits, labels


def loss_and_gradient(logits, labels, temperature):
    """Mean NLL and its derivative by log T, in numpy."""
    z, y = logits.double().numpy(), labels.numpy()
    s = (z - z.max(axis=1, keepdims=True)) / temperature
    q = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
    own = s[np.arange(len(y)), y]
    return (np.log(np.exp(s).sum(axis=1)) - own).mean(), (own - (q * s).sum(axis=1)).mean()


def root(logits, labels):
    return math.exp(brentq(lambda u: loss_and_gradient(logits, labels, math.exp(u))[1], -14, 14, xtol=1e-13))


KNOWN = {
    f"T={t}, {str(dtype).removeprefix('torch.')}": (drawn(t)[0].to(dtype), drawn(t)[1])
    for t in (0.05, 0.3, 1.0, 2.5, 20.0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
}
KNOWN |= {
    "one wrong": one_wrong(),
    "one wrong, float32": (one_wrong()[0].float(), one_wrong()[1]),
    "ten rows": random_set(10, 4, seed=3),
    "K=2": drawn(2.5, classes=2),
    "K=1000": drawn(2.5, rows=300, classes=1000),
    "absent classes": (drawn(2.5)[0], drawn(2.5)[1] % 3),
    "large offsets": (drawn(2.5)[0] + 1e6, drawn(2.5)[1]),
    "scale 1e6": (1e6 * drawn(1.0)[0], drawn(1.0)[1]),
    "scale 1e-5": (1e-5 * drawn(1.0)[0], drawn(1.0)[1]),
}
SEPARABLE = random_set(200, 4)[0]
AT_BOUND = {
    "all right": (SEPARABLE, SEPARABLE.argmax(1)),
    "all right, float32": (SEPARABLE.float(), SEPARABLE.argmax(1)),
    "one row, right": (SEPARABLE[:1], SEPARABLE[:1].argmax(1)),
    "all wrong": (SEPARABLE, SEPARABLE.argmin(1)),
    "all wrong, bfloat16": (SEPARABLE.bfloat16(), SEPARABLE.bfloat16().argmin(1)),
    "one row, wrong": (SEPARABLE[:1], SEPARABLE[:1].argmin(1)),
}
CONSTANT = torch.arange(6.0)[:, None].expand(6, 3), torch.arange(6) % 3


def test_golden_fit():
    logits, labels = fits_of_golden()
    calibrator = Temperature().fit(logits, labels)
    assert calibrator.temperature == pytest.approx(0.596883945176, abs=1e-12)
    report = calibrator.report
    assert report.nll_before == pytest.approx(0.740779985637, abs=1e-12)
    assert report.nll_after == pytest.approx(0.669823476850, abs=1e-12)
    assert report.ece_before == pytest.approx(0.159361677, abs=1e-9)
    assert report.ece_after == pytest.approx(0.059544043, abs=1e-9)
    assert report.accuracy_change == 0.0


@pytest.mark.parametrize("case", KNOWN)
def test_optimum_and_report(case, monkeypatch):
    """T against an independent root; every pass over the rows is counted; the gradient is that at the end."""
    logits, labels = KNOWN[case]
    passes = []
    for name in ("tempered_rows", "_of_uniform"):
        original = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *args, of=original: passes.append(1) or of(*args))
    calibrator = Temperature().fit(logits, labels)
    report = calibrator.report
    assert calibrator.temperature == pytest.approx(root(logits, labels), rel=1e-9)
    assert (report.converged, report.at_bound, report.passes) == (True, False, len(passes))
    assert report.passes <= 12
    loss, gradient = loss_and_gradient(logits, labels, calibrator.temperature)
    assert abs(gradient) < 1e-10
    assert abs(gradient) <= report.gradient_norm + 1e-12 < 1e-6
    widened = logits if logits.dtype == torch.float64 else logits.float()
    assert report.nll_after == pytest.approx(loss, abs=1e-12 if widened.dtype == torch.float64 else 1e-6)
    assert report.nll_after <= report.nll_before + 1e-12
    assert report.accuracy_change == 0.0
    assert report.notes == ()


def smoothed_optimum(logits, labels):
    """T of targets ``1 - 1 / (N + 2)`` by a general minimiser, at most 1."""
    rows, classes = logits.shape
    targets = torch.full((rows, classes), 1 / (rows + 2) / (classes - 1), dtype=torch.float64)
    targets[torch.arange(rows), labels] = 1 - 1 / (rows + 2)

    def loss(log_t):
        return float(torch.nn.functional.cross_entropy(logits.double() * math.exp(-log_t), targets))

    return min(1.0, math.exp(minimize_scalar(loss, bounds=(-12, 12), method="bounded", options={"xatol": 1e-10}).x))


@pytest.mark.parametrize("case", AT_BOUND)
def test_bounds_are_reported(case):
    logits, labels = AT_BOUND[case]
    with pytest.warns(UserWarning, match="bound"):
        calibrator = Temperature().fit(logits, labels)
    report = calibrator.report
    assert (report.converged, report.at_bound, report.accuracy_change) == (False, True, 0.0)
    assert 0.0 < calibrator.temperature < math.inf
    assert calibrator(logits).isfinite().all()
    if "right" in case:
        assert calibrator.temperature == pytest.approx(smoothed_optimum(logits, labels), rel=1e-6)
        assert f"T = {calibrator.temperature:.3g} is used" in report.notes[0]
        assert report.nll_after <= report.nll_before
    else:
        assert report.nll_after == pytest.approx(math.log(logits.shape[1]), abs=2e-3)
        assert torch.equal(calibrator(logits).argmax(1), logits.argmax(1))
    # The slope has no root: the loss falls all the way to the bound.
    slopes = [loss_and_gradient(logits, labels, t)[1] for t in (0.1, 1.0, 10.0, 100.0)]
    assert all(slope >= 0.0 for slope in slopes) if "right" in case else all(slope < 0.0 for slope in slopes)


def test_constant_logits_are_left_alone():
    calibrator = Temperature().fit(*CONSTANT)
    assert (calibrator.temperature, calibrator.report.converged, calibrator.report.gradient_norm) == (1.0, True, 0.0)
    assert FocalTemperature().fit(*CONSTANT).temperature == 1.0


def test_weights_of_rows_are_copies():
    logits, labels = random_set(60, 4)
    counts = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0))
    copied = functional.search_inverse_temperature(
        logits.repeat_interleave(counts, 0), labels.repeat_interleave(counts)
    )
    weighted = functional.search_inverse_temperature(logits, labels, counts)
    assert weighted.optimum.beta == pytest.approx(copied.optimum.beta, rel=1e-11)
    assert weighted.optimum.nll == pytest.approx(copied.optimum.nll, abs=1e-13)


def test_optimum_beyond_the_lower_bound_of_beta():
    """Labels of hardly more than the average logit: the slope at 0 is below zero, that at exp(-16) is not."""
    logits = torch.tensor([[1e8, 0.0], [1e8, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    logits[0, 0] += 1.0
    fit = functional.fit_inverse_temperature(logits, labels)
    assert (fit.beta, fit.at_bound) == (math.exp(-16), True)


def test_optimum_just_beyond_a_bound_is_stopped_there():
    """The slope at the bound is not zero, but the root lies further: three of four right need ``beta gap = log 3``."""
    labels = torch.tensor([0, 0, 0, 1])
    for gap, bound in ((1e-8, 16.0), (1e8, -16.0)):
        fit = functional.fit_inverse_temperature(torch.tensor([[gap, 0.0]] * 4, dtype=torch.float64), labels)
        assert (fit.beta, fit.at_bound) == (math.exp(bound), True)
    # Of many classes the slope may fall below zero first: 0.102 of the rows have the class with the large logit.
    logits = torch.tensor([[1e8] + [0.0] * 9] * 1000, dtype=torch.float64)
    few = torch.where(torch.arange(1000) < 102, 0, torch.arange(1000) % 9 + 1)
    fit = functional.fit_inverse_temperature(logits, few)
    assert (fit.beta, fit.at_bound) == (math.exp(-16), True)


# --- recipes of papers


def gpleiss(logits, labels, steps):
    """What the code of Guo et al. does, in float64."""
    temperature = torch.full((1,), 1.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([temperature], lr=0.01, max_iter=steps)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits / temperature, labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(temperature.detach())


def descended(logits, labels, lr=1e-3, epochs=1000):
    temperature = 1.0
    for _ in range(epochs):
        temperature -= lr * loss_and_gradient(logits, labels, temperature)[1] / temperature
    return temperature


@pytest.mark.parametrize(
    ("solver", "reference", "gaps"),
    [
        (PlainLBFGS(), lambda z, y: gpleiss(z, y, 50), (0.04, 0.12)),
        (PlainLBFGS(steps=200), lambda z, y: gpleiss(z, y, 200), (0.003, 0.015)),
        (GradientDescent(), descended, (0.07, 0.16)),
    ],
)
def test_recipe_is_followed_and_its_gap_reported(solver, reference, gaps):
    logits, labels = drawn(2.5, rows=1000)
    with pytest.warns(UserWarning, match="before the optimum"):
        calibrator = Temperature(solver).fit(logits, labels)
    assert calibrator.temperature == pytest.approx(reference(logits, labels), rel=1e-9)
    report = calibrator.report
    best = loss_and_gradient(logits, labels, root(logits, labels))[0]
    assert gaps[0] < report.nll_after - best < gaps[1]
    assert not report.converged
    assert report.gradient_norm == pytest.approx(
        abs(loss_and_gradient(logits, labels, calibrator.temperature)[1]), rel=1e-9
    )


@pytest.mark.parametrize("solver", [LBFGS(), AdamDescent(lr=0.05, epochs=3000)])
def test_other_solvers_reach_the_optimum(solver):
    logits, labels = drawn(2.5, rows=300)
    calibrator = Temperature(solver).fit(logits, labels)
    assert calibrator.report.converged
    assert calibrator.temperature == pytest.approx(root(logits, labels), rel=1e-5)


def test_recipe_that_ends_worse_than_it_began_is_refused():
    logits, labels = drawn(0.597, rows=500)
    cases = {
        "too long steps": (PlainLBFGS(lr=1.0, steps=200), logits),
        "below zero": (GradientDescent(lr=30.0, epochs=1), logits),
        "through zero": (GradientDescent(lr=3.0, epochs=40), logits),
        "huge logits": (GradientDescent(epochs=200), 1e6 * logits),
        "not finite": (GradientDescent(lr=1e300, epochs=3), logits),
    }
    refused = 0
    for name, (solver, z) in cases.items():
        with pytest.warns(UserWarning, match="diverged|before the optimum") as caught:
            calibrator = Temperature(solver).fit(z, labels)
        assert 0.0 < calibrator.temperature < math.inf, name
        assert calibrator(z).isfinite().all(), name
        if any("diverged" in str(warning.message) for warning in caught):
            refused += 1
            assert calibrator.temperature == 1.0, name
            assert calibrator.report.nll_after == calibrator.report.nll_before, name
            assert calibrator.report.gradient_norm == pytest.approx(
                abs(loss_and_gradient(z, labels, 1.0)[1]), rel=1e-9
            ), name
        assert not calibrator.report.converged, name
    assert refused >= 3


def test_recipe_that_is_worse_than_nothing_says_so():
    logits, labels = drawn(0.597, rows=500)
    with pytest.warns(UserWarning, match="worse than T = 1|before the optimum") as caught:
        calibrator = Temperature(PlainLBFGS()).fit(logits, labels)
    assert calibrator.temperature == pytest.approx(gpleiss(logits, labels, 50), rel=1e-9)
    assert calibrator.report.nll_after > calibrator.report.nll_before
    assert any("worse than T = 1" in str(warning.message) for warning in caught)


def test_recipe_survives_being_written_down():
    named = parse("Temperature(PlainLBFGS(steps=200))", Calibrator)
    assert build(named.spec, Calibrator).solver == PlainLBFGS(steps=200)


# --- focal loss, fixed


@pytest.mark.parametrize(("gamma", "expected"), [(0.0, 0.59688), (0.5, 0.69470), (1.0, 0.78733), (2.0, 0.95987)])
def test_golden_focal_fit(gamma, expected):
    logits, labels = fits_of_golden()
    calibrator = FocalTemperature(gamma).fit(logits, labels)
    assert calibrator.temperature == pytest.approx(expected, abs=5e-6)
    assert calibrator.report.converged


def focal(logits, labels, temperature, gamma):
    z = logits.double().numpy() / temperature
    z = z - z.max(axis=1, keepdims=True)
    nll = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels.numpy()]
    return (-np.expm1(-nll)) ** gamma @ nll / len(nll)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 20.0, 1e4])
@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_focal_fit_is_the_lowest_point(scale, gamma):
    logits, labels = drawn(scale, rows=300, classes=5)
    calibrator = FocalTemperature(gamma).fit(logits, labels)
    logs = math.log(scale) + np.linspace(-6, 6, 500)
    near = logs[np.argmin([focal(logits, labels, math.exp(u), gamma) for u in logs])]
    found = minimize_scalar(
        lambda u: focal(logits, labels, math.exp(u), gamma),
        bounds=(near - 0.05, near + 0.05),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert calibrator.temperature == pytest.approx(math.exp(found.x), rel=1e-5)
    assert calibrator.report.gradient_norm < 1e-9
    assert calibrator.temperature > Temperature().fit(logits, labels).temperature


@pytest.mark.parametrize("case", AT_BOUND)
def test_focal_fit_without_optimum(case):
    logits, labels = AT_BOUND[case]
    with pytest.warns(UserWarning, match="bound"):
        calibrator = FocalTemperature().fit(logits, labels)
    assert calibrator.report.at_bound
    assert not calibrator.report.converged
    assert calibrator(logits).isfinite().all()
    assert calibrator.report.accuracy_change == 0.0


def test_fixed_temperature_is_used_as_it_is():
    logits, labels = random_set(30, 4)
    calibrator = FixedTemperature(1.5).fit(logits, labels)
    assert calibrator.temperature == 1.5
    torch.testing.assert_close(calibrator(logits), (logits / 1.5).log_softmax(1), rtol=1e-14, atol=1e-14)


def test_invalid_arguments_are_named():
    with pytest.raises(ValueError, match=r"gamma is -1\.0.*>= 0"):
        FocalTemperature(-1.0)
    with pytest.raises(ValueError, match="gamma is nan"):
        FocalTemperature(math.nan)
    with pytest.raises(TypeError, match=r"solver is 'lbfgs'.*PlainLBFGS\(\)"):
        Temperature("lbfgs")
    for value in (0.0, -1.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite and > 0"):
            FixedTemperature(value)


@pytest.mark.parametrize("temperature", [0.05, 2.5, 20.0])
def test_probmetrics_finds_the_same(temperature):
    calibrators = pytest.importorskip("probmetrics.calibrators")
    distributions = pytest.importorskip("probmetrics.distributions")
    logits, labels = drawn(temperature)
    theirs = calibrators.TemperatureScalingCalibrator()
    theirs.fit_torch(distributions.CategoricalLogits(logits), labels)
    assert 1.0 / Temperature().fit(logits, labels).temperature == pytest.approx(float(theirs.invtemp_), rel=1e-6)
