from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from calib_lightning.posthoc.scaling_binning import ScalingBinning, mean_log_odds

F64 = torch.float64


def sample(n=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_odds = 2 * torch.randn(n, generator=generator, dtype=F64) + 1
    return log_odds, torch.rand(n, generator=generator) < torch.sigmoid(0.5 * log_odds)


@pytest.mark.parametrize("n_bins", [1, 4, 15])
def test_agrees_with_a_loop(n_bins):
    log_odds, hits = sample()
    x = log_odds.numpy()
    platt = LogisticRegression(C=1e10, tol=1e-12, max_iter=10_000).fit(x[:, None], hits.numpy())
    g = platt.predict_proba(x[:, None])[:, 1]
    expected = np.empty(len(x))
    for rows in np.array_split(np.argsort(g), n_bins):
        expected[rows] = g[rows].mean()
    binning = ScalingBinning(n_bins)
    assert binning.fit(log_odds, hits).converged
    assert torch.sigmoid(binning(log_odds)).numpy() == pytest.approx(expected, abs=1e-5)


def test_split_uses_each_row_once():
    log_odds, hits = sample()
    binning = ScalingBinning(5, split=True)
    binning.fit(log_odds, hits)
    parts = binning._thirds(log_odds)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(300))
    scaled, parted, averaged = (part.numpy() for part in parts)
    x = log_odds.numpy()
    platt = LogisticRegression(C=1e10, tol=1e-12, max_iter=10_000).fit(x[scaled, None], hits.numpy()[scaled])
    g = platt.predict_proba(x[:, None])[:, 1]
    groups = np.array_split(np.sort(x[parted]), 5)
    edges = np.array([(a[-1] + b[0]) / 2 for a, b in pairwise(groups)])
    index = np.searchsorted(edges, x)
    means = np.array([g[averaged][index[averaged] == m].mean() for m in range(5)])
    assert torch.sigmoid(binning(log_odds)).numpy() == pytest.approx(means[index], abs=1e-5)


def test_split_is_the_same_again():
    log_odds, hits = sample()
    one, other = ScalingBinning(split=True), ScalingBinning(split=True)
    one.fit(log_odds, hits)
    other.fit(log_odds, hits)
    assert torch.equal(one(log_odds), other(log_odds))


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_few_rows_give_finite_values(n):
    log_odds, hits = sample(n)
    for split in (False, True):
        binning = ScalingBinning(split=split)
        binning.fit(log_odds, hits)
        assert binning(torch.tensor([-1e4, 0.0, 1e4])).isfinite().all()


def test_all_hits_are_at_the_bound():
    log_odds, hits = sample()
    assert ScalingBinning().fit(log_odds, torch.ones_like(hits)).at_bound


def test_means_near_one_keep_their_digits():
    log_odds = torch.tensor([40.0, 50.0, -800.0, -900.0], dtype=F64)
    found = mean_log_odds(log_odds, torch.tensor([0, 0, 2, 2]), 3)
    assert float(found[0]) == pytest.approx(-np.log((np.exp(-40.0) + np.exp(-50.0)) / 2))
    assert found[1].isnan()
    assert float(found[2]) == pytest.approx(-800.0 - np.log(2))
