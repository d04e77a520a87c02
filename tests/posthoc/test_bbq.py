import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta

from calib_lightning.posthoc.bbq import BBQ, binning_model

F64 = torch.float64


def sample(n=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_odds = 2 * torch.randn(n, generator=generator, dtype=F64) + 1
    return log_odds, torch.rand(n, generator=generator) < torch.sigmoid(0.5 * log_odds)


def test_marginal_likelihood_is_an_integral():
    log_odds, hits = sample(12)
    edges = torch.tensor([0.0, 1.5], dtype=F64)
    model = binning_model(log_odds, hits, edges)
    p = 1 / (1 + np.exp(-log_odds.numpy()))
    borders = [0.0, 0.5, 1 / (1 + math.exp(-1.5)), 1.0]
    total = 0.0
    for b, (low, high) in enumerate(pairwise(borders)):
        inside = (p > low) & (p <= high)
        n, m = inside.sum(), (hits.numpy() & inside).sum()
        middle = (low + high) / 2
        prior = beta(2 / 3 * middle, 2 / 3 * (1 - middle))

        # In the angle the prior's poles at 0 and 1 are mild.
        def moment(power, n=n, m=m, prior=prior):
            def weighed(t):
                p = math.sin(t) ** 2
                return p ** (m + power) * (1 - p) ** (n - m) * prior.pdf(p) * math.sin(2 * t)

            return quad(weighed, 0, math.pi / 2, limit=500)[0]

        evidence = moment(0)
        mean = moment(1) / evidence
        assert float(model.probs[b]) == pytest.approx(mean, rel=1e-3)
        total += math.log(evidence)
    assert model.score == pytest.approx(total, abs=3e-3)


def test_is_the_weighted_mean_of_its_binnings():
    log_odds, hits = sample()
    ordered = np.sort(log_odds.numpy())
    where = torch.linspace(-6, 8, 400, dtype=F64)
    values, scores = [], []
    for size in range(1, math.ceil(10 * 300 ** (1 / 3)) + 1):
        groups = np.array_split(ordered, size)
        edges = np.array([(a[-1] + b[0]) / 2 for a, b in pairwise(groups)])
        model = binning_model(log_odds, hits, torch.from_numpy(edges).double())
        values.append(model.probs.numpy()[np.searchsorted(edges, where.numpy())])
        scores.append(model.score)
    weights = np.exp(np.array(scores) - max(scores))
    expected = (weights[:, None] * values).sum(axis=0) / weights.sum()
    bbq = BBQ()
    optimum = bbq.fit(log_odds, hits)
    assert torch.sigmoid(bbq(where)).numpy() == pytest.approx(expected, abs=1e-4)
    assert optimum.passes == len(scores)


def test_finds_a_known_distortion():
    log_odds, hits = sample(5000)
    bbq = BBQ()
    bbq.fit(log_odds, hits)
    truth = torch.sigmoid(0.5 * log_odds)
    before = (torch.sigmoid(log_odds) - truth).abs().mean()
    # It takes few wide steps, so that the steps themselves are most of the error.
    assert float((torch.sigmoid(bbq(log_odds)) - truth).abs().mean()) < 0.5 * float(before)


@pytest.mark.parametrize("n", [1, 2, 10])
@pytest.mark.parametrize("hit", [True, False])
def test_few_rows_of_one_outcome(n, hit):
    log_odds, _ = sample(n)
    for rows in (log_odds, torch.zeros(n, dtype=F64)):
        bbq = BBQ()
        bbq.fit(rows, torch.full((n,), hit))
        probs = torch.sigmoid(bbq(torch.cat([rows, torch.tensor([-1e5, 1e5], dtype=F64)])))
        assert ((probs > 0) & (probs < 1)).all()
        assert ((probs[0] > 0.5) if hit else (probs[0] < 0.5)).all()
