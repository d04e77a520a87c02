"""Calibrators of K classes built from calibrators of one probability."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.binary import BinaryCalibrator, log_sigmoid
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.top_label import top_log_odds, with_top_confidence
from calib_lightning.types import Prediction

FEWEST_ROWS = 10
"""A class with fewer calibration rows keeps its probabilities in `OneVsRest`."""

_BLOCK = 2**20


class RowOdds(NamedTuple):
    """Parts of the log-odds of all classes of a row.

    Attributes:
        predicted: Predicted class ``(N,)``, the first of the largest.
        top: Its log-odds ``(N,)`` float64.
        total: ``logsumexp`` of the row's logits, ``(N,)`` float64.
    """

    predicted: Tensor
    top: Tensor
    total: Tensor


def row_odds(logits: Tensor) -> RowOdds:
    """Return the predicted class, its log-odds, and the logsumexp of each row."""
    wide = logits.double()
    return RowOdds(wide.argmax(dim=-1), top_log_odds(wide), wide.logsumexp(dim=-1))


def class_log_odds(logits: Tensor, label: int, rows: RowOdds) -> Tensor:
    """Log-odds of one class against the others, ``z_k - logsumexp(z without k)``, ``(N,)`` without cancellation.

    Only the predicted class can have a probability above one half, so ``log p - log(1 - p)`` is exact for the others.
    """
    log_prob = logits[:, label].double() - rows.total
    # For the predicted class the value is not used; the bound only keeps it finite.
    others = torch.log1p(-torch.exp(log_prob.clamp_max(-0.5)))
    return torch.where(rows.predicted == label, rows.top, log_prob - others)


class OneVsRest(Calibrator):
    """One calibrator for each class, of its probability against all others (Zadrozny and Elkan, 2002).

    ``q_k = g_k(p_k) / sum_j g_j(p_j)``. The predicted class may change.

    Args:
        calibrator: The calibrator of each class; copies are fitted, not the object itself.

    Raises:
        TypeError: ``calibrator`` is not a `BinaryCalibrator`.

    Attributes:
        copies: The copies, one per class. The copy of a class that has fewer than 10 rows, or all of them, is not
            fitted: ``g_k`` is then the identity.

    Example:
        >>> from calib_lightning.posthoc.platt import Platt
        >>> logits, labels = torch.randn(60, 3), torch.arange(60) % 3
        >>> OneVsRest(Platt()).fit(logits, labels)(logits).exp().sum(dim=1).allclose(torch.ones(60))
        True
    """

    preserves_argmax = False
    per_class = True

    def __init__(self, calibrator: BinaryCalibrator) -> None:
        super().__init__()
        self.calibrator = _checked(calibrator, "OneVsRest")
        self.copies = nn.ModuleList()

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Fit a copy to each class; see `Calibrator.fit_rows`."""
        classes = logits.shape[1]
        step = max(1, _BLOCK // classes)
        blocks = [row_odds(block) for block in torch.split(logits, step)]
        rows = RowOdds(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
        counts = torch.bincount(labels, minlength=classes).tolist()
        # The given object may already be fitted to something else.
        fresh = copy.deepcopy(self.calibrator)
        fresh.clear_state()
        copies = [copy.deepcopy(fresh) for _ in range(classes)]
        optima = {
            label: copies[label].fit(class_log_odds(logits, label, rows), labels == label)
            for label in range(classes)
            if FEWEST_ROWS <= counts[label] < len(labels)
        }
        self.copies = nn.ModuleList(copies)
        return _joined(optima, classes)

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Calibrate each class and divide by the sum; see `Calibrator.transform`."""
        rows = row_odds(logits)
        parts = []
        for label, calibrator in enumerate(self.copies):
            log_odds = class_log_odds(logits, label, rows)
            parts.append(calibrator(log_odds) if calibrator.fitted else log_odds)
        return torch.log_softmax(log_sigmoid(torch.stack(parts, dim=-1)), dim=-1).to(logits.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}copies."
        saved = {name.removeprefix(start).partition(".")[0] for name in state_dict if name.startswith(start)}
        self.copies = nn.ModuleList(copy.deepcopy(self.calibrator) for _ in saved)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _checked(calibrator: BinaryCalibrator, where: str) -> BinaryCalibrator:
    """Return a calibrator of one probability; raise ``TypeError`` for anything else."""
    if not isinstance(calibrator, BinaryCalibrator):
        raise TypeError(
            f"{where}: calibrator is {calibrator!r:.100}; it must be a calibrator of one probability. Pass Beta(), "
            "Platt(), Isotonic() or HistogramBinning(), for example."
        )
    return calibrator


def _joined(optima: Mapping[int, Optimum], classes: int) -> Optimum:
    """Combine the results of the fits of some classes."""
    notes = []
    if len(optima) < classes:
        notes.append(
            f"{classes - len(optima)} of {classes} classes have fewer than {FEWEST_ROWS} rows, or all of them, and "
            "keep their probabilities"
        )
    told = Counter(note for optimum in optima.values() for note in optimum.notes)
    notes += [f"{number} of {classes} classes: {note}" for note, number in told.items()]
    norms = [optimum.gradient_norm for optimum in optima.values() if not math.isnan(optimum.gradient_norm)]
    return Optimum(
        converged=all(optimum.converged for optimum in optima.values()),
        passes=max((optimum.passes for optimum in optima.values()), default=1),
        gradient_norm=max(norms, default=math.nan),
        at_bound=any(optimum.at_bound for optimum in optima.values()),
        notes=tuple(notes),
    )


class TopLabel(Calibrator):
    """Calibrates only the confidence in the predicted class; the others share the rest in their old proportions.

    With the calibrated confidence c', ``q_k = p_k (1 - c') / (1 - c)`` for the classes that are not predicted. Even if
    c' is so low that another class would be predicted, the predicted class is kept: in the distribution c' is raised to
    just above ``1 / K`` and the others are reduced below it; see `with_top_confidence`. `predict` also returns c'
    itself, which metrics of the confidence use.

    Args:
        calibrator: Fitted to the confidence and whether the prediction is correct; not copied.

    Raises:
        TypeError: ``calibrator`` is not a `BinaryCalibrator`.

    Example:
        >>> from calib_lightning.posthoc.beta import Beta
        >>> logits, labels = torch.randn(60, 3), torch.arange(60) % 3
        >>> calibrated = TopLabel(Beta()).fit(logits, labels).predict(logits)
        >>> calibrated.logits.argmax(dim=1).equal(logits.argmax(dim=1)), calibrated.confidence.shape
        (True, torch.Size([60]))
    """

    preserves_argmax = True
    full_distribution = False

    def __init__(self, calibrator: BinaryCalibrator) -> None:
        super().__init__()
        self.calibrator = _checked(calibrator, "TopLabel")

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Fit to the confidence; see `Calibrator.fit_rows`."""
        step = max(1, _BLOCK // logits.shape[1])
        log_odds = torch.cat([top_log_odds(block.double()) for block in torch.split(logits, step)])
        correct = logits.argmax(dim=1) == labels
        optimum = self.calibrator.fit(log_odds, correct)
        if bool(correct.all()) or not bool(correct.any()):
            kind = "correct" if bool(correct.all()) else "wrong"
            note = f"all {len(correct)} predictions are {kind}, so no row shows how confidence relates to errors"
            return optimum._replace(notes=(note, *optimum.notes))
        return optimum

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Set the confidence of the predicted class; see `Calibrator.transform`."""
        return self.with_confidence(logits, features).logits

    def with_confidence(self, logits: Tensor, features: Tensor | None) -> Prediction:
        """Return the confidence c', ``(N,)`` float64; it may be below ``1 / K``. See `Calibrator.with_confidence`."""
        log_odds = self.calibrator(top_log_odds(logits.double()))
        return Prediction(with_top_confidence(logits, log_odds), torch.sigmoid(log_odds))
