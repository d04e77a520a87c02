import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from calib_lightning.posthoc.platt import Platt, fit_logistic

F64 = torch.float64


def sample(n=400, seed=0, slope=0.6, shift=-0.3, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    log_odds = scale * torch.randn(n, generator=generator, dtype=F64) + 1.0
    hits = torch.rand(n, generator=generator) < torch.sigmoid(slope * log_odds + shift)
    return log_odds, hits


def nll(log_odds, hits):
    return float(
        torch.where(hits, torch.logaddexp(-log_odds, log_odds * 0), torch.logaddexp(log_odds, log_odds * 0)).mean()
    )


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_logistic_regression(seed):
    log_odds, hits = sample(seed=seed)
    platt = Platt()
    optimum = platt.fit(log_odds, hits)
    peer = LogisticRegression(C=1e10, tol=1e-12, max_iter=10_000).fit(log_odds.numpy()[:, None], hits.numpy())
    assert float(platt.slope) == pytest.approx(peer.coef_[0, 0], rel=1e-5)
    assert float(platt.intercept) == pytest.approx(peer.intercept_[0], rel=1e-4, abs=1e-5)
    assert optimum.converged
    assert not optimum.at_bound
    assert optimum.gradient_norm <= 1e-9


def test_probabilities_of_certain_rows_are_not_clipped():
    # 40 and 50 are both 1 - 0 as float64 probabilities.
    log_odds = torch.tensor([40.0, 50.0], dtype=F64).repeat_interleave(100)
    hits = torch.arange(200) % 100 < torch.tensor([60, 90]).repeat_interleave(100)
    platt = Platt()
    platt.fit(log_odds, hits)
    torch.testing.assert_close(
        torch.sigmoid(platt(torch.tensor([40.0, 50.0], dtype=F64))), torch.tensor([0.6, 0.9], dtype=F64)
    )


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e8])
def test_log_odds_of_any_size_are_fitted(scale):
    log_odds, hits = sample()
    platt = Platt()
    platt.fit(log_odds, hits)
    other = Platt()
    assert other.fit(scale * log_odds, hits).converged
    torch.testing.assert_close(other(scale * log_odds), platt(log_odds), rtol=1e-6, atol=1e-6)


def test_one_wrong_row_among_many_is_no_separation():
    log_odds, _ = sample()
    hits = torch.arange(400) != 7
    platt = Platt()
    optimum = platt.fit(log_odds, hits)
    assert optimum.converged
    assert not optimum.at_bound
    assert float(torch.sigmoid(platt(log_odds)).mean()) == pytest.approx(399 / 400, abs=1e-9)


def test_separated_rows_get_smoothed_targets():
    log_odds = torch.tensor([-0.2, -0.1, 0.1, 0.15, 0.3], dtype=F64)
    hits = log_odds > 0
    targets = np.where(hits.numpy(), 4 / 5, 1 / 4)

    def loss(x):
        scores = x[0] * log_odds.numpy() + x[1]
        return (np.logaddexp(0, scores) - targets * scores).mean()

    peer = minimize(loss, np.zeros(2), tol=1e-14).x
    platt = Platt()
    optimum = platt.fit(log_odds, hits)
    assert optimum.at_bound
    assert "separate" in optimum.notes[0]
    assert [float(platt.slope), float(platt.intercept)] == pytest.approx(peer, rel=1e-4)


def test_rows_that_touch_are_separated_and_equal_rows_are_not():
    touching, equal = torch.tensor([0.0, 1.0, 1.0, 2.0], dtype=F64), torch.ones(4, dtype=F64)
    hits = torch.tensor([False, False, True, True])
    assert Platt().fit(touching, hits).at_bound
    platt = Platt()
    assert not platt.fit(equal, hits).at_bound
    # The base rate where the rows are; elsewhere the order stays.
    assert float(torch.sigmoid(platt(equal))[0]) == pytest.approx(0.5)
    assert float(platt.slope) == 1.0


def test_all_hits_give_the_smoothed_rate_unless_the_rows_were_surer():
    log_odds = torch.linspace(-1, 1, 8, dtype=F64)
    platt = Platt()
    assert platt.fit(log_odds, torch.ones(8, dtype=torch.bool)).at_bound
    torch.testing.assert_close(torch.sigmoid(platt(log_odds)), torch.full((8,), 9 / 10, dtype=F64))
    sure = Platt()
    optimum = sure.fit(log_odds + 20, torch.ones(8, dtype=torch.bool))
    assert optimum.at_bound
    assert any("kept" in note for note in optimum.notes)
    torch.testing.assert_close(sure(log_odds), log_odds)


def test_a_falling_line_becomes_the_base_rate():
    log_odds, hits = sample(slope=-1.0, shift=0.0)
    platt = Platt()
    optimum = platt.fit(log_odds, hits)
    assert optimum.converged
    assert "negative" in optimum.notes[0]
    torch.testing.assert_close(torch.sigmoid(platt(log_odds)), hits.double().mean().expand(400))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("seed", range(8))
def test_never_less_likely_than_the_probabilities_as_they_came(n, seed):
    log_odds, hits = sample(n, seed, slope=1.0, shift=0.0)
    platt = Platt()
    platt.fit(log_odds, hits)
    assert nll(platt(log_odds), hits) <= nll(log_odds, hits) + 1e-12
    assert float(platt.slope) >= 0.0


def test_two_columns_agree_with_a_bounded_solver():
    # Binding bounds: the exact constrained maximum, by another method.
    seen = 0
    for seed in range(12):
        log_odds, hits = sample(120, seed, slope=0.5, shift=0.8)
        columns = torch.stack([torch.nn.functional.logsigmoid(log_odds), -torch.nn.functional.logsigmoid(-log_odds)], 1)
        fit = fit_logistic(columns, log_odds, hits, intercept=True)

        def loss(x, columns=columns, hits=hits):
            scores = columns.numpy() @ x[:2] + x[2]
            return (np.logaddexp(0, scores) - hits.numpy() * scores).mean()

        peer = minimize(loss, [1, 1, 0], bounds=[(0, None), (0, None), (None, None)], tol=1e-14)
        found = loss(np.array([*fit.slopes.tolist(), float(fit.intercept)]))
        assert found <= peer.fun + 1e-12
        assert found >= peer.fun - 1e-7
        seen += bool((fit.slopes == 0.0).any())
    assert 0 < seen < 12


def test_intercept_of_constant_rows_solves_the_base_rate():
    platt = Platt()
    platt.fit(torch.full((10,), 2.0, dtype=F64), torch.arange(10) < 7)
    assert float(platt.intercept) == pytest.approx(math.log(7 / 3) - 2.0)
