"""The negative log-likelihood, split into a part that recalibration removes and a part that it cannot."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.rows import Rows, checked_rows
from calib_lightning.metrics.functional.temperature import LOG_BETA_BOUND, fit_inverse_temperature, tempered_rows
from calib_lightning.metrics.functional.undefined import checked_result

_LEAST_NODES = 9
_WIDEST_CELL = 0.125
_SPREADS = 6.0
_LEAST_HALF_WIDTH, _MOST_HALF_WIDTH = 0.02, 1.0
_HALVINGS = 50


class VariationalSplit(NamedTuple):
    """``nll = calibration + refinement``, in nats.

    Attributes:
        nll: Mean negative log-likelihood.
        calibration: What recalibration removes; slightly negative if there is nothing to gain, see
            `variational_split`.
        refinement: Mean negative log-likelihood after recalibration.
    """

    nll: Tensor
    calibration: Tensor
    refinement: Tensor


def _logits(rows: Rows) -> Tensor:
    """Logits of the rows; the smallest normal number replaces a probability of zero, which has no logit."""
    return torch.log(rows.scores.double().clamp_min(torch.finfo(torch.float64).tiny)) if rows.is_probs else rows.scores


def _mixed(value: Tensor, classes: int, total: float) -> tuple[Tensor, Tensor]:
    """``-log((1 - w) q + w / K)`` with ``w = 1 / (n + 1)`` and ``q = exp(-value)``, and the share of its first term."""
    own = math.log(total / (total + 1.0)) - value
    loss = -torch.logaddexp(own, own.new_full((), -math.log(classes * (total + 1.0))))
    return loss, torch.exp(own + loss)


def variational_split(logits: Tensor, labels: Tensor, *, input: InputKind = "logits") -> VariationalSplit:
    """Split the negative log-likelihood into calibration and refinement (Berta et al., 2025).

    ``refinement = min_g NLL(g(p))`` and ``calibration = NLL(p) - refinement``, where g is temperature scaling with
    smoothing: ``q = softmax(beta z)`` with the beta of `optimal_inverse_temperature`, then ``(1 - w) q + w / K`` with
    ``w = 1 / (N + 1)``, which keeps the result finite if the likelihood rises up to beta = inf. g is fitted on the
    same rows. So calibration can be below 0: where beta = 1 is the best one, the smoothing alone is left, and it costs
    up to ``log((N + 1) / N)``. "Refinement" here is a likelihood, not a ranking: see `correctness_auroc` and
    `ovo_auroc` for those.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3); a probability of
            0 is treated as 2e-308.

    Returns:
        The three terms, each 0-d float64; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0]]).repeat(100, 1)
        >>> split = variational_split(logits, torch.tensor([0] * 75 + [1] * 25))
        >>> round(split.nll.item(), 4), round(split.calibration.item(), 4), round(split.refinement.item(), 4)
        (0.5633, 0.0009, 0.5624)
    """
    rows = checked_rows("variational_split", logits, labels, input=input)
    n = len(labels)
    if n == 0:
        nan = checked_result("variational_split", rows.nll.mean(), 0)
        return VariationalSplit(nan, nan, nan)
    scores = _logits(rows)
    value, _, _ = tempered_rows(scores, rows.labels, fit_inverse_temperature(scores, rows.labels).beta)
    nll, refinement = rows.nll.mean(), _mixed(value, logits.shape[1], n)[0].mean()
    return VariationalSplit(nll, nll - refinement, refinement)


class VariationalTable(NamedTuple):
    """The input of `variational_from_table`, computed once by `variational_table`.

    Attributes:
        logits: ``(N, K)``, finite.
        labels: ``(N,)``.
        nll: Negative log-likelihood of the rows, ``(N,)`` float64.
        nodes: Evenly spaced values of ``log beta``, ``(G,)`` float64.
        losses: Negative log-likelihood of the rows at the nodes, and its first two derivatives by ``log beta``,
            ``(3, G, N)`` float64.
    """

    logits: Tensor
    labels: Tensor
    nll: Tensor
    nodes: Tensor
    losses: Tensor


def weighted_variational(
    logits: Tensor, labels: Tensor, weights: Tensor, *, input: InputKind = "logits"
) -> VariationalSplit:
    """`variational_split`, each ``(B,)``, for B weightings ``(B, N)`` of the rows at once (resamples)."""
    # The losses of the rows and their derivatives by log beta are tabulated around the optimum of all rows. Their
    # weighted means give piecewise polynomials (of degree 3 for the slope, whose root is the optimum of a resample, and
    # of degree 5 for the loss), within 1e-6 of fitting each resample. A resample whose optimum lies outside the table
    # is fitted itself. The smoothing w of a resample uses its total weight as N.
    return variational_from_table(variational_table(logits, labels, input=input), weights)


def variational_table(logits: Tensor, labels: Tensor, *, input: InputKind = "logits") -> VariationalTable:
    """The tempered losses of the rows at 9 to 17 values around the optimum of all rows, about 400 bytes per row."""
    rows = Rows(logits, labels, None, input)
    scores = _logits(rows)
    nodes = _nodes(scores, rows.labels)
    value, slope, curvature = (
        torch.stack(column)
        for column in zip(*(tempered_rows(scores, rows.labels, math.exp(u)) for u in nodes.tolist()), strict=True)
    )
    beta = nodes.exp().unsqueeze(1)
    losses = torch.stack([value, beta * slope, beta * slope + beta.square() * curvature])
    return VariationalTable(scores, rows.labels, rows.nll, nodes, losses)


def variational_from_table(table: VariationalTable, weights: Tensor) -> VariationalSplit:
    """`weighted_variational` from a table, which several groups of resamples can share."""
    weights = weights.double()
    total = weights.sum(dim=1)
    # 0 * inf would be nan if a row with an infinite loss was not drawn.
    lost = table.nll.isinf()
    nll = weights @ table.nll.masked_fill(lost, 0.0)
    nll = nll.masked_fill(weights @ lost.double() > 0, torch.inf) / total
    refinement = torch.full_like(total, torch.nan)
    drawn = (total > 0).nonzero().squeeze(-1)
    if len(drawn):
        refinement[drawn] = _refinements(table, weights[drawn], total[drawn])
    return VariationalSplit(nll, nll - refinement, refinement)


def _refinements(table: VariationalTable, weights: Tensor, total: Tensor) -> Tensor:
    """The refinement ``(B,)`` of resamples with weight."""
    classes, nodes, (value, slope, bend) = table.logits.shape[1], table.nodes, table.losses
    mean_slope, mean_bend = weights @ slope.T / total[:, None], weights @ bend.T / total[:, None]
    cell, at = _root(nodes, mean_slope, mean_bend)
    result = torch.empty_like(total)
    # Resamples of a set mostly have the same total, and so the same smoothing.
    for size in torch.unique(total).tolist():
        some = (total == size).nonzero().squeeze(-1)
        loss, share = _mixed(value, classes, size)
        loss_bend = share * bend - share * (1.0 - share) * slope.square()
        means = torch.stack([weights[some] @ part.T / size for part in (loss, share * slope, loss_bend)])
        result[some] = _quintic(nodes, means, cell[some], at[some])
    outside = (mean_slope[:, 0] > 0) & (nodes[0] > -LOG_BETA_BOUND)
    outside |= (mean_slope[:, -1] < 0) & (nodes[-1] < LOG_BETA_BOUND)
    for b in outside.nonzero().squeeze(-1).tolist():
        kept = weights[b].nonzero().squeeze(-1)
        logits, labels, own = table.logits[kept], table.labels[kept], weights[b, kept]
        value, _, _ = tempered_rows(logits, labels, fit_inverse_temperature(logits, labels, own).beta)
        result[b] = own @ _mixed(value, classes, float(total[b]))[0] / total[b]
    return result


def _nodes(scores: Tensor, labels: Tensor) -> Tensor:
    """Values of log beta, evenly spaced over a few standard errors (of an M-estimator) around the optimum."""
    fit = fit_inverse_temperature(scores, labels)
    _, slope, curvature = tempered_rows(scores, labels, fit.beta)
    spread = float(slope.square().sum().sqrt() / (fit.beta * curvature.sum()))
    spread = spread if math.isfinite(spread) else math.inf
    half = min(max(_SPREADS * spread, _LEAST_HALF_WIDTH), _MOST_HALF_WIDTH)
    centre = min(max(math.log(fit.beta), half - LOG_BETA_BOUND), LOG_BETA_BOUND - half)
    nodes = max(_LEAST_NODES, 1 + math.ceil(2.0 * half / _WIDEST_CELL))
    return torch.linspace(centre - half, centre + half, nodes, dtype=torch.float64, device=scores.device)


def _root(nodes: Tensor, slope: Tensor, bend: Tensor) -> tuple[Tensor, Tensor]:
    """The cell in which the slope rises through zero, and the position 0..1 in it on the cubic through the table."""
    cell = ((slope[:, 1:-1] < 0).cumprod(dim=1).sum(dim=1)).unsqueeze(1)
    width = nodes[1] - nodes[0]
    left, right = slope.gather(1, cell), slope.gather(1, cell + 1)
    left_bend, right_bend = width * bend.gather(1, cell), width * bend.gather(1, cell + 1)
    low, high = torch.zeros_like(left), torch.ones_like(left)
    for _ in range(_HALVINGS):
        t = 0.5 * (low + high)
        rest = 1.0 - t
        here = rest**2 * ((1.0 + 2.0 * t) * left + t * left_bend) + t**2 * ((3.0 - 2.0 * t) * right - rest * right_bend)
        low, high = torch.where(here < 0, t, low), torch.where(here < 0, high, t)
    return cell, 0.5 * (low + high)


def _quintic(nodes: Tensor, means: Tensor, cell: Tensor, t: Tensor) -> Tensor:
    """Value at position t of a cell of the quintic with the tabulated values, slopes and bends at both ends."""
    width = nodes[1] - nodes[0]

    def end(offset: int, t: Tensor, sign: float) -> Tensor:
        value, slope, bend = means.gather(2, (cell + offset).expand(3, -1, -1))
        rest = 1.0 - t
        polynomial = (1.0 + 3.0 * t + 6.0 * t**2) * value + sign * width * t * (1.0 + 3.0 * t) * slope
        result: Tensor = rest**3 * (polynomial + 0.5 * (width * t) ** 2 * bend)
        return result

    return (end(0, t, 1.0) + end(1, 1.0 - t, -1.0)).squeeze(1)
