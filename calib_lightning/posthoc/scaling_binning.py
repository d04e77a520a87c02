"""The scaling-binning calibrator (Kumar, Liang and Ma, 2019): Platt scaling, rounded to its mean in bins."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import log_sigmoid
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.histogram_binning import Binned, check_bins, equal_mass_edges
from calib_lightning.posthoc.platt import fit_logistic
from calib_lightning.utils.seeding import row_uniform


def mean_log_odds(log_odds: Tensor, index: Tensor, bins: int) -> Tensor:
    """Log-odds of the mean probability of each bin, from the sums of p and of ``1 - p``, so that neither saturates.

    Args:
        log_odds: ``(N,)`` float64.
        index: Bin of each row, ``(N,)`` int64.
        bins: M.

    Returns:
        ``(M,)`` float64; nan for bins without rows.
    """
    rows = torch.bincount(index, minlength=bins)
    # Relative to a bin's largest, which is some log p: no sum can underflow.
    hits, misses = (_log_sum(log_sigmoid(side), index, bins) for side in (log_odds, -log_odds))
    return torch.where(rows > 0, hits - misses, torch.nan)


def _log_sum(terms: Tensor, index: Tensor, bins: int) -> Tensor:
    largest = terms.new_full((bins,), -torch.inf).scatter_reduce(0, index, terms, "amax")
    return largest + torch.log(terms.new_zeros(bins).scatter_add(0, index, torch.exp(terms - largest[index])))


class ScalingBinning(Binned):
    """The scaling-binning calibrator (Kumar et al., 2019): the value of a bin is the mean of a Platt scaling g in it.

    Three steps: fit g; part its values into bins of equal mass; average g, not the labels, in each bin. The mean of g
    varies less than the share of hits, and the calibration error of the result can be measured, as it has few values.

    Args:
        n_bins: M, number of bins.
        split: Whether each step has a third of the rows to itself, as the paper's theorem asks; else all steps use all
            rows, as the authors' code does. The thirds are drawn by position with a fixed seed.

    Raises:
        ValueError: ``n_bins`` is not a whole number from 1 on.

    Deviations: Edges lie halfway in log-odds, not in probability. With ``split``, a bin without rows in the last third
    takes the mean over the second; with fewer than three rows nothing is split.

    Example:
        >>> log_odds = torch.linspace(-2, 2, 100)
        >>> binning = ScalingBinning(n_bins=4)
        >>> _ = binning.fit(log_odds, (log_odds > 0) | (torch.arange(100) % 3 > 0))
        >>> binning(log_odds).unique().shape
        torch.Size([4])
    """

    def __init__(self, n_bins: int = 15, split: bool = False) -> None:
        super().__init__()
        self.n_bins, self.split = check_bins(n_bins), split

    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Do the three steps; see `BinaryCalibrator.fit_rows`."""
        scaled, parted, averaged = self._thirds(log_odds)
        fit = fit_logistic(log_odds[scaled].unsqueeze(1), log_odds[scaled], hits[scaled], intercept=True)
        # g does not fall, so that bins of the log-odds are bins of g.
        edges = equal_mass_edges(log_odds[parted], self.n_bins)
        index, g = torch.bucketize(log_odds, edges), fit.slopes[0] * log_odds + fit.intercept
        values = mean_log_odds(g[averaged], index[averaged], len(edges) + 1)
        fallback = mean_log_odds(g[parted], index[parted], len(edges) + 1)
        self.edges, self.values = edges, torch.where(values.isnan(), fallback, values)
        return fit.optimum

    def _thirds(self, log_odds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.arange(len(log_odds), device=log_odds.device)
        if not self.split or len(rows) < 3:
            return rows, rows, rows
        first, second, third = row_uniform(rows, 1, seed=0).squeeze(1).argsort().tensor_split(3)
        return first, second, third
