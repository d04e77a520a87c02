"""What all calibrators share: checks, state that travels in checkpoints, and a report of every fit."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.calibration import bin_sums, ece_from_bins
from calib_lightning.metrics.functional.rows import (
    Rows,
    check_shapes,
    check_values,
    seem_probs,
)
from calib_lightning.posthoc.state import FittedState
from calib_lightning.types import Prediction
from calib_lightning.utils.described import Described

_BINS = 15
_BLOCK = 2**18


class Optimum(NamedTuple):
    """What a calibrator knows about its own fit.

    Attributes:
        converged: Whether the optimum was reached (the gradient is zero but for rounding), or the fit has none to
            reach (counts, sorting).
        passes: How often the rows were gone through.
        gradient_norm: Largest absolute entry of the gradient at the end; nan where there is none.
        at_bound: Whether a parameter ended at its bound, or would grow for ever without one.
        notes: What a user should know.
    """

    converged: bool = True
    passes: int = 1
    gradient_norm: float = math.nan
    at_bound: bool = False
    notes: tuple[str, ...] = ()


class FitReport(NamedTuple):
    """How a fit went; the figures are those of the rows that it was fitted on.

    Attributes:
        calibrator: Name of the calibrator.
        rows: N.
        converged: As in `Optimum`.
        passes: As in `Optimum`.
        gradient_norm: As in `Optimum`.
        at_bound: As in `Optimum`.
        nll_before: Mean negative log-likelihood in nats of the rows as they came.
        nll_after: The same, calibrated.
        ece_before: Expected calibration error (15 bins), a fraction.
        ece_after: The same, calibrated.
        accuracy_change: Accuracy after less accuracy before, a fraction.
        notes: What a user should know.
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


