"""Platt scaling (Platt, 1999): a logistic regression on the log-odds, fitted by exact maximum likelihood."""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import BinaryCalibrator, log_sigmoid
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.solver import CONVERGED

_MOST_STEPS = 100
_MOST_HALVINGS = 40
_ROUNDING = 1e-14
_NEGATIVE = 1e-9
_SEPARATED = (
    "the log-odds separate hits from misses, so the likelihood has no maximum; the smoothed targets of Platt (1999), "
    "(n + 1) / (n + 2) and 1 / (n + 2), were used"
)


class Logistic(NamedTuple):
    """A logistic regression ``sigmoid(columns @ slopes + intercept)`` with slopes ``(P,)`` >= 0."""

    slopes: Tensor
    intercept: Tensor
    optimum: Optimum


def fit_logistic(columns: Tensor, log_odds: Tensor, hits: Tensor, *, intercept: bool) -> Logistic:
    """Logistic regression with slopes >= 0 by exact maximum likelihood.

    Newton's method runs until rounding stops it. If a slope is negative, the best fit with some slopes at zero is used,
    which is the constrained maximum since the problem is convex. A constant column keeps the slope 1. If the likelihood
    has no maximum (hits and misses are separated, or there are none of one kind), the targets are
    ``(n_hits + 1) / (n_hits + 2)`` and ``1 / (n_misses + 2)`` (Platt, 1999). The result is never less likely than
    all slopes 1 and intercept 0.

    Columns must not decrease with the log-odds and, without intercept, must have their sign.
    """
    separated = _separated(log_odds, hits, intercept)
    targets = hits.double()
    if separated:
        targets = torch.where(hits, (hits.sum() + 1) / (hits.sum() + 2), 1 / ((~hits).sum() + 2)).double()
    count = columns.shape[1]
    best = _newton(columns, targets, intercept)
    passes, negative = best.passes, not best.feasible
    if negative:
        kept = [list(rest) for size in range(count) for rest in combinations(range(count), size)]
        parts = [(rest, _newton(columns[:, rest], targets, intercept)) for rest in kept]
        passes += sum(part.passes for _, part in parts)
        # The constant alone is always feasible.
        rest, part = min((pair for pair in parts if pair[1].feasible), key=lambda pair: pair[1].value)
        slopes = torch.zeros_like(best.slopes)
        slopes[rest] = part.slopes
        best = part._replace(slopes=slopes)
    slopes = best.slopes.clamp_min(0.0)
    notes = [_SEPARATED] if separated else []
    if negative:
        notes.append("a slope would be negative and was set to 0")
    start, labels = torch.ones_like(slopes), hits.double()
    constant = best.intercept
    if _loss(columns @ start, labels) < _loss(columns @ slopes + constant, labels):
        slopes, constant = start, torch.zeros_like(constant)
        notes.append("nothing was more likely than the uncalibrated probabilities, so they were kept")
    converged = best.gradient_norm <= CONVERGED
    return Logistic(slopes, constant, Optimum(converged, passes, best.gradient_norm, separated, tuple(notes)))


class _Stop(NamedTuple):
    """Where Newton's method stopped."""

    slopes: Tensor
    intercept: Tensor
    value: float
    gradient_norm: float
    passes: int

    @property
    def feasible(self) -> bool:
        """Whether no slope is negative."""
        return bool((self.slopes >= -_NEGATIVE).all())


