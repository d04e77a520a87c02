"""What all calibrators share: one way to fit and to apply them, checks, and state that travels in checkpoints."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.rows import check_shapes, check_values, seem_probs
from calib_lightning.posthoc.evidence import (
    Evidence,
    Images,
    Need,
    Network,
    asked_logits,
    check_features,
    check_shape_of_features,
    missing,
)
from calib_lightning.posthoc.fit_report import FitReport, FitValues, Optimum
from calib_lightning.posthoc.state import FittedState
from calib_lightning.types import Prediction
from calib_lightning.utils.described import Described

_BLOCK = 2**18


class Calibrator(FittedState, Described, ABC):
    """Maps what a network says to calibrated log-probabilities, fitted to rows that the network was not trained on.

    Every calibrator is fitted with `fit` and applied with `predict`, and says in `needs` which arguments of them it
    looks at; the others are ignored. So a caller that has an `Evidence` need not know which calibrator it holds:
    ``calibrator.fit(labels=labels, **evidence._asdict())``, ``calibrator.predict(*evidence)``.

    A subclass names its state with `register_state` and writes `fit_rows`, which assigns that state at its very end,
    and `transform`. State lies in buffers, so it moves with the module and travels in checkpoints.

    Attributes:
        needs: Some of ``"logits"``, ``"features"`` and ``"network"``, which stands for network and images.
        preserves_argmax: Whether the predicted class never changes.
        full_distribution: Whether all K probabilities are calibrated, not only that of the predicted class.
        per_class: Whether it has parameters of every class, which need rows of every class.
        num_classes: K, 0 before the fit.
        report: How the last fit went, ``None`` before.
    """

    needs: ClassVar[tuple[Need, ...]] = ("logits",)
    preserves_argmax: ClassVar[bool]
    full_distribution: ClassVar[bool] = True
    per_class: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 0
        self.report: FitReport | None = None

    @property
    def fitted(self) -> bool:
        """Whether it can be used."""
        return self.num_classes > 0

    @property
    def details(self) -> dict[str, Any]:
        """What a report of the fit adds to `report`; plain data."""
        return {}

    # --- what a subclass writes --------------------------------------------------------------------------------------

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
        """Return the result of `transform`, with a confidence ``(N,)`` where it is not the largest probability."""
        return Prediction(self.transform(logits, features))

    def of_fitted_rows(self, logits: Tensor, features: Tensor | None, place: Tensor) -> Prediction:
        """Apply to rows of the fit as if they were new.

        Only a calibrator that looks a row up among those of its fit overrides this: there a row would find itself.

        Args:
            logits: As in `transform`, of some rows of the fit.
            features: As in `transform`.
            place: Places ``(N,)`` of these rows in the fit, int64.

        Returns:
            As `with_confidence`.
        """
        return self.with_confidence(logits, features)

    def fit_evidence(self, evidence: Evidence, labels: Tensor) -> Optimum:
        """Fit to checked evidence; only a calibrator that uses the network overrides this."""
        assert evidence.logits is not None
        return self.fit_rows(evidence.logits, labels, evidence.features)

    def logits_of(self, evidence: Evidence) -> Tensor:
        """Return the logits ``(N, K)`` that `transform` takes; one that uses the network asks it."""
        assert evidence.logits is not None
        return evidence.logits

    # --- fit ---------------------------------------------------------------------------------------------------------

    def fit(
        self,
        logits: Tensor | None = None,
        labels: Tensor | None = None,
        features: Tensor | None = None,
        network: Network | None = None,
        images: Images | None = None,
    ) -> Self:
        """Fit to the calibration split: held-out rows, neither trained nor tested on.

        Args:
            logits: ``(N, K)``, floating point, N >= 1; half precision is widened. Pass probabilities as `as_logits`.
            labels: Class labels ``(N,)``, integer, in ``0..K-1``.
            features: ``(N, d)``, floating point, for calibrators that need them.
            network: In evaluation mode, for calibrators that need it.
            images: ``(N, C, H, W)``, normalised as the network takes them, for calibrators that need the network.

        Returns:
            Itself; how it went is in ``report``, and a warning tells what went wrong.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, an invalid value (the first bad row is named), no rows, or something missing.
        """
        where = f"{type(self).__name__}.fit"
        evidence = self._complete(Evidence(logits, features, network, images), where)
        logits = evidence.logits
        if not isinstance(labels, Tensor):
            raise TypeError(f"{where}: labels are {labels!r:.100}; give a tensor (N,) of class numbers")
        assert logits is not None
        check_shapes(logits, labels, None, where)
        if len(labels) == 0:
            raise ValueError(f"{where}: no rows were given; give the logits and labels of the calibration split")
        check_values(logits, labels, None, "logits", where)
        # One row usually tells, and costs nothing.
        if logits.shape[1] > 1 and seem_probs(at_least_float32(logits[:1])) and seem_probs(at_least_float32(logits)):
            warnings.warn(
                f"{where}: all logits lie in [0, 1] and each row sums to 1; if they are probabilities, give "
                "as_logits(probs)",
                stacklevel=2,
            )
        if "features" in self.needs and evidence.features is not None:
            evidence = evidence._replace(features=check_features(evidence.features, len(labels), where))
        evidence = evidence._replace(logits=at_least_float32(logits.detach()))
        labels = labels.detach().long()
        self.num_classes, self.report = 0, None  # a fit that fails leaves nothing that could be used
        # State made in inference mode could not be used where gradients are asked for.
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(labels):
            optimum = self.fit_evidence(evidence, labels) if logits.shape[1] > 1 else Optimum()
            self.num_classes = logits.shape[1]
            self.report = self._reported(optimum, evidence, labels)
        for problem in self.report.problems:
            warnings.warn(f"{where}: {problem}", stacklevel=2)
        return self

    def _complete(self, evidence: Evidence, where: str) -> Evidence:
        """Refuse what is missing; without logits the network is asked for them."""
        lacking = missing(evidence, self.needs)
        if lacking:
            raise ValueError(f"{where}: {lacking} is missing; give it for the same rows")
        if evidence.logits is None and evidence.network is not None and evidence.images is not None:
            return evidence._replace(logits=asked_logits(evidence.network, evidence.images))
        return evidence

    def _reported(self, optimum: Optimum, evidence: Evidence, labels: Tensor) -> FitReport:
        assert evidence.logits is not None
        before, after = FitValues(), FitValues()
        seen, features = self.logits_of(evidence), evidence.features
        for rows in torch.split(torch.arange(len(labels), device=labels.device), max(1, _BLOCK // seen.shape[1])):
            before.add(evidence.logits[rows], labels[rows])
            if seen.shape[1] == 1:
                calibrated = Prediction(torch.zeros_like(seen[rows]))
            else:
                calibrated = self.of_fitted_rows(seen[rows], None if features is None else features[rows], rows)
            after.add(calibrated.logits, labels[rows], calibrated.confidence)
        notes = list(optimum.notes)
        absent = (torch.bincount(labels, minlength=seen.shape[1]) == 0).nonzero().squeeze(1).tolist()
        if absent and self.per_class:
            which = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
            notes.append(f"{len(absent)} of {seen.shape[1]} classes have no calibration rows (class {which})")
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

    # --- use ---------------------------------------------------------------------------------------------------------

    def forward(
        self,
        logits: Tensor | None = None,
        features: Tensor | None = None,
        network: Network | None = None,
        images: Images | None = None,
    ) -> Tensor:
        """Calibrate.

        Args:
            logits: ``(N, K)``, floating point; half precision is widened to float32.
            features: ``(N, d)`` for calibrators that need them.
            network: In evaluation mode, for calibrators that need it.
            images: As in `fit`, for calibrators that need the network.

        Returns:
            Log-probabilities ``(N, K)``, float32 or float64.

        Raises:
            RuntimeError: It was not fitted.
            TypeError: The logits are not a tensor.
            ValueError: Another K than it was fitted to, or something is missing.
        """
        seen, features = self._seen(Evidence(logits, features, network, images))
        if self.num_classes == 1:
            return torch.zeros_like(seen)
        with _no_autocast(seen):
            return self.transform(seen, features)

    def predict(
        self,
        logits: Tensor | None = None,
        features: Tensor | None = None,
        network: Network | None = None,
        images: Images | None = None,
    ) -> Prediction:
        """Calibrated log-probabilities, and the confidence where it is not the largest of them.

        Args:
            logits: As in `forward`.
            features: As in `forward`.
            network: As in `forward`.
            images: As in `forward`.

        Returns:
            Both, as `calib_lightning.metrics.EvaluationState.update` takes them.
        """
        seen, features = self._seen(Evidence(logits, features, network, images))
        if self.num_classes == 1:
            return Prediction(torch.zeros_like(seen))
        with _no_autocast(seen):
            return self.with_confidence(seen, features)

    def _seen(self, evidence: Evidence) -> tuple[Tensor, Tensor | None]:
        """Checked logits, and features where they are needed."""
        name = type(self).__name__
        if not self.fitted:
            raise RuntimeError(f"{name} is not fitted: call fit or load a fitted one.")
        lacking = missing(evidence, self.needs)
        if lacking:
            raise ValueError(f"{name} needs {lacking}.")
        logits = self.logits_of(evidence)
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name}: logits must be a tensor, got {type(logits).__name__}")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{name} was fitted to {self.num_classes} classes, but the logits have shape {tuple(logits.shape)}; "
                f"give (N, {self.num_classes})."
            )
        features = None
        if "features" in self.needs and evidence.features is not None:
            features = at_least_float32(evidence.features)
            check_shape_of_features(features, len(logits), name)
        return at_least_float32(logits), features

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
