"""The scaling-binning calibrator (Kumar, Liang and Ma, 2019): Platt scaling, averaged within bins."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import log_sigmoid
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.histogram_binning import Binned, check_bins, equal_mass_edges
from calib_lightning.posthoc.platt import fit_logistic
from calib_lightning.utils.seeding import row_uniform

_COMMON = 3


def mean_log_odds(log_odds: Tensor, index: Tensor, bins: int) -> Tensor:
    """Log-odds ``(M,)`` of the mean probability of each bin, without saturation; nan for empty bins."""
    rows = torch.bincount(index, minlength=bins)
    # Relative to the largest term of a bin no sum can underflow.
    above, below = (_log_sum(log_sigmoid(side), index, bins) for side in (log_odds, -log_odds))
    return torch.where(rows > 0, above - below, torch.nan)


def _log_sum(terms: Tensor, index: Tensor, bins: int) -> Tensor:
    """Logarithm of the sum of ``exp(terms)`` in each bin."""
    largest = terms.new_full((bins,), -torch.inf).scatter_reduce(0, index, terms, "amax")
    return largest + torch.log(terms.new_zeros(bins).scatter_add(0, index, torch.exp(terms - largest[index])))


class ScalingBinning(Binned):
    """The scaling-binning calibrator (Kumar et al., 2019): the value of a bin is the mean of a Platt scaling g in it.

    It fits g, divides its values into bins of equal mass, and averages g, not the labels, in each bin. The mean of g
    varies less than the fraction of hits, and the calibration error can be measured since there are few values.

    Args:
        n_bins: Number of bins M for events of at least a third of the rows. A rarer event gets more in proportion,
            since otherwise all rows that name the class would share a value, and `OneVsRest` would lose it.
        split: Use a separate third of the rows for each step, as the paper's theorem requires, instead of all rows for
            all steps, as in the authors' code. The thirds are drawn by position with a fixed seed.

    Raises:
        ValueError: ``n_bins`` is not an integer >= 1.

    Deviations: The authors use M bins for events of any frequency. Edges lie halfway in log-odds, not in probability.
    With ``split``, a bin that has no rows in the last third uses the mean over the second; fewer than three rows are
    not split.

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
        """Fit g and average it in bins; see `BinaryCalibrator.fit_rows`."""
        scaled, parted, averaged = self._thirds(log_odds)
        fit = fit_logistic(log_odds[scaled].unsqueeze(1), log_odds[scaled], hits[scaled], intercept=True)
        # g is non-decreasing, so bins of the log-odds are bins of g.
        bins = max(self.n_bins, self.n_bins * len(hits) // (_COMMON * max(1, int(hits.sum()))))
        edges = equal_mass_edges(log_odds[parted], bins)
        index, g = torch.bucketize(log_odds, edges), fit.slopes[0] * log_odds + fit.intercept
        values = mean_log_odds(g[averaged], index[averaged], len(edges) + 1)
        fallback = mean_log_odds(g[parted], index[parted], len(edges) + 1)
        self.edges, self.values = edges, torch.where(values.isnan(), fallback, values)
        return fit.optimum

    def _thirds(self, log_odds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the three steps."""
        rows = torch.arange(len(log_odds), device=log_odds.device)
        if not self.split or len(rows) < 3:
            return rows, rows, rows
        first, second, third = row_uniform(rows, 1, seed=0).squeeze(1).argsort().tensor_split(3)
        return first, second, third
