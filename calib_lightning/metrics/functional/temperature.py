"""The inverse temperature with the smallest negative log-likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.rows import checked_rows

LOG_BETA_BOUND = 16.0
"""The search for the logarithm of the inverse temperature is limited to plus and minus this value."""

_BLOCK = 2**16
_ENOUGH = 3e-7
_ENOUGH_FOR_A_START = 3e-4
_MOST_PASSES = 200
_LOG2_E = math.log2(math.e)


class OptimalTemperature(NamedTuple):
    """The result of a fit.

    Attributes:
        beta: Inverse temperature.
        nll: Mean negative log-likelihood in nats at ``beta``.
        at_bound: Whether ``beta`` is at its bound, ``exp(-16)`` or ``exp(16)``, because the likelihood rises up to it.
    """

    beta: float
    nll: float
    at_bound: bool


class TemperatureSearch(NamedTuple):
    """A fit and how it went.

    Attributes:
        optimum: The result.
        slope: Derivative of the mean negative log-likelihood by ``beta`` at the last evaluated point. The final step
            from there is a relative 3e-7 at most, and the slope after it is smaller still.
        passes: Number of passes over the rows.
    """

    optimum: OptimalTemperature
    slope: float
    passes: int


def tempered_rows(
    logits: Tensor, labels: Tensor, beta: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, slope and curvature by beta, each ``(N,)`` float64, of ``logsumexp(beta z) - beta z_y`` per row."""
    # With q = softmax(beta z) the slope is E_q[z] - z_y and the curvature Var_q[z]. Sums over classes have the given
    # dtype.
    parts = []
    step = max(1, _BLOCK // logits.shape[1])
    for some, own in zip(torch.split(logits.detach(), step), torch.split(labels.long(), step), strict=True):
        shifted = _below_largest(some, dtype)
        of_label = shifted.gather(-1, own.unsqueeze(-1)).squeeze(-1)
        odds = torch.mul(shifted, beta * _LOG2_E).exp2_()  # half the time of exp
        total = odds.sum(dim=-1)
        mean = odds.mul_(shifted).sum(dim=-1) / total
        square = odds.mul_(shifted).sum(dim=-1) / total
        slope, curvature = mean - of_label, (square - mean.square()).clamp_min_(0.0)
        parts.append(torch.stack([torch.log(total) - beta * of_label, slope, curvature]))
    value, slope, curvature = torch.cat(parts, dim=1).double().unbind()
    return value, slope, curvature


def _below_largest(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits minus the largest one of their row."""
    wide = logits.to(torch.promote_types(logits.dtype, dtype))  # float64 logits are rounded after the subtraction
    return (wide - wide.amax(dim=-1, keepdim=True)).to(dtype)


def search_inverse_temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> TemperatureSearch:
    """`optimal_inverse_temperature` of rows with weights ``(N,)``, unchecked, with how it was found."""
    if weights is None:
        share = torch.full((len(labels),), 1.0 / len(labels), dtype=torch.float64, device=logits.device)
    else:
        share = weights.double() / weights.double().sum()
    passes = 0

    def at(log_beta: float, dtype: torch.dtype = torch.float64) -> tuple[float, float, float]:
        nonlocal passes
        passes += 1
        rows = tempered_rows(logits, labels, math.exp(log_beta), dtype)
        value, slope, curvature = (torch.stack(rows) @ share).tolist()
        return value, slope, curvature

    low, high = -LOG_BETA_BOUND, LOG_BETA_BOUND
    below, slope, curvature = (torch.stack(_of_uniform(logits, labels)) @ share).tolist()
    passes += 1
    if curvature == 0.0:  # constant rows: every temperature gives the same
        return TemperatureSearch(OptimalTemperature(1.0, math.log(logits.shape[1]), False), 0.0, passes)
    # The slope rises with beta, at first by about this much.
    if slope + math.exp(low) * curvature >= 0.0:
        value, slope_there, _ = at(low)
        if slope >= 0.0 or slope_there >= 0.0:
            return TemperatureSearch(OptimalTemperature(math.exp(low), value, True), slope_there, passes)
    # Newton's step from beta = 0 suits the scale of the logits.
    start = min(max(math.log(-slope / curvature), low), high) if slope < 0.0 else low
    # A row's E_q[z] is less than (K - 1) / (e beta) below its largest logit. The slope can be negative up to the upper
    # bound only if the labels are no further below it on average; rounding may make it zero there.
    if below <= (logits.shape[1] - 1) * math.exp(-high):
        value, slope, _ = at(high)
        if slope <= 0.0:
            return TemperatureSearch(OptimalTemperature(math.exp(high), value, True), slope, passes)
    # float32 takes half the time, and mostly leaves one step for float64.
    start, _, _ = _root(lambda log_beta: at(log_beta, torch.float32), start, _ENOUGH_FOR_A_START)
    log_beta, value, slope = _root(at, start, _ENOUGH)
    if abs(log_beta) > LOG_BETA_BOUND - 3.0 * _ENOUGH:  # halving towards a bound ends this close to it
        beta = math.exp(math.copysign(LOG_BETA_BOUND, log_beta))
        return TemperatureSearch(OptimalTemperature(beta, value, True), slope, passes)
    return TemperatureSearch(OptimalTemperature(math.exp(log_beta), value, False), slope, passes)


def _of_uniform(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # How far the label is below the largest logit, and the slope and curvature at beta = 0, each (N,) float64.
    parts = []
    step = max(1, _BLOCK // logits.shape[1])
    for some, own in zip(torch.split(logits.detach(), step), torch.split(labels.long(), step), strict=True):
        shifted = _below_largest(some, torch.float64)
        of_label = shifted.gather(-1, own.unsqueeze(-1)).squeeze(-1)
        mean = shifted.mean(dim=-1)
        curvature = (shifted.square_().mean(dim=-1) - mean.square()).clamp_min_(0.0)
        parts.append(torch.stack([-of_label, mean - of_label, curvature]))
    below, slope, curvature = torch.cat(parts, dim=1).unbind()
    return below, slope, curvature


def _root(at: Callable[[float], tuple[float, float, float]], here: float, enough: float) -> tuple[float, float, float]:
    """The root of the slope: log beta, value and slope."""
    # The slope rises with beta, so its sign says on which side the root is. Newton steps on log beta are taken while
    # they stay inside and the last two at least halve the slope; otherwise the bracket is halved.
    low, high, last = -LOG_BETA_BOUND, LOG_BETA_BOUND, math.inf
    value = slope = math.nan
    for _ in range(_MOST_PASSES):
        value, slope, curvature = at(here)
        if slope < 0.0:
            low = here
        else:
            high = here
        rise = math.exp(here) * curvature
        step = -slope / rise if rise > 0.0 else math.inf
        middle = 0.5 * (low + high)
        following = here + step if low <= here + step <= high and 2.0 * abs(slope) <= last else middle
        last = abs(slope)
        moved, here = abs(following - here), following
        # Newton doubles the digits, so after a step this small the error is its square.
        if moved <= enough:
            break
    return here, value, slope


def fit_inverse_temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> OptimalTemperature:
    """`optimal_inverse_temperature` of rows with weights ``(N,)``, without checks and warnings."""
    return search_inverse_temperature(logits, labels, weights).optimum


def optimal_inverse_temperature(logits: Tensor, labels: Tensor) -> OptimalTemperature:
    """Inverse temperature ``beta = 1/T`` with the smallest mean negative log-likelihood (Guo et al., 2017).

    The root of ``mean_i (sum_k q_ik z_ik - z_iy)``, ``q = softmax(beta z)``, in float64 by Newton steps on
    ``log beta`` inside a shrinking bracket that starts as ``[-16, 16]``. The slope rises with beta, so the root is the
    only minimum. If all labels have the largest logit, the likelihood rises without end and the result is the upper
    bound; if labels have less than the mean logit, the uniform distribution is best and the result is the lower bound.
    Constant rows give 1.

    Args:
        logits: ``(N, K)``, floating point.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.

    Returns:
        The inverse temperature, the mean negative log-likelihood there in nats, and whether a bound was reached, which
        also warns.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or no rows.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> fit = optimal_inverse_temperature(logits, torch.tensor([0, 0, 0, 0]))
        >>> round(fit.beta, 6), round(fit.nll, 6), fit.at_bound  # log 3, as three of four are right
        (1.098612, 0.562335, False)
    """
    rows = checked_rows("optimal_inverse_temperature", logits, labels)
    if len(labels) == 0:
        raise ValueError("optimal_inverse_temperature: no rows were given; a fit needs at least one.")
    fit = fit_inverse_temperature(rows.scores, rows.labels)
    if fit.at_bound:
        side = "labels are all the largest logits" if fit.beta > 1 else "labels have less than the mean logit"
        warnings.warn(
            f"optimal_inverse_temperature: the {side}, so the likelihood rises up to the bound "
            f"beta = {fit.beta:.3g}. Use rows that were not trained on.",
            stacklevel=2,
        )
    return fit