class Calibrator(FittedState, Described, ABC):
    """Maps logits to calibrated log-probabilities, once it is fitted on rows that the network was not trained on.

    A subclass keeps its constructor's arguments as attributes of the same names, names its state with `register_state`,
    and writes `fit_rows`, which assigns that state, and `transform`. State lies in buffers, so it moves with the module
    and travels in checkpoints.

    Attributes:
        preserves_argmax: Whether the predicted class never changes.
        full_distribution: Whether all K probabilities are calibrated, not only that of the predicted class.
        needs_features: Whether it is fitted and used with features ``(N, d)``.
        per_class: Whether it has parameters of every class, which need rows of every class.
        num_classes: K, 0 before the fit.
        report: How the last fit went, ``None`` before.
    """

    preserves_argmax: ClassVar[bool]
    full_distribution: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False
    per_class: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 0
        self.report: FitReport | None = None

    @property
    def fitted(self) -> bool:
        """Whether it can be used."""
        return self.num_classes > 0

    @abstractmethod
    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Fit to rows that were checked, and assign the state.

        Args:
            logits: ``(N, K)`` float32 or float64, finite; N >= 1, K >= 2.
            labels: ``(N,)`` int64 in ``0..K-1``.
            features: ``(N, d)``, finite, where the calibrator needs them.

        Returns:
            How it went.
        """

    @abstractmethod
    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Calibrate; nothing here may depend on the values of a tensor in Python, so that it can be exported.

        Args:
            logits: ``(N, K)`` float32 or float64; K >= 2.
            features: ``(N, d)`` where the calibrator needs them.

        Returns:
            Log-probabilities ``(N, K)`` in the dtype of the logits.
        """

    def with_confidence(self, logits: Tensor, features: Tensor | None) -> Prediction:
        """What `transform` gives, and the confidence in the predicted class where it is not the largest of it.

        Args:
            logits: As in `transform`.
            features: As in `transform`.

        Returns:
            Both; the confidence ``(N,)`` is ``None`` where it is the largest probability.
        """
        return Prediction(self.transform(logits, features))

    def of_fitted_rows(self, logits: Tensor, features: Tensor | None, place: Tensor) -> Prediction:
        """What `with_confidence` gives for rows of the fit, each of them as if it were a new one.

        Only a calibrator that looks a row up among those of its fit has to write this: there a row would find itself.

        Args:
            logits: As in `transform`, of some rows of the fit.
            features: As in `transform`.
            place: Places ``(N,)`` of these rows in the fit, int64.

        Returns:
            As `with_confidence`.
        """
        return self.with_confidence(logits, features)

    def fit(self, logits: Tensor, labels: Tensor, features: Tensor | None = None) -> Self:
        """Fit to the calibration split: held-out rows, neither trained nor tested on.

        Args:
            logits: ``(N, K)``, floating point, N >= 1; half precision is widened. Of probabilities give `as_logits`.
            labels: Class labels ``(N,)``, integer, in ``0..K-1``.
            features: ``(N, d)``, floating point, for calibrators that need them.

        Returns:
            Itself; how it went is in ``report``, and a warning tells of what went wrong.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, an invalid value (the first bad row is named), no rows, or missing features.
        """
        where = f"{type(self).__name__}.fit"
        check_shapes(logits, labels, None, where)
        if len(labels) == 0:
            raise ValueError(f"{where}: no rows were given; give the logits and labels of the calibration split")
        check_values(logits, labels, None, "logits", where)
        features = self._checked_features(features, len(labels), where)
        # One row mostly tells, and costs nothing.
        if logits.shape[1] > 1 and seem_probs(at_least_float32(logits[:1])) and seem_probs(at_least_float32(logits)):
            warnings.warn(
                f"{where}: all logits lie in [0, 1] and each row sums to 1; if they are probabilities, give "
                "as_logits(probs)",
                stacklevel=2,
            )
        self.num_classes, self.report = 0, None  # a fit that fails leaves nothing that could be used
        rows, labels = at_least_float32(logits.detach()), labels.detach().long()
        classes = rows.shape[1]
        # State made in inference mode could not be used where gradients are asked for.
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(rows):
            optimum = self.fit_rows(rows, labels, features) if classes > 1 else Optimum()
            self.num_classes = classes
            self.report = self._reported(optimum, rows, labels, features)
        for problem in _problems(self.report):
            warnings.warn(f"{where}: {problem}", stacklevel=2)
        return self

    def forward(self, logits: Tensor, features: Tensor | None = None) -> Tensor:
        """Calibrate.

        Args:
            logits: ``(N, K)``, floating point; half precision is widened to float32.
            features: ``(N, d)`` for calibrators that need them.

        Returns:
            Log-probabilities ``(N, K)``, float32 or float64.

        Raises:
            RuntimeError: It was not fitted.
            ValueError: Another K than it was fitted to, or missing features.
        """
        logits, features = self._checked_input(logits, features)
        if self.num_classes == 1:
            return torch.zeros_like(logits)
        with _no_autocast(logits):
            return self.transform(logits, features)

    def predict(self, logits: Tensor, features: Tensor | None = None) -> Prediction:
        """Calibrated log-probabilities, and the confidence where it is not the largest of them.

        Args:
            logits: As in `forward`.
            features: As in `forward`.

        Returns:
            Both, as `calib_lightning.metrics.EvaluationState.update` takes them.
        """
        logits, features = self._checked_input(logits, features)
        if self.num_classes == 1:
            return Prediction(torch.zeros_like(logits))
        with _no_autocast(logits):
            return self.with_confidence(logits, features)

    def _checked_input(self, logits: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(logits, labels) or load a fitted one.")
        if not isinstance(logits, Tensor):
            raise TypeError(f"{type(self).__name__}: logits must be a tensor, got {type(logits).__name__}")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{type(self).__name__} was fitted to {self.num_classes} classes, but the logits have shape "
                f"{tuple(logits.shape)}; give (N, {self.num_classes})."
            )
        if not self.needs_features:
            return at_least_float32(logits), None
        if features is None:
            raise ValueError(f"{type(self).__name__} needs features (N, d) beside the logits.")
        if features.ndim != 2 or features.shape[0] != logits.shape[0] or not features.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: features must be floating point of shape ({logits.shape[0]}, d), got "
                f"{features.dtype} of shape {tuple(features.shape)}"
            )
        return at_least_float32(logits), at_least_float32(features)

    def _checked_features(self, features: Tensor | None, rows: int, where: str) -> Tensor | None:
        if not self.needs_features:
            return None
        if features is None:
            raise ValueError(f"{where}: features are missing; give those of the same rows, (N, d)")
        if features.ndim != 2 or len(features) != rows or not features.is_floating_point():
            raise ValueError(
                f"{where}: features must be floating point of shape ({rows}, d), got {features.dtype} of shape "
                f"{tuple(features.shape)}"
            )
        bad = ~features.isfinite().all(dim=1)
        if bool(bad.any()):
            raise ValueError(
                f"{where}: {int(bad.sum())} of {rows} rows have features that are not finite; the first is row "
                f"{int(bad.int().argmax())}"
            )
        return at_least_float32(features.detach())

    def _reported(self, optimum: Optimum, logits: Tensor, labels: Tensor, features: Tensor | None) -> FitReport:
        step = max(1, _BLOCK // logits.shape[1])
        before, after = _Figures(), _Figures()
        for rows in torch.split(torch.arange(len(labels), device=logits.device), step):
            before.add(logits[rows], labels[rows])
            if logits.shape[1] == 1:
                calibrated = Prediction(torch.zeros_like(logits[rows]))
            else:
                calibrated = self.of_fitted_rows(logits[rows], None if features is None else features[rows], rows)
            after.add(calibrated.logits, labels[rows], calibrated.confidence)
        notes = list(optimum.notes)
        absent = (torch.bincount(labels, minlength=logits.shape[1]) == 0).nonzero().squeeze(1).tolist()
        if absent and self.per_class:
            which = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
            notes.append(f"{len(absent)} of {logits.shape[1]} classes have no calibration rows (class {which})")
        return FitReport(
            calibrator=self.name,
            rows=len(labels),
            converged=optimum.converged,
            passes=optimum.passes,
            gradient_norm=optimum.gradient_norm,
            at_bound=optimum.at_bound,
            nll_before=before.nll,
            nll_after=after.nll,
            ece_before=before.ece,
            ece_after=after.ece,
            accuracy_change=after.accuracy - before.accuracy,
            notes=tuple(notes),
        )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """K and the report, as plain data."""
        report = None if self.report is None else {**self.report._asdict(), "notes": list(self.report.notes)}
        return {"num_classes": self.num_classes, "report": report}

    def set_extra_state(self, state: Any) -> None:
        """Take K and the report from a checkpoint.

        Raises:
            ValueError: They are damaged.
        """
        try:
            self.num_classes = int(state["num_classes"])
            report = state["report"]
            self.report = None if report is None else FitReport(**{**report, "notes": tuple(report["notes"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The state of {type(self).__name__} is damaged: {error!r}.") from None


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off, which would multiply in half precision what was fitted in float64."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()  # an exported graph has no need of it


class _Figures:
    """NLL, ECE and accuracy of rows that come in blocks."""

    def __init__(self) -> None:
        self.rows = self.total_nll = self.hits = 0.0
        self.bins = torch.zeros(_BINS, 3, dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor, confidence: Tensor | None = None) -> None:
        rows = Rows(logits, labels, confidence, "logits")
        self.rows += len(labels)
        self.total_nll += float(rows.nll.sum())
        self.hits += float(rows.correct.sum())
        self.bins += bin_sums(rows.confidence, rows.correct, _BINS).cpu()

    @property
    def nll(self) -> float:
        return self.total_nll / self.rows

    @property
    def ece(self) -> float:
        return float(ece_from_bins(self.bins))

    @property
    def accuracy(self) -> float:
        return self.hits / self.rows


def _problems(report: FitReport) -> list[str]:
    problems = list(report.notes)
    if report.at_bound:
        problems.append("a parameter was stopped at its bound: the best value for these rows lies beyond it")
    if not report.converged and not report.at_bound:
        problems.append(
            f"stopped after {report.passes} passes before the optimum (largest gradient {report.gradient_norm:.2g})"
        )
    return problems


def as_logits(probs: Tensor) -> Tensor:
    """Turn probabilities into logits for a calibrator: ``log p``, at least the log of the smallest normal number.

    Args:
        probs: ``(N, K)``, rows >= 0 that sum to 1 +- 1e-3.

    Returns:
        ``(N, K)``, float32 or float64.

    Raises:
        TypeError: Not floating point.
        ValueError: A wrong shape, or rows that are not probabilities; the first is named.

    Example:
        >>> as_logits(torch.tensor([[0.5, 0.5]])).exp()
        tensor([[0.5000, 0.5000]])
    """
    labels = torch.zeros(probs.shape[:1], dtype=torch.int64, device=probs.device)
    check_shapes(probs, labels, None, "as_logits")
    check_values(probs, labels, None, "probs", "as_logits")
    wide = at_least_float32(probs)
    return torch.log(wide.clamp_min(torch.finfo(wide.dtype).tiny))
