"""Spline calibration (Gupta et al., 2021): the derivative of a smooth fit to the cumulative gap."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from torch import Tensor

from calib_lightning.posthoc.binary import BinaryCalibrator, bounded_log_odds, interpolate
from calib_lightning.posthoc.fit_report import Optimum

_MOST_POINTS = 1024
_ROWS_A_KNOT = 16


def spline_slope(gap: NDArray[np.float64], knots: int) -> NDArray[np.float64]:
    """Slope ``(N,)`` of the natural cubic spline fitted by least squares to ``h(i / N) = sum_{j <= i} gap_j / N``.

    The spline has equally spaced knots on ``[0, 1]``; its slope is read at the middle ``(i - 1/2) / N`` of each step.
    """
    rows = len(gap)
    # Natural splines are linear in their values at the knots: one column per knot.
    basis = CubicSpline(np.linspace(0.0, 1.0, knots), np.eye(knots), bc_type="natural")  # type: ignore[no-untyped-call]
    cumulative = np.concatenate([[0.0], np.cumsum(gap) / rows])
    values = np.linalg.lstsq(basis(np.linspace(0.0, 1.0, rows + 1)), cumulative, rcond=None)[0]
    slope: NDArray[np.float64] = basis((np.arange(rows) + 0.5) / rows, 1) @ values
    return slope


class Spline(BinaryCalibrator):
    """Spline calibration (Gupta et al., 2021): ``p + h'(t)``, h a natural cubic spline through the cumulative gap.

    With the rows sorted by p, t is the fraction of rows up to a score and ``h(t)`` the sum of ``(hit - p) / N`` over
    these rows, fitted by least squares. The result is linear in p between scores and constant outside. It need not
    increase with p.

    Args:
        knots: Number of equally spaced knots on ``[0, 1]``, at least 2. With fewer than 16 rows per knot fewer knots
            are used; two knots shift all probabilities by the mean gap.

    Raises:
        ValueError: ``knots`` is not an integer >= 2.

    Deviations: Equal scores get the mean of their results; the authors' code fails on them. The slope is read in the
    middle of a row's step, and h is 0 before the first row. At most 1024 points are kept, at equal steps of the rank.
    The authors cut at 0 and 1. A piece of the spline has n = N / (knots - 1) rows, which cannot tell probabilities
    below ``f = 1 / (n + 2)`` from 0: a result below f is raised to f, or to p if p is lower; likewise near 1. Cutting
    at 0 made classes impossible that the network had given 1 %. Values are kept between 1e-6 and ``1 - 1e-6``.

    Example:
        >>> log_odds = torch.zeros(40)
        >>> spline = Spline()
        >>> _ = spline.fit(log_odds, torch.arange(40) % 4 > 0)
        >>> torch.sigmoid(spline(torch.zeros(1)))
        tensor([0.7500], dtype=torch.float64)
    """

    scores: Tensor
    values: Tensor

    def __init__(self, knots: int = 6) -> None:
        super().__init__()
        if isinstance(knots, bool) or not isinstance(knots, int) or knots < 2:
            raise ValueError(f"knots is {knots!r}; it must be an integer >= 2. 6 is the usual value.")
        self.knots = knots
        self.register_state("scores", "values")

    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Fit the spline; see `BinaryCalibrator.fit_rows`."""
        probs = torch.sigmoid(log_odds).cpu().numpy()
        # Equal scores share their hits, so that their order does not matter.
        scores, tied, counts = np.unique(probs, return_inverse=True, return_counts=True)
        share = np.bincount(tied, hits.double().cpu().numpy()) / counts
        knots = min(self.knots, max(2, len(probs) // _ROWS_A_KNOT))
        slope = spline_slope(np.repeat(share - scores, counts), knots)
        values = scores + np.bincount(np.repeat(np.arange(len(scores)), counts), slope) / counts
        # The rule of succession in a piece without hits: rarer hits cannot be told from none.
        pieces = knots - 1
        finest = pieces / (len(probs) + 2 * pieces)
        values = values.clip(np.minimum(scores, finest), np.maximum(scores, 1.0 - finest))
        if len(scores) > _MOST_POINTS:
            rank = np.linspace(0, len(probs) - 1, _MOST_POINTS).round().astype(np.int64)
            kept = np.unique(np.repeat(np.arange(len(scores)), counts)[rank])
            scores, values = scores[kept], values[kept]
        if len(scores) == 1:
            scores, values = np.append(scores, 2.0), np.repeat(values, 2)
        self.scores = torch.from_numpy(scores).to(log_odds)
        self.values = torch.from_numpy(values).to(log_odds)
        few = f"{len(probs)} rows are few for a spline: only {knots} of {self.knots} knots were used"
        return Optimum(notes=(few,) if knots < self.knots else ())

    def transform(self, log_odds: Tensor) -> Tensor:
        """Interpolate; see `BinaryCalibrator.transform`."""
        return bounded_log_odds(interpolate(torch.sigmoid(log_odds), self.scores, self.values))
