"""Temperature scaling with the temperature of lowest calibration error on a grid."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from calib_lightning.metrics.functional.bins import bin_index, check_n_bins, sums_in_bins
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.metrics.functional.temperature import search_inverse_temperature
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.temperature import _Tempered

_BLOCK = 2**16
_ROWS = 2**12
_TOGETHER = 64
_LARGEST_CELL = 256
_LOG2_E = math.log2(math.e)
_NODE_SPACING = 0.05
_ERROR = 1e-6
_TIE = 1e-12
_MOST_TEMPERATURES = 100_000


def grid_ece(logits: Tensor, labels: Tensor, temperatures: Tensor, n_bins: int = 15) -> Tensor:
    """ECE ``(J,)`` in float64 of ``softmax(z / T)`` for temperatures ``(J,)``, as `metrics.functional.ece` gives it."""
    scales = (_LOG2_E / temperatures).tolist()
    correct = Rows(logits, labels, None, "logits").correct
    sums = _Sums(len(scales), n_bins, logits)
    step = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(labels), step):
        wide = logits[start : start + step].double()
        shifted = wide - wide.amax(dim=-1, keepdim=True)
        odds = torch.empty_like(shifted)
        for first in range(0, len(scales), _TOGETHER):
            some = scales[first : first + _TOGETHER]
            totals = torch.stack([torch.mul(shifted, scale, out=odds).exp2_().sum(dim=-1) for scale in some])
            sums.add(first, totals.reciprocal_(), correct[start : start + step])
    return sums.ece(len(labels))


def grid_ece_interpolated(logits: Tensor, labels: Tensor, temperatures: Tensor, n_bins: int = 15) -> Tensor:
    """Compute `grid_ece` for an evenly spaced grid, accurate to about 1e-8, with most confidences interpolated.

    With d the gaps between the predicted class and the others, ``f(T) = -T logsumexp(-d / T)`` is T times the log-odds
    of the confidence. It is smooth in T, and its slope is minus the entropy of the other classes. Both are computed at
    temperatures 5 % apart, with cubic interpolation of f in between.
    """
    nodes = _nodes(temperatures)
    correct = Rows(logits, labels, None, "logits").correct
    sums = _Sums(len(temperatures), n_bins, logits)
    for rows, own in zip(torch.split(logits, _ROWS), torch.split(correct, _ROWS), strict=True):
        value, slope = _scaled_log_odds(rows, temperatures[nodes])
        for cell, (first, last) in enumerate(pairwise(nodes)):
            width = temperatures[last] - temperatures[first]
            inside = temperatures[first:last, None]
            rise = value[cell + 1] - value[cell]
            left, right = width * slope[cell], width * slope[cell + 1]
            powers = torch.cat([((inside - inside[0]) / width) ** p for p in range(4)], dim=1)
            factors = torch.stack([value[cell], left, 3.0 * rise - 2.0 * left - right, left + right - 2.0 * rise])
            sums.add(first, torch.sigmoid((powers / inside) @ factors), own)
        sums.add(nodes[-1], torch.sigmoid(value[-1:] / temperatures[-1]), own)
    return sums.ece(len(labels))


def _nodes(temperatures: Tensor) -> list[int]:
    """Indices of the temperatures at which f is computed."""
    step, nodes = float(temperatures[0]), [0]
    while nodes[-1] < len(temperatures) - 1:
        ahead = int(_NODE_SPACING * float(temperatures[nodes[-1]]) / step)
        nodes.append(min(nodes[-1] + min(max(ahead, 1), _LARGEST_CELL), len(temperatures) - 1))
    return nodes


def _scaled_log_odds(logits: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """``f(T)`` and its slope, each ``(J, N)`` float64."""
    parts = []
    for some in torch.split(logits, max(1, _BLOCK // logits.shape[1])):
        # The other classes relative to the runner-up, so that nothing underflows.
        wide = some.double()
        top, index = wide.max(dim=-1, keepdim=True)
        others = wide.scatter(-1, index, -torch.inf)
        second = others.amax(dim=-1, keepdim=True)
        below = others.sub_(second).clamp_min_(-1e300)
        odds, totals, moments = torch.empty_like(below), [], []
        for temperature in temperatures.tolist():
            torch.mul(below, _LOG2_E / temperature, out=odds).exp2_()
            totals.append(odds.sum(dim=-1))
            moments.append(odds.mul_(below).sum(dim=-1))
        total, moment, column = torch.stack(totals), torch.stack(moments), temperatures[:, None]
        log_total = torch.log(total)
        gap = (top - second).squeeze(-1)
        parts.append(torch.stack([gap - column * log_total, moment / (column * total) - log_total]))
    value, slope = torch.cat(parts, dim=2).unbind()
    return value, slope


class _Sums:
    """Sums of correctness less confidence in the bins of each temperature."""

    def __init__(self, temperatures: int, n_bins: int, like: Tensor) -> None:
        self.bins = torch.zeros(temperatures, n_bins, dtype=torch.float64, device=like.device)

    def add(self, first: int, confidence: Tensor, correct: Tensor) -> None:
        """Add rows with confidences ``(J, N)`` at J temperatures, starting with number ``first``."""
        count, n_bins = len(confidence), self.bins.shape[1]
        index = bin_index(confidence.flatten(), n_bins).view(confidence.shape)
        index += n_bins * torch.arange(count, device=index.device)[:, None]
        gaps = (correct.double() - confidence).flatten()
        self.bins[first : first + count] += sums_in_bins(index.flatten(), count * n_bins, [gaps]).view(count, n_bins)

    def ece(self, rows: int) -> Tensor:
        """Expected calibration errors ``(J,)``."""
        return self.bins.abs().sum(dim=1) / rows


class ECETemperature(_Tempered):
    """Temperature scaling with the T of lowest expected calibration error on a grid.

    ``q = softmax(z / T)``, T in ``step, 2 step, ..., largest``. The grid is evaluated on the calibration rows, so the
    reported ECE is the lowest of thousands and better than that of new rows. Of several T with the lowest ECE, the one
    closest in log T to the maximum likelihood T is used.

    By default the confidences are computed for temperatures 5 % apart and interpolated in between, accurate to about
    1e-8; then the ECE of all temperatures that could be best is computed exactly.

    Args:
        step: Distance between temperatures, and the first temperature.
        largest: The last temperature.
        n_bins: Number of equal-width bins M.
        exhaustive: Whether to compute every ECE exactly, which takes up to ten times as long.

    Raises:
        ValueError: An argument out of range.

    Deviations: the code of Mukhoti et al. (2020) uses ``step=0.1, largest=10.0``, and the smallest of several best T.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> round(ECETemperature().fit(logits, torch.tensor([0, 0, 0, 0])).temperature, 3)
        1.82
    """

    def __init__(self, step: float = 0.001, largest: float = 5.0, n_bins: int = 15, exhaustive: bool = False) -> None:
        super().__init__()
        if not 0.0 < step <= largest < math.inf:
            raise ValueError(f"step is {step!r} and largest {largest!r}; it must be 0 < step <= largest < inf.")
        if largest / step > _MOST_TEMPERATURES:
            raise ValueError(
                f"largest / step is {largest / step:,.0f}; it must be at most {_MOST_TEMPERATURES:,}. Raise step."
            )
        check_n_bins(n_bins)
        self.step, self.largest, self.n_bins, self.exhaustive = step, largest, n_bins, exhaustive

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Find T; see `Calibrator.fit_rows`."""
        count = math.floor(self.largest / self.step + 1e-9)
        grid = self.step * torch.arange(1, count + 1, dtype=torch.float64, device=logits.device)
        tried, passes = grid, count
        if not self.exhaustive:
            near = grid_ece_interpolated(logits, labels, grid, self.n_bins)
            # A confidence next to an edge may be in the wrong bin, which changes the ECE by at most 2 / N.
            tried = grid[near <= near.min() + _ERROR + 4.0 / len(labels)]
            passes = len(_nodes(grid)) + len(tried)
        errors = grid_ece(logits, labels, tried, self.n_bins)
        likely = search_inverse_temperature(logits, labels)
        distance = (tried.log() + math.log(likely.optimum.beta)).abs()
        best = float(tried[distance.masked_fill(errors > errors.min() + _TIE, math.inf).argmin()])
        self.beta = logits.new_tensor(1.0 / best, dtype=torch.float64)
        return Optimum(passes=passes + likely.passes, at_bound=best in (float(grid[0]), float(grid[-1])))
