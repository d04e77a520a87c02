import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize

from calib_lightning.posthoc.spline import Spline, spline_slope
from calib_lightning.posthoc.wrappers import OneVsRest
from tests.metrics.test_real_data import load

F64 = torch.float64


def sample(n=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_odds = 2 * torch.randn(n, generator=generator, dtype=F64) + 1
    return log_odds, torch.rand(n, generator=generator) < torch.sigmoid(0.5 * log_odds)


def reference(scores, hits, knots):
    """The least squares over the values at the knots by a general minimiser, and the slope by differences."""
    n = len(scores)
    order = np.argsort(scores)
    s, a = scores[order], hits[order].astype(float)
    t = np.linspace(0, 1, n + 1)
    h = np.concatenate([[0.0], np.cumsum(a - s) / n])
    at = np.linspace(0, 1, knots)

    def residual(values):
        return 1e4 * ((CubicSpline(at, values, bc_type="natural")(t) - h) ** 2).sum()

    best = minimize(residual, np.interp(at, t, h), method="BFGS", options={"gtol": 1e-9}).x
    spline = CubicSpline(at, best, bc_type="natural")
    middle = (np.arange(n) + 0.5) / n
    slope = (spline(middle + 1e-6) - spline(middle - 1e-6)) / 2e-6
    finest = 1 / (n / (knots - 1) + 2)
    return s, np.clip(s + slope, np.minimum(s, finest), np.maximum(s, 1 - finest)), order


@pytest.mark.parametrize("knots", [3, 6])
def test_agrees_with_the_definition(knots):
    log_odds, hits = sample()
    scores = 1 / (1 + np.exp(-log_odds.numpy()))
    s, expected, order = reference(scores, hits.numpy(), knots)
    spline = Spline(knots)
    assert spline.fit(log_odds, hits).notes == ()
    found = torch.sigmoid(spline(log_odds)).numpy()
    assert found[order] == pytest.approx(expected, abs=2e-5)
    where = np.linspace(0.01, 0.995, 300)
    found = torch.sigmoid(spline(torch.from_numpy(np.log(where / (1 - where))))).numpy()
    assert found == pytest.approx(np.interp(where, s, expected), abs=2e-5)


def test_finds_a_known_distortion():
    log_odds, hits = sample(20_000)
    spline = Spline()
    spline.fit(log_odds, hits)
    inner = log_odds[(log_odds - 1).abs() < 3]
    assert float((torch.sigmoid(spline(inner)) - torch.sigmoid(0.5 * inner)).abs().mean()) < 0.02
    assert len(spline.scores) <= 1024


def test_thinning_changes_little():
    log_odds, hits = sample(5000)
    spline = Spline()
    spline.fit(log_odds, hits)
    order = log_odds.argsort()
    scores = torch.sigmoid(log_odds[order]).numpy()
    whole = np.clip(scores + spline_slope(hits[order].numpy() - scores, 6), 1e-6, 1 - 1e-6)
    assert torch.sigmoid(spline(log_odds[order])).numpy() == pytest.approx(whole, abs=5e-4)


def test_equal_scores_do_not_depend_on_their_order():
    log_odds, hits = sample()
    log_odds = log_odds.round()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    one, other = Spline(), Spline()
    one.fit(log_odds, hits)
    other.fit(log_odds[order], hits[order])
    torch.testing.assert_close(one(log_odds), other(log_odds), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 10, 31])
def test_few_rows_shift_all_by_the_mean_gap(n):
    probs = torch.linspace(0.4, 0.6, n, dtype=F64)
    hits = torch.arange(n) % 2 == 0
    spline = Spline()
    assert "few" in spline.fit(probs.logit(), hits).notes[0]
    shift = torch.sigmoid(spline(probs.logit())) - probs
    if n == 1:  # the one hit cannot show more than the rule of succession
        assert float(shift) == pytest.approx(2 / 3 - 0.4)
        return
    torch.testing.assert_close(shift, shift[:1].expand(n), rtol=0, atol=1e-9)
    # The line is fitted to the running mean, so the shift is the mean gap only up to its noise.
    assert float(shift.mean()) == pytest.approx(float((hits.double() - probs).mean()), abs=0.5 / n)


def test_one_knot_is_refused():
    with pytest.raises(ValueError, match="an integer >= 2"):
        Spline(1)


def test_rare_classes_of_a_real_network_do_not_become_impossible(real_data):
    """Cut at 0, one test label in eighty got 1e-6, and the loss was .3751 where no calibration gives .3583."""
    calibration, test = (load(real_data, f"calarena/c10_resnet110_{part}.npz") for part in ("calibration", "test"))
    fitted = OneVsRest(Spline()).fit(*calibration)
    before, after = (float(torch.nn.functional.cross_entropy(z, test[1])) for z in (test[0], fitted(test[0])))
    assert after < 0.9 * before
