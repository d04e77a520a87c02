import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from calib_lightning.posthoc.isotonic import Isotonic, isotonic_knots

F64 = torch.float64


def sample(n=500, seed=0, digits=None):
    generator = torch.Generator().manual_seed(seed)
    log_odds = 2 * torch.randn(n, generator=generator, dtype=F64)
    if digits is not None:
        log_odds = torch.round(log_odds, decimals=digits)
    return log_odds, torch.rand(n, generator=generator) < torch.sigmoid(0.5 * log_odds)


@pytest.mark.parametrize("digits", [None, 1])
def test_agrees_with_scikit_learn(digits):
    log_odds, hits = sample(digits=digits)
    peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(log_odds.numpy(), hits.numpy())
    isotonic = Isotonic()
    isotonic.fit(log_odds, hits)
    where = torch.linspace(-20, 20, 999, dtype=F64)
    for x in (log_odds, where):
        assert torch.sigmoid(isotonic(x)).numpy() == pytest.approx(peer.predict(x.numpy()), abs=1.01e-6)


def test_pools_violators_as_a_quadratic_loop_does():
    log_odds, hits = sample(60, digits=0)
    scores = log_odds.unique()
    # The maximum over starts of the minimum over ends of the mean in between (Robertson, Wright and Dykstra, 1988).
    expected = []
    for score in scores:
        starts, ends = scores[scores <= score], scores[scores >= score]
        means = [[float(hits[(log_odds >= a) & (log_odds <= b)].double().mean()) for b in ends] for a in starts]
        expected.append(np.max(np.min(means, axis=1)))
    isotonic = Isotonic()
    isotonic.fit(log_odds, hits)
    assert torch.sigmoid(isotonic(scores)).numpy() == pytest.approx(np.array(expected), abs=1.01e-6)


def test_equal_scores_are_pooled_whatever_their_order():
    log_odds, hits = sample(digits=0)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    one, other = Isotonic(), Isotonic()
    one.fit(log_odds, hits)
    other.fit(log_odds[order], hits[order])
    torch.testing.assert_close(one(log_odds), other(log_odds), rtol=0, atol=1e-12)


def test_the_order_of_rows_on_a_step_is_kept():
    isotonic = Isotonic()
    isotonic.fit(torch.linspace(-1, 1, 10, dtype=F64), torch.arange(10) % 2 == 0)
    assert (isotonic(torch.linspace(-3, 3, 100, dtype=F64)).diff() > 0).all()


@pytest.mark.parametrize("hit", [True, False])
def test_one_row_and_one_outcome_stay_inside(hit):
    for log_odds in (torch.zeros(1, dtype=F64), torch.linspace(-2, 2, 9, dtype=F64)):
        isotonic = Isotonic()
        isotonic.fit(log_odds, torch.full((len(log_odds),), hit))
        probs = torch.sigmoid(isotonic(torch.tensor([-1e5, -800.0, 0.0, 800.0, 1e5], dtype=F64)))
        assert ((probs > 0) & (probs < 1)).all()
        assert ((probs > 0.99) if hit else (probs < 0.01)).all()


def test_knots_of_one_score_are_two():
    knots, values = isotonic_knots(torch.full((4,), 2.0, dtype=F64), torch.tensor([True, False, True, True]))
    assert (knots.diff() > 0).all()
    assert values.tolist() == [0.75, 0.75]
