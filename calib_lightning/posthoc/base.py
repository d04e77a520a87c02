"""What all calibrators share: one way to fit and apply them, checks, and state that is saved in checkpoints."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32, no_autocast
from calib_lightning.posthoc.evidence import (
    Evidence,
    Images,
    Need,
    Network,
    check_shape_of_features,
    checked_rows,
    frozen,
    missing,
    warned_of_probs,
    with_logits,
)
from calib_lightning.posthoc.fit_report import FitReport, FitValues, Optimum, notes_on_absent_classes
from calib_lightning.posthoc.state import FittedState
from calib_lightning.types import Prediction
from calib_lightning.utils.described import Described

_BLOCK = 2**18
ANY_CLASSES = -1
"""K of a fit of version 0.1 that did not record it."""


class Calibrator(FittedState, Described, ABC):
    """Maps a network's outputs to calibrated log-probabilities; fitted to rows that the network was not trained on.

    Every calibrator is fitted with `fit` and applied with `predict`. `needs` names the arguments that it uses; the
    others are ignored. A caller that has an `Evidence` therefore treats all calibrators alike:
    ``calibrator.fit(labels=labels, **evidence._asdict())``, ``calibrator.predict(*evidence)``.

    A subclass names its state with `register_state` and implements `transform` and `fit_rows`, which assigns the state
    as its last step. State is kept in buffers, so that it moves with the module and is saved in checkpoints.

    Attributes:
        needs: Some of ``"logits"``, ``"features"`` and ``"network"``, which stands for network and images.
        preserves_argmax: Whether the predicted class never changes.
        full_distribution: Whether all K probabilities are calibrated, not only that of the predicted class.
        per_class: Whether it has parameters for every class, which need rows of every class.
        num_classes: K; 0 before the fit.
        class_names: The classes of the fit in their order, as `calib_lightning.calibrate` knows them, or ``None``.
        report: How the last fit went; ``None`` before.
    """

    needs: ClassVar[tuple[Need, ...]] = ("logits",)
    preserves_argmax: ClassVar[bool]
    full_distribution: ClassVar[bool] = True
    per_class: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 0
        self.class_names: tuple[str, ...] | None = None
        self.report: FitReport | None = None

    @property
    def fitted(self) -> bool:
        """Whether it has been fitted."""
        return self.num_classes > 0

    @property
    def details(self) -> dict[str, Any]:
        """More about the fit than `report` has, as plain data."""
        return {}

    # --- what a subclass implements ----------------------------------------------------------------------------------

    @abstractmethod
    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Fit to checked rows and assign the state.

        Args:
            logits: ``(N, K)`` float32 or float64, finite; N >= 1, K >= 2.
            labels: ``(N,)`` int64 in ``0..K-1``.
            features: ``(N, d)``, finite, if the calibrator needs them.

        Returns:
            How the fit went.
        """

    @abstractmethod
    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Calibrate; must be traceable by `torch.export`, so no Python branch may depend on the values of a tensor.

        Args:
            logits: ``(N, K)`` float32 or float64; K >= 2.
            features: ``(N, d)`` if the calibrator needs them.

        Returns:
            Log-probabilities ``(N, K)`` in the dtype of the logits.
        """

    def with_confidence(self, logits: Tensor, features: Tensor | None) -> Prediction:
        """Return the result of `transform`, and the confidence ``(N,)`` if it is not the largest probability."""
        return Prediction(self.transform(logits, features))

    def of_fitted_rows(self, logits: Tensor, features: Tensor | None, place: Tensor) -> Prediction:
        """Apply to rows of the fit as if they were new.

        Only a calibrator that compares a row with those of its fit overrides this, so that no row finds itself.

        Args:
            logits: As in `transform`, of some rows of the fit.
            features: As in `transform`.
            place: Positions ``(N,)`` of these rows in the fit, int64.

        Returns:
            As `with_confidence`.
        """
        return self.with_confidence(logits, features)

    def fit_evidence(self, evidence: Evidence, labels: Tensor) -> Optimum:
        """Fit to checked evidence; overridden only by calibrators that use the network."""
        assert evidence.logits is not None
        return self.fit_rows(evidence.logits, labels, evidence.features)

    def logits_of(self, evidence: Evidence) -> Tensor:
        """Return the logits ``(N, K)`` for `transform`; calibrators that use the network run it."""
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
        """Fit to the calibration split: held-out rows, used for neither training nor testing.

        Args:
            logits: ``(N, K)``, floating point, N >= 1; half precision is widened. Pass probabilities through
                `as_logits`. Calibrators that need the network compute them if they are ``None``.
            labels: Class labels ``(N,)``, integer, in ``0..K-1``.
            features: ``(N, d)``, floating point, for calibrators that need them.
            network: For calibrators that need it; a module is used in evaluation mode.
            images: ``(N, C, H, W)``, normalised as the network expects, for calibrators that need the network; or
                batches in the order of the labels.

        Returns:
            The calibrator itself. `report` says how the fit went, and warnings name its problems.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, an invalid value (the first bad row is named), no rows, or a missing argument.
        """
        where = f"{type(self).__name__}.fit"
        evidence = self._needed(Evidence(logits, features, network, images), where)
        evidence, labels = checked_rows(evidence, labels, where)
        assert evidence.logits is not None
        classes = evidence.logits.shape[1]
        self.num_classes, self.report, self.class_names = 0, None, None  # after a failed fit it counts as not fitted
        # Tensors created in inference mode could not be used with gradients later.
        with torch.inference_mode(False), torch.no_grad(), no_autocast(labels), frozen(evidence.network):
            optimum = self.fit_evidence(evidence, labels) if classes > 1 else Optimum()
            self.num_classes = classes
            self.report = self._reported(optimum, evidence, labels)
        for problem in self.report.problems:
            warnings.warn(f"{where}: {problem}", stacklevel=2)
        return self

    def _needed(self, evidence: Evidence, where: str) -> Evidence:
        """Raise if a needed argument is missing, and drop those that are not needed."""
        lacking = missing(evidence, self.needs)
        if lacking:
            raise ValueError(f"{where} needs {lacking}. Pass it for the same rows.")
        features = evidence.features if "features" in self.needs else None
        if "network" in self.needs:
            return evidence._replace(features=features)
        return Evidence(evidence.logits, features)

    def _reported(self, optimum: Optimum, evidence: Evidence, labels: Tensor) -> FitReport:
        """Compare the rows of the fit before and after."""
        assert evidence.logits is not None
        before, after = FitValues(), FitValues()
        seen = self.logits_of(evidence) if self.num_classes > 1 else evidence.logits
        # The network may be on another device than the rows.
        given, labels = evidence.logits.to(seen.device), labels.to(seen.device)
        features = None if evidence.features is None else evidence.features.to(seen.device)
        for rows in torch.split(torch.arange(len(labels), device=labels.device), max(1, _BLOCK // seen.shape[1])):
            before.add(given[rows], labels[rows])
            if seen.shape[1] == 1:
                calibrated = Prediction(torch.zeros_like(seen[rows]))
            else:
                calibrated = self.of_fitted_rows(seen[rows], None if features is None else features[rows], rows)
            after.add(calibrated.logits, labels[rows], calibrated.confidence)
        notes = list(optimum.notes)
        if self.per_class:
            notes += notes_on_absent_classes(labels, seen.shape[1])
        return FitReport.of(self.name, optimum._replace(notes=tuple(notes)), before, after)

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
            RuntimeError: The calibrator is not fitted.
            TypeError: Logits or images of a wrong type.
            ValueError: A wrong shape, another K than in the fit, or a missing argument.
        """
        seen, features = self._seen(Evidence(logits, features, network, images))
        if self.num_classes == 1:
            return torch.zeros_like(seen)
        with no_autocast(seen):
            return self.transform(seen, features)

    def predict(
        self,
        logits: Tensor | None = None,
        features: Tensor | None = None,
        network: Network | None = None,
        images: Images | None = None,
    ) -> Prediction:
        """Calibrate, and return the confidence too if it is not the largest probability.

        Args:
            logits: As in `forward`.
            features: As in `forward`.
            network: As in `forward`.
            images: As in `forward`.

        Returns:
            Log-probabilities and confidence, as `calib_lightning.metrics.EvaluationState.update` takes them.
        """
        # An exported graph has no modes; elsewhere a network in training mode would answer otherwise.
        with frozen(network if "network" in self.needs and not torch.compiler.is_compiling() else None):
            seen, features = self._seen(Evidence(logits, features, network, images))
        if self.num_classes == 1:
            return Prediction(torch.zeros_like(seen))
        with no_autocast(seen):
            return self.with_confidence(seen, features)

    def _seen(self, evidence: Evidence) -> tuple[Tensor, Tensor | None]:
        """Return checked logits, and the features if they are needed."""
        name = type(self).__name__
        self.check_fitted()
        evidence = self._needed(evidence, name)
        # With one class there is nothing to calibrate, and parts of the calibrator may not be fitted.
        logits = self.logits_of(evidence) if self.num_classes != 1 else with_logits(evidence).logits
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name}: logits is {type(logits).__name__}; it must be a tensor.")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"{name} was fitted to {self.num_classes} classes: logits has shape {tuple(logits.shape)}; it must "
                f"have shape (N, {self.num_classes})."
            )
        features = evidence.features
        if features is not None:
            check_shape_of_features(features, logits.shape[0], name)  # `len` would fix the rows of an exported graph
            features = at_least_float32(features)
            features = features if features.device == logits.device else features.to(logits.device)
        return warned_of_probs(at_least_float32(logits), name), features

    def get_extra_state(self) -> dict[str, Any]:
        """Return K, the report and the names of the classes as plain data."""
        report = None if self.report is None else {**self.report._asdict(), "notes": list(self.report.notes)}
        return {"num_classes": self.num_classes, "report": report, "class_names": self.class_names}

    def set_extra_state(self, state: Any) -> None:
        """Restore K, the report and the names of the classes from a checkpoint.

        Raises:
            ValueError: The state is damaged.
        """
        try:
            self.num_classes = int(state["num_classes"])
            report, names = state["report"], state.get("class_names")
            self.class_names = None if names is None else tuple(names)
            self.report = None if report is None else FitReport(**{**report, "notes": tuple(report["notes"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The state of {type(self).__name__} is damaged: {error!r}.") from None
