import numpy as np
import pytest
import torch

from calib_lightning.posthoc.histogram_binning import HistogramBinning, equal_mass_edges
from tests.metrics.golden import EDGE_CONFIDENCE, EDGE_CORRECT

F64 = torch.float64


def sample(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_odds = 2 * torch.randn(n, generator=generator, dtype=F64) + 1
    return log_odds, torch.rand(n, generator=generator) < torch.sigmoid(0.5 * log_odds)


@pytest.mark.parametrize("n_bins", [1, 2, 7, 15])
def test_equal_width_agrees_with_a_loop(n_bins):
    log_odds, hits = sample(80)
    probs = 1 / (1 + np.exp(-log_odds.numpy()))
    binning = HistogramBinning(n_bins)
    binning.fit(log_odds, hits)
    where = np.linspace(0.001, 0.999, 500)
    expected = []
    for p in where:
        for m in range(n_bins):
            low, high = m / n_bins, (m + 1) / n_bins
            if low < p <= high:
                inside = (probs > low) & (probs <= high)
                expected.append(hits.numpy()[inside].mean() if inside.any() else (low + high) / 2)
    found = torch.sigmoid(binning(torch.from_numpy(np.log(where / (1 - where)))))
    assert found.numpy() == pytest.approx(np.array(expected), abs=1.01e-6)


def test_edges_belong_to_the_lower_bin():
    # Two bins meet at one half, and log-odds of 0 are exactly that.
    binning = HistogramBinning(2)
    binning.fit(torch.tensor([-1.0, 0.0, 1.0], dtype=F64), torch.tensor([False, True, True]))
    assert float(torch.sigmoid(binning(torch.zeros(1)))) == pytest.approx(0.5)


def test_certain_rows_go_to_the_outer_bins():
    inner = torch.tensor(EDGE_CONFIDENCE, dtype=F64)
    log_odds = inner.clamp(1e-20, 1.0).logit().clamp(-100, 100)
    hits = torch.tensor(EDGE_CORRECT) > 0
    binning = HistogramBinning(2)
    binning.fit(log_odds, hits)
    upper = inner > 0.5
    expected = torch.stack([hits[~upper].double().mean(), hits[upper].double().mean()])
    torch.testing.assert_close(torch.sigmoid(binning(torch.tensor([-1e4, 1e4]))), expected)


@pytest.mark.parametrize(("n", "n_bins"), [(100, 15), (100, 7), (9, 15), (1, 4)])
def test_equal_mass_agrees_with_array_split(n, n_bins):
    log_odds, hits = sample(n)
    binning = HistogramBinning(n_bins, equal_mass=True)
    binning.fit(log_odds, hits)
    order = np.argsort(log_odds.numpy())
    expected = np.empty(n)
    for rows in np.array_split(order, n_bins):
        if len(rows):
            expected[rows] = hits.numpy()[rows].mean()
    assert torch.sigmoid(binning(log_odds)).numpy() == pytest.approx(expected, abs=1.01e-6)


@pytest.mark.parametrize("seed", range(20))
def test_equal_mass_bins_are_never_empty(seed):
    values = torch.randint(6, (30,), generator=torch.Generator().manual_seed(seed)).double()
    # Neighbours in floating point: halfway between them is one of them.
    values = torch.where(
        values == 3, torch.nextafter(torch.tensor(2.0, dtype=F64), torch.tensor(3.0, dtype=F64)), values
    )
    for n_bins in (2, 5, 29, 40):
        edges = equal_mass_edges(values, n_bins)
        assert (edges.diff() > 0).all()
        assert (torch.bincount(torch.bucketize(values, edges), minlength=len(edges) + 1) > 0).all()


def test_equal_mass_of_one_score_is_one_bin():
    binning = HistogramBinning(equal_mass=True)
    binning.fit(torch.full((10,), 2.0, dtype=F64), torch.arange(10) < 3)
    torch.testing.assert_close(torch.sigmoid(binning(torch.tensor([-5.0, 5.0]))), torch.tensor([0.3, 0.3], dtype=F64))


def test_the_input_is_not_changed():
    log_odds, hits = sample()
    binning = HistogramBinning()
    binning.fit(log_odds, hits)
    before = log_odds.clone()
    binning(log_odds)
    assert torch.equal(before, log_odds)


@pytest.mark.parametrize("n_bins", [0, -1, 2.0, True])
def test_a_wrong_number_of_bins_is_refused(n_bins):
    with pytest.raises(ValueError, match="an integer >= 1"):
        HistogramBinning(n_bins)
