"""Histogram binning (Zadrozny and Elkan, 2001): the frequency of the event in each bin."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import BinaryCalibrator, bounded_log_odds
from calib_lightning.posthoc.fit_report import Optimum


def equal_width_edges(n_bins: int) -> Tensor:
    """Log-odds ``(M - 1,)`` float64 of the inner edges ``1/M .. (M-1)/M`` of M bins of equal width."""
    upto = torch.arange(1, n_bins, dtype=torch.float64)
    return torch.log(upto) - torch.log(n_bins - upto)


def equal_mass_edges(values: Tensor, n_bins: int) -> Tensor:
    """Inner edges of at most M bins ``(lo, hi]`` with numbers of values as equal as ties allow, and none empty.

    An edge lies halfway between the values it separates; equal values stay together, in the lower bin.
    """
    ordered = values.sort().values
    rows = len(ordered)
    # First rows of groups whose sizes differ by one at most, larger ones first; with few rows some groups are empty.
    number = torch.arange(1, n_bins, device=values.device)
    first = number * (rows // n_bins) + number.clamp_max(rows % n_bins)
    first = first[(first > 0) & (first < rows)]
    last = torch.unique_consecutive(ordered[first - 1])
    last = last[last < ordered[-1]]
    following = ordered[torch.searchsorted(ordered, last, right=True)]
    halfway = last + 0.5 * (following - last)
    return torch.where(halfway < following, halfway, last)


class Binned(BinaryCalibrator):
    """One value per bin ``(lo, hi]`` of the log-odds.

    The fit of a subclass assigns the inner edges ``(M - 1,)`` and the calibrated log-odds ``(M,)`` of the bins.
    """

    edges: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("edges", "values")

    def transform(self, log_odds: Tensor) -> Tensor:
        """Look up the bin's value; see `BinaryCalibrator.transform`."""
        if len(self.values) == 1:  # ONNX cannot look up without edges
            values = self.values.expand_as(log_odds)
        else:
            values = self.values[torch.bucketize(log_odds, self.edges)]
        # nan sorts into the last bin, so a broken row would be the most confident one.
        return torch.where(log_odds.isnan(), log_odds, values)


def check_bins(n_bins: int) -> int:
    """Return a number of bins, or raise ``ValueError`` unless it is an integer >= 1."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"n_bins is {n_bins!r}; it must be an integer >= 1. 15 is the usual value.")
    return n_bins


class HistogramBinning(Binned):
    """Histogram binning (Zadrozny and Elkan, 2001): the value of a bin ``(lo, hi]`` is the fraction of hits in it.

    The value of an empty bin is its centre.

    Args:
        n_bins: Number of bins M.
        equal_mass: Whether the bins have equal numbers of rows instead of equal widths in probability.

    Raises:
        ValueError: ``n_bins`` is not an integer >= 1.

    Deviations: Values are kept between 1e-6 and ``1 - 1e-6``, so that no outcome has probability 0.

    Example:
        >>> binning = HistogramBinning(2)
        >>> _ = binning.fit(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([True, True, False, True]))
        >>> torch.sigmoid(binning(torch.tensor([-9.0, 9.0])))
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """

    def __init__(self, n_bins: int = 15, equal_mass: bool = False) -> None:
        super().__init__()
        self.n_bins, self.equal_mass = check_bins(n_bins), equal_mass

    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Count the hits in each bin; see `BinaryCalibrator.fit_rows`."""
        if self.equal_mass:
            edges = equal_mass_edges(log_odds, self.n_bins)
        else:
            edges = equal_width_edges(self.n_bins).to(log_odds.device)
        bins = len(edges) + 1
        index = torch.bucketize(log_odds, edges)
        rows = torch.bincount(index, minlength=bins)
        # Only bins of equal width can be empty.
        centre = (torch.arange(bins, device=log_odds.device) + 0.5) / bins
        share = torch.bincount(index, hits.double(), minlength=bins) / rows.clamp_min(1)
        self.edges, self.values = edges, bounded_log_odds(torch.where(rows > 0, share, centre))
        return Optimum()