def _newton(columns: Tensor, targets: Tensor, intercept: bool) -> _Stop:
    """Maximise the likelihood without constraints."""
    # Columns are centred, so that a slope that the rows cannot tell from the intercept does not change.
    shift = columns.mean(dim=0) if intercept else torch.zeros_like(columns[0])
    design = columns - shift
    constant = design.abs().amax(dim=0) <= 1e-9 * (1.0 + shift.abs())
    design = torch.where(constant, 0.0, design)
    if intercept:
        design = torch.cat([design, torch.ones_like(targets).unsqueeze(1)], dim=1)
    count = columns.shape[1]
    # Where all probabilities are 0 or 1 the Hessian vanishes, so Newton's method starts from scores of about 1; a slope
    # that the rows cannot tell from the intercept stays 1.
    reach = torch.where(constant, 0.0, design[:, :count].abs().amax(dim=0))
    point = torch.cat([1.0 / (1.0 + reach), reach.new_zeros(design.shape[1] - count)])
    point[:count][constant] = 1.0

    def slope_of(point: Tensor) -> tuple[float, Tensor, Tensor]:
        scores = design @ point
        probs = torch.sigmoid(scores)
        return _loss(scores, targets), design.mT @ (probs - targets) / len(targets), probs * (1.0 - probs)

    def norm(gradient: Tensor) -> float:
        return float(gradient.abs().max()) if len(gradient) else 0.0

    (value, gradient, weights), passes = slope_of(point), 1
    for _ in range(_MOST_STEPS):
        if norm(gradient) <= _ROUNDING:
            break
        step = _solve((design * weights.unsqueeze(1)).mT @ design / len(targets), gradient)
        # Shorter steps would change the value by less than its rounding error.
        promised = float(gradient @ step) / (_ROUNDING * (1.0 + value))
        for halvings in range(max(1, min(_MOST_HALVINGS, int(math.log2(max(promised, 1.0))) + 1))):
            following = point - step * 0.5**halvings
            new = slope_of(following)
            passes += 1
            # Near the optimum differences of the value are rounding errors, so the gradient decides.
            near = new[0] <= value + _ROUNDING * (1.0 + value) and norm(new[1]) < norm(gradient)
            if new[0] < value - _ROUNDING * (1.0 + value) or near:
                break
        else:
            break
        point, (value, gradient, weights) = following, new
    slopes = point[:count]
    start = point[count] - slopes @ shift if intercept else torch.zeros((), dtype=torch.float64, device=columns.device)
    return _Stop(slopes, start, value, norm(gradient), passes)


def _solve(hessian: Tensor, gradient: Tensor) -> Tensor:
    """Newton step; directions without curvature get none."""
    # Columns of very different sizes are scaled first.
    scale = hessian.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    scale = torch.where(hessian.diagonal() > 0.0, scale, 0.0)
    inverse = torch.linalg.pinv(hessian * scale * scale.unsqueeze(1), rtol=1e-13, hermitian=True)
    step: Tensor = scale * (inverse @ (scale * gradient))
    return step


def _loss(scores: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy."""
    return -float((targets * log_sigmoid(scores) + (1.0 - targets) * log_sigmoid(-scores)).mean())


def _separated(log_odds: Tensor, hits: Tensor, intercept: bool) -> bool:
    """Whether a threshold separates hits from misses, so that the likelihood has no maximum."""
    above, below = log_odds[hits], log_odds[~hits]
    if not intercept:
        return bool((above >= 0.0).all() and (below <= 0.0).all() and (log_odds != 0.0).any())
    if len(above) == 0 or len(below) == 0:
        return True
    return bool(above.min() >= below.max() and log_odds.max() > log_odds.min())


class Platt(BinaryCalibrator):
    """Platt scaling (Platt, 1999), ``sigmoid(w l + b)`` of the log-odds l, ``w >= 0``.

    Deviations: The paper fits scores of a support vector machine and always smooths the targets; here targets are
    smoothed only if the likelihood has no maximum otherwise. A negative slope would reverse the order of the rows and
    is set to 0.

    Example:
        >>> log_odds = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 0.0])
        >>> platt = Platt()
        >>> _ = platt.fit(log_odds, torch.tensor([True, True, True, False, True, False]))
        >>> torch.sigmoid(platt(torch.tensor([2.0, 0.0])))
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """

    slope: Tensor
    intercept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("slope", "intercept")

    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Maximise the likelihood; see `BinaryCalibrator.fit_rows`."""
        fit = fit_logistic(log_odds.unsqueeze(1), log_odds, hits, intercept=True)
        self.slope, self.intercept = fit.slopes[0].clone(), fit.intercept
        return fit.optimum

    def transform(self, log_odds: Tensor) -> Tensor:
        """Apply the line; see `BinaryCalibrator.transform`."""
        return self.slope * log_odds + self.intercept
