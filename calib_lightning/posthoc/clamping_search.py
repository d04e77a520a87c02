"""The runs of a fit of Neural Clamping, one for each pair of a gamma and a lambda."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from calib_lightning.posthoc.clamping_descent import Clamped, ClampFit, PenaltyWeight, with_exact_temperature
from calib_lightning.posthoc.clamping_objective import Objective, Penalty, penalty_of
from calib_lightning.posthoc.clamping_report import STILL_MOVING, ClampCandidate, Measured
from calib_lightning.posthoc.clamping_rows import ClampRows


def objectives(
    rows: ClampRows,
    start: Tensor,
    losses: Sequence[float],
    gammas: Sequence[float],
    weights: Sequence[PenaltyWeight] | None,
    penalty: Penalty,
) -> Iterator[tuple[Objective, float]]:
    """Yield every objective with its focal loss at the start; without ``weights`` delta is not penalised."""
    size = penalty_of(start, penalty)
    for gamma, loss in zip(gammas, losses, strict=True):
        for weight in [0.0] if weights is None else [float(rule.weight(loss, size)) for rule in weights]:
            yield Objective(rows, gamma, weight, penalty), loss


def trained(
    objective: Objective,
    start: Tensor,
    descent: ClampFit | None,
    after_epoch: Callable[[], Any],
    before: Clamped | None = None,
) -> Clamped:
    """Train delta and T; without a ``descent`` T alone, exactly."""
    if descent is not None:
        return descent.run(objective, start, after_epoch, before)
    end = with_exact_temperature(objective.rows, start, objective.gamma)
    after_epoch()
    return end


def candidate(
    objective: Objective, loss: float, start: Tensor, end: Clamped, before: Measured, after: Measured
) -> ClampCandidate:
    """Put down how a run went."""
    return ClampCandidate(
        gamma=objective.gamma,
        weight=objective.weight,
        loss_start=loss + objective.weight * penalty_of(start, objective.penalty),
        loss_end=after.losses[0] + objective.weight * penalty_of(end.delta, objective.penalty),
        ece=after.ece,
        nll=after.nll,
        temperature=math.exp(end.log_temperature),
        delta_norm=float(end.delta.norm()),
        accuracy_change=after.accuracy - before.accuracy,
        entropy=after.entropy,
    )


def notes_of(end: Clamped, chosen: ClampCandidate, before: Measured) -> Iterator[str]:
    """Yield remarks on the run that was chosen."""
    if chosen.ece >= before.ece:
        yield f"the calibration error is {chosen.ece:.4f}, not below the {before.ece:.4f} of the network alone"
    if chosen.loss_end > chosen.loss_start:
        yield f"the objective rose from {chosen.loss_start:.4g} to {chosen.loss_end:.4g}; use a lower lr"
    elif abs(end.slope) > STILL_MOVING:
        yield (
            f"the descent stopped before the optimum (slope {end.slope:.2g} by log T in the last epoch); raise lr, "
            "momentum or epochs"
        )
    if end.at_bound:
        yield "the likelihood has no maximum, so T was stopped at its bound"


def check_arguments(
    gammas: Sequence[float], weights: Sequence[PenaltyWeight], penalty: str, batch_size: object, keep: str
) -> None:
    """Raise ``ValueError`` for an argument of `NeuralClamping` out of range."""
    if not gammas or not all(0.0 <= gamma < math.inf for gamma in gammas):
        raise ValueError(f"gammas is {gammas!r}; it must be one or more finite numbers >= 0. 1.0 is the default.")
    if not weights:
        raise ValueError("weights is empty; it must be one or more rules. Pass RelativeWeight(0.1), for example.")
    if penalty not in ("l2sq", "l2"):
        raise ValueError(f"penalty is {penalty!r}; it must be 'l2sq' or 'l2'.")
    if keep not in ("both", "input", "output"):
        raise ValueError(f"keep is {keep!r}; it must be 'both', 'input' or 'output'.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be an integer >= 1.")
