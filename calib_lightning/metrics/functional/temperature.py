"""The inverse temperature with the least negative log-likelihood."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.rows import checked_rows

LOG_BETA_BOUND = 16.0
"""The logarithm of the inverse temperature is looked for between minus this and this."""

_BLOCK = 2**18
_ENOUGH = 1e-9
_MOST_PASSES = 200


class OptimalTemperature(NamedTuple):
    """The result of a fit.

    Attributes:
        beta: Inverse temperature.
        nll: Mean negative log-likelihood in nats at ``beta``.
        at_bound: Whether ``beta`` is ``exp(-16)`` or ``exp(16)``, because the likelihood rises up to there.
    """

    beta: float
    nll: float
    at_bound: bool


def tempered_rows(logits: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood ``logsumexp(beta z) - beta z_y`` of each row, and its derivatives by ``beta``.

    Args:
        logits: ``(N, K)``, floating point.
        labels: Class labels ``(N,)`` in ``0..K-1``.
        beta: Inverse temperature.

    Returns:
        Three ``(N,)`` float64: the value, the slope ``E_q[z] - z_y`` and the curvature ``Var_q[z]``, with
        ``q = softmax(beta z)``.
    """
    parts = []
    step = max(1, _BLOCK // logits.shape[1])
    for some, own in zip(torch.split(logits.detach(), step), torch.split(labels.long(), step), strict=True):
        shifted = some.double()
        shifted = shifted - shifted.amax(dim=-1, keepdim=True)
        of_label = shifted.gather(-1, own.unsqueeze(-1)).squeeze(-1)
        odds = (beta * shifted).exp_()
        total = odds.sum(dim=-1)
        mean = odds.mul_(shifted).sum(dim=-1) / total
        square = odds.mul_(shifted).sum(dim=-1) / total
        slope, curvature = mean - of_label, (square - mean.square()).clamp_min_(0.0)
        parts.append(torch.stack([torch.log(total) - beta * of_label, slope, curvature]))
    value, slope, curvature = torch.cat(parts, dim=1).unbind()
    return value, slope, curvature


def fit_inverse_temperature(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> OptimalTemperature:
    """Find the inverse temperature as `optimal_inverse_temperature` does, without checks and warnings.

    Args:
        logits: ``(N, K)``, finite; N >= 1.
        labels: Class labels ``(N,)`` in ``0..K-1``.
        weights: Weight >= 0 of each row, ``(N,)``, not all zero; ``None`` means one each.

    Returns:
        The optimum.
    """
    if weights is None:
        share = torch.full((len(labels),), 1.0 / len(labels), dtype=torch.float64, device=logits.device)
    else:
        share = weights.double() / weights.double().sum()

    def at(log_beta: float) -> tuple[float, float, float]:
        value, slope, curvature = (torch.stack(tempered_rows(logits, labels, math.exp(log_beta))) @ share).tolist()
        return value, slope, curvature

    low, high = -LOG_BETA_BOUND, LOG_BETA_BOUND
    value, slope, curvature = at(low)
    if curvature == 0.0:  # constant rows: every temperature gives the same, so none is applied
        return OptimalTemperature(1.0, value, False)
    if slope >= 0.0:
        return OptimalTemperature(math.exp(low), value, True)
    value, slope, _ = at(high)
    # Where the labels are all the largest logits the slope is below zero everywhere, or rounds to zero.
    if slope <= 0.0:
        return OptimalTemperature(math.exp(high), value, True)
    # The slope rises with beta, so its sign says on which side the root is. Newton steps on log beta are taken while
    # they stay inside and the last two at least halve the slope; else the bracket is halved.
    here, last = 0.0, math.inf
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
        # Newton doubles the digits, so after a step this small the next would change nothing.
        if moved <= _ENOUGH:
            break
    return OptimalTemperature(math.exp(here), at(here)[0], False)


def optimal_inverse_temperature(logits: Tensor, labels: Tensor) -> OptimalTemperature:
    """Inverse temperature ``beta = 1/T`` with the least mean negative log-likelihood (Guo et al., 2017).

    The root of ``mean_i (sum_k q_ik z_ik - z_iy)``, ``q = softmax(beta z)``, in float64 by Newton steps on
    ``log beta`` inside a shrinking bracket that starts as ``[-16, 16]``. The slope rises with beta, so the root is the
    only minimum. Where all labels are the largest logits the likelihood rises for ever, and the result is the upper
    bound; where labels have less than the average logit the uniform distribution is best, and it is the lower bound.
    Rows that are constant give 1.

    Args:
        logits: ``(N, K)``, floating point.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.

    Returns:
        The inverse temperature, the mean negative log-likelihood there in nats, and whether a bound was hit, which
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
        raise ValueError("optimal_inverse_temperature: no rows were given; a fit needs at least one")
    fit = fit_inverse_temperature(rows.scores, rows.labels)
    if fit.at_bound:
        side = "labels are all the largest logits" if fit.beta > 1 else "labels have less than the mean logit"
        warnings.warn(
            f"optimal_inverse_temperature: the {side}, so that the likelihood rises up to the bound "
            f"beta = {fit.beta:.3g}; use rows that were not trained on",
            stacklevel=2,
        )
    return fit
