"""Results of a fit of Neural Clamping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.calibration import ece_from_bins
from calib_lightning.metrics.functional.checks import check_shapes, check_values
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.posthoc.clamping_descent import Clamped
from calib_lightning.posthoc.clamping_objective import focal_rows
from calib_lightning.posthoc.clamping_rows import WHERE, ClampRows, reduced, several_processes
from calib_lightning.posthoc.fit_report import FitReport

_BINS = 15

STILL_MOVING = 1e-2
"""Slope of the objective by log T above which a run counts as stopped too early."""


class ClampCandidate(NamedTuple):
    """One run with a gamma and a lambda; the values are those of the calibration rows.

    Attributes:
        gamma: Focusing parameter of its loss.
        weight: lambda; 0 if delta was not trained.
        loss_start: Objective at the start, T = 1.
        loss_end: Objective at the end.
        ece: Expected calibration error (15 bins) at the end, a fraction.
        nll: Mean negative log-likelihood at the end, in nats.
        temperature: T.
        delta_norm: Euclidean norm of delta.
        accuracy_change: Accuracy at the end minus that of the network alone, a fraction.
        entropy: Mean entropy of the predictions at the end, in nats; nan in files of earlier versions.
    """

    gamma: float
    weight: float
    loss_start: float
    loss_end: float
    ece: float
    nll: float
    temperature: float
    delta_norm: float
    accuracy_change: float
    entropy: float = math.nan


class ClampReport(NamedTuple):
    """All runs of a fit; the values are those of the calibration rows of all processes.

    Attributes:
        rows: N.
        chosen: The run with the lowest calibration error, the first of equals.
        candidates: All runs, in the order of gammas, then of weights.
        nll_before: Mean negative log-likelihood of the network alone, in nats.
        ece_before: Its expected calibration error (15 bins), a fraction.
        start_moved: Fraction of the entries of delta_0 that are not 0.
        notes: Remarks for the user.
    """

    rows: int
    chosen: ClampCandidate
    candidates: tuple[ClampCandidate, ...]
    nll_before: float
    ece_before: float
    start_moved: float
    notes: tuple[str, ...] = ()

    def summary(self, name: str, passes: int, end: Clamped, before: Measured, kept: Measured) -> FitReport:
        """Convert to the report that all calibrators have, of what was kept of the chosen run."""
        return FitReport(
            calibrator=name,
            rows=self.rows,
            converged=abs(end.slope) <= STILL_MOVING and not end.at_bound,
            passes=passes,
            gradient_norm=abs(end.slope),
            at_bound=end.at_bound,
            nll_before=self.nll_before,
            nll_after=kept.nll,
            ece_before=self.ece_before,
            ece_after=kept.ece,
            accuracy_change=kept.accuracy - before.accuracy,
            notes=self.notes,
        )


def as_plain(report: ClampReport | None) -> dict[str, Any] | None:
    """Write a report as plain data, for checkpoints."""
    if report is None:
        return None
    runs = [list(run) for run in report.candidates]
    return {**report._asdict(), "chosen": list(report.chosen), "candidates": runs, "notes": list(report.notes)}


def from_plain(state: Mapping[str, Any] | None) -> ClampReport | None:
    """Read the result of `as_plain`; raise ``KeyError`` or ``TypeError`` for anything else."""
    if state is None:
        return None
    runs = tuple(ClampCandidate(*run) for run in state["candidates"])
    chosen, notes = ClampCandidate(*state["chosen"]), tuple(state["notes"])
    return ClampReport(**{**state, "chosen": chosen, "candidates": runs, "notes": notes})


class Measured(NamedTuple):
    """``f(x + delta) / T`` on the rows of all processes.

    Attributes:
        rows: N.
        nll: Mean negative log-likelihood in nats.
        ece: Expected calibration error (15 bins).
        accuracy: Accuracy.
        losses: Mean focal loss for each gamma.
        entropy: Mean entropy in nats.
    """

    rows: int
    nll: float
    ece: float
    accuracy: float
    losses: tuple[float, ...]
    entropy: float


def measured(rows: ClampRows, delta: Tensor | None, log_temperature: float, gammas: Sequence[float]) -> Measured:
    """Go through the rows once without gradients; invalid rows, here or on another process, raise an error."""
    totals = torch.zeros(5 + len(gammas) + 3 * _BINS, dtype=torch.float64)
    fault: TypeError | ValueError | None = None
    try:
        for image, label in rows.batches():
            logits = rows.logits(image if delta is None else image + delta.to(image.dtype))
            check_shapes(logits, label, None, WHERE)
            check_values(logits, label, None, "logits", WHERE)
            scaled = Rows(logits * math.exp(-log_temperature), label, None, "logits")
            losses = [float(focal_rows(scaled.scores, label, gamma).double().sum()) for gamma in gammas]
            firsts = [
                len(label),
                float(scaled.nll.sum()),
                float(scaled.correct.sum()),
                0.0,
                _entropy(scaled.scores),
                *losses,
            ]
            bins = bin_sums(scaled.confidence, scaled.correct, _BINS).cpu().flatten()
            totals += torch.cat([torch.tensor(firsts, dtype=torch.float64), bins])
        rows.like()
    except (TypeError, ValueError) as error:
        # Raised only after the reduction, or the other processes would wait for this one.
        fault = error
        totals[3] = 1.0
    if several_processes():
        totals = reduced(totals.to(rows.device)).cpu()
    if fault is not None:
        raise fault
    count, nll, correct, faults, entropy, *losses = totals[: 5 + len(gammas)].tolist()
    if faults:
        raise ValueError(f"{WHERE}: {int(faults)} of the other processes found invalid rows; see its message.")
    if count == 0.0:
        raise ValueError(f"{WHERE}: no rows were given; give the images and labels of the calibration split.")
    ece = float(ece_from_bins(totals[5 + len(gammas) :].view(_BINS, 3)))
    means = tuple(loss / count for loss in losses)
    return Measured(int(count), nll / count, ece, correct / count, means, entropy / count)


def _entropy(logits: Tensor) -> float:
    """Sum of the entropies of rows."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return -float((log_probs.exp() * log_probs).sum())
