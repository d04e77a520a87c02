"""Results of a fit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.calibration import ece_from_bins
from calib_lightning.metrics.functional.rows import Rows

_BINS = 15


class Optimum(NamedTuple):
    """What a calibrator reports about its own fit.

    Attributes:
        converged: Whether the optimum was reached (the gradient is zero up to rounding); true for fits without
            optimisation (counts, sorting). A report never has both this and `at_bound`, since there is no optimum at a
            bound.
        passes: Number of passes over the rows.
        gradient_norm: Largest absolute entry of the gradient at the end; nan if there is none.
        at_bound: Whether a parameter ended at its bound, or would grow without limit.
        notes: Remarks for the user.
    """

    converged: bool = True
    passes: int = 1
    gradient_norm: float = math.nan
    at_bound: bool = False
    notes: tuple[str, ...] = ()


class FitReport(NamedTuple):
    """How a fit went; the values are those of the rows of the fit.

    Attributes:
        calibrator: Name of the calibrator.
        rows: N.
        converged: As in `Optimum`.
        passes: As in `Optimum`.
        gradient_norm: As in `Optimum`.
        at_bound: As in `Optimum`.
        nll_before: Mean negative log-likelihood of the uncalibrated rows, in nats.
        nll_after: The same after calibration.
        ece_before: Expected calibration error (15 bins) before, a fraction.
        ece_after: The same after calibration.
        accuracy_change: Accuracy after minus accuracy before, a fraction.
        notes: Remarks for the user.
    """

    calibrator: str
    rows: int
    converged: bool
    passes: int
    gradient_norm: float
    at_bound: bool
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    accuracy_change: float
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, calibrator: str, optimum: Optimum, before: FitValues, after: FitValues) -> FitReport:
        """Put together how a fit went, and the values of its rows before and after."""
        return cls(
            calibrator=calibrator,
            rows=int(before.rows),
            converged=optimum.converged and not optimum.at_bound,
            passes=optimum.passes,
            gradient_norm=optimum.gradient_norm,
            at_bound=optimum.at_bound,
            nll_before=before.nll,
            nll_after=after.nll,
            ece_before=before.ece,
            ece_after=after.ece,
            accuracy_change=after.accuracy - before.accuracy,
            notes=optimum.notes,
        )

    @property
    def problems(self) -> list[str]:
        """The notes and all other problems that a user should be warned about."""
        problems = list(self.notes)
        if self.at_bound:
            problems.append("a parameter was stopped at its bound; the best value for these rows lies beyond it")
        if not self.converged and not self.at_bound:
            problems.append(
                f"stopped after {self.passes} passes before the optimum (largest gradient {self.gradient_norm:.2g})"
            )
        return problems


class FitValues:
    """NLL, ECE and accuracy, accumulated over blocks of rows."""

    def __init__(self) -> None:
        self.rows = self.total_nll = self.correct = 0.0
        self.bins = torch.zeros(_BINS, 3, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor, confidence: Tensor | None = None) -> None:
        """Add a block of logits ``(N, K)``, labels ``(N,)`` and optionally confidences ``(N,)``."""
        rows = Rows(logits, labels, confidence, "logits")
        self.rows += len(labels)
        self.total_nll += float(rows.nll.sum())
        self.correct += float(rows.correct.sum())
        self.bins += bin_sums(rows.confidence, rows.correct, _BINS).cpu()

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats."""
        return self.total_nll / self.rows

    @property
    def ece(self) -> float:
        """Expected calibration error, a fraction."""
        return float(ece_from_bins(self.bins))

    @property
    def accuracy(self) -> float:
        """Accuracy, a fraction."""
        return self.correct / self.rows


def notes_on_absent_classes(labels: Tensor, num_classes: int) -> list[str]:
    """A remark for the user if some of the K classes have no rows."""
    absent = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().squeeze(1).tolist()
    if not absent:
        return []
    which = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
    return [f"{len(absent)} of {num_classes} classes have no calibration rows (class {which})"]
