"""A network and its calibrator as one module to save, export and deploy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from calib_lightning.core.module import ClassificationModule
from calib_lightning.core.own_data import BatchParts, image_and_label
from calib_lightning.deploy.decision import Decision, OperatingPoint, decide, operating_point
from calib_lightning.deploy.metadata import Metadata, metadata_of
from calib_lightning.deploy.preprocessing import Preprocessing
from calib_lightning.functional import binary_labels, logits_of, two_columns
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.evidence import Evidence
from calib_lightning.types import Prediction


class CalibratedClassifier(nn.Module):
    """Network and calibrator as one module, from images to calibrated log-probabilities.

    The network and the calibrator are not copied. Both are moved to the device of the network and stay in evaluation
    mode, because a calibration is not valid for a network that is being trained.

    Args:
        network: Maps images ``(N, C, H, W)`` to logits ``(N, K)``: a timm model, a `ClassificationModule` or any other
            module. One logit z of a binary network, ``(N,)`` or ``(N, 1)``, becomes ``(0, z)``: K = 2. It may also
            return a mapping or an object with such ``logits``.
        calibrator: Any calibrator, fitted or to be fitted with `fit`, including those that need features or the
            network.
        preprocessing: Converts an image file to the network's input, for ``calib classify``.
        classes: K names; by default those of a `ClassificationModule`, if it has them.
        features: Name of the submodule that outputs the features ``(N, d)``, for calibrators that need them.

    Attributes:
        operating_point: The threshold below which `predict` abstains; ``None`` until `set_threshold`.

    Raises:
        TypeError: ``network`` is not a module or ``calibrator`` is not a calibrator.
        ValueError: The number of names differs from K, or ``features`` is missing or not a submodule.

    Example:
        >>> from calib_lightning.posthoc import FixedTemperature
        >>> calibrator = FixedTemperature(1.5).fit(torch.randn(9, 3), torch.arange(9) % 3)
        >>> classifier = CalibratedClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), calibrator)
        >>> classifier(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: nn.Module,
        calibrator: Calibrator,
        *,
        preprocessing: Preprocessing | None = None,
        classes: Sequence[str] | None = None,
        features: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is {network!r:.100}; it must be a torch.nn.Module that maps images to logits.")
        if not isinstance(calibrator, Calibrator):
            raise TypeError(f"calibrator is {calibrator!r:.100}; it must be a calibrator such as Temperature().")
        if "features" in calibrator.needs and features is None:
            raise ValueError(
                f"features is None, but {calibrator.name} needs features; it must be the name of the submodule that "
                "outputs them. Pass features='pool', for example."
            )
        if features is not None and features not in dict(network.named_modules()):
            names = ", ".join(name for name, _ in network.named_children())
            owner = type(network).__name__
            raise ValueError(f"features is {features!r}; it must be a submodule of {owner}, which has {names}.")
        self.network, self.calibrator = network, calibrator
        self.preprocessing, self.features = preprocessing, features
        if classes is None and isinstance(network, ClassificationModule):
            classes = network.class_names
        self.classes = None if classes is None else tuple(classes)
        self.operating_point: OperatingPoint | None = None
        self._check_classes()
        self.to(self.device)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever ``mode`` is.

        Args:
            mode: Ignored.

        Returns:
            Itself.
        """
        return super().train(False)

    # --- use ---------------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Calibrated log-probabilities.

        Args:
            image: ``(N, C, H, W)``, preprocessed as in training.

        Returns:
            ``(N, K)``, float32 or float64.

        Raises:
            RuntimeError: The calibrator is not fitted.
            ValueError: The K of the network is not that of the calibrator.
        """
        return self.outputs(image).logits

    def outputs(self, image: Tensor) -> Prediction:
        """Calibrated log-probabilities, and the confidence if it is not the largest probability.

        Args:
            image: As in `forward`.

        Returns:
            Log-probabilities ``(N, K)``, in the field ``logits``, and the confidence ``(N,)`` or ``None``.
        """
        return self.calibrator.predict(*self.evidence(image))

    def evidence(self, image: Tensor) -> Evidence:
        """Inputs of the calibrator: logits, features, or the network and the images.

        Args:
            image: As in `forward`.

        Returns:
            At least what the calibrator needs.

        Raises:
            TypeError: The network does not return logits.
            ValueError: The submodule of the features does not run exactly once.
        """
        if "features" in self.calibrator.needs:
            return Evidence(*self._with_features(image), self.network, image)
        logits = self._logits(image) if "logits" in self.calibrator.needs else None
        return Evidence(logits, None, self.network, image)

    def _with_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        caught: list[Tensor] = []
        layer = self.network.get_submodule(self.features or "")
        handle = layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
        try:
            logits = self._logits(image)
        finally:
            handle.remove()
        if len(caught) != 1 or not isinstance(caught[0], Tensor):
            raise ValueError(
                f"features is {self.features!r}, a submodule that ran {len(caught)} times; it must run once and "
                "return a tensor. Choose another submodule."
            )
        return logits, caught[0].flatten(1)

    @torch.no_grad()
    def predict(self, image: Tensor, threshold: float | None = None) -> Decision:
        """Label, confidence and whether to abstain.

        Args:
            image: As in `forward`, on any device and in any floating-point dtype; it is converted to the network's.
            threshold: Confidence below which to abstain. Default: the threshold of `operating_point`, or 0 without one.

        Returns:
            The decision, whose fields have shape ``(N,)``.
        """
        self.eval()  # the network may have been trained since
        if threshold is None:
            threshold = 0.0 if self.operating_point is None else self.operating_point.threshold
        return decide(*self.outputs(self._as_weights(image)), threshold)

    # --- fits --------------------------------------------------------------------------------------------------------

    def fit(self, loader: Iterable[Any], batch: BatchParts | None = None) -> Self:
        """Fit the calibrator to held-out images, with one forward pass; any earlier threshold is dropped.

        Args:
            loader: Batches ``(image, label, ...)``, or dicts with ``image`` and ``label``, of images that the network
                was not trained on.
            batch: Where they are in other batches: two keys or positions, or a function ``batch -> (image, label)``.

        Returns:
            Itself; ``calibrator.report`` describes the fit.

        Raises:
            TypeError: A batch has another form.
            ValueError: There are no batches, or a value is invalid.

        Example:
            ``CalibratedClassifier(network, Temperature()).fit(data.calibration_dataloader())``
        """
        self.operating_point = None
        evidence, labels = self._collected(loader, batch)
        self.calibrator.fit(labels=labels, **evidence._asdict())
        self._check_classes()
        return self

    def set_threshold(
        self,
        rows: Iterable[Any] | Tensor,
        labels: Tensor | None = None,
        *,
        risk: float = 0.05,
        batch: BatchParts | None = None,
    ) -> OperatingPoint:
        """Choose the lowest threshold at which the error rate of the accepted rows is at most ``risk``.

        On the rows that the calibrator was fitted to, the risk is slightly underestimated; other held-out rows are
        better. See `calib_lightning.deploy.operating_point`.

        Args:
            rows: Batches ``(image, label, ...)`` of held-out images, or the network's logits ``(N, K)`` of them if the
                calibrator does not change the images.
            labels: Class labels ``(N,)`` of the logits.
            risk: Maximum error rate of the accepted rows, in ``[0, 1]``.
            batch: As in `fit`.

        Returns:
            The operating point, also stored as an attribute.

        Raises:
            TypeError: A batch has another form, or the labels of logits are missing.
            ValueError: There are no rows, a value is invalid, ``risk`` is outside ``[0, 1]``, or logits were given but
                the calibrator changes the images.
        """
        if not isinstance(rows, Tensor):
            evidence, labels = self._collected(rows, batch)
        elif "network" in self.calibrator.needs:
            raise ValueError(
                f"set_threshold: logits were given, but {self.calibrator.name} changes the images before they enter "
                "the network. Pass batches (image, label, ...)."
            )
        elif labels is None:
            raise TypeError("set_threshold: logits were given without labels. Pass the labels (N,) of the same rows.")
        else:
            evidence, labels = Evidence(two_columns(rows.to(self.device))), binary_labels(labels).to(self.device)
        with torch.no_grad():
            prediction = self.calibrator.predict(*evidence)
        self.operating_point = operating_point(prediction.logits, labels, prediction.confidence, risk=risk)
        return self.operating_point

    @torch.no_grad()
    def _collected(self, loader: Iterable[Any], where: BatchParts | None) -> tuple[Evidence, Tensor]:
        """Evidence and labels of all batches; images are kept only if the calibrator needs the network."""
        self.eval()
        asks_network = "network" in self.calibrator.needs
        parts: list[Evidence] = []
        labels: list[Tensor] = []
        for batch in loader:
            image, label = image_and_label(batch, type(self).__name__, where)
            if not isinstance(image, Tensor):
                raise TypeError(f"the input in a batch is {type(image).__name__}; it must be a tensor (N, C, H, W).")
            part = self.evidence(image.to(self.device))
            parts.append(part._replace(network=None, images=image.cpu() if asks_network else None))
            labels.append(binary_labels(label).to(self.device))
        if not parts:
            raise ValueError("the loader has no batches; it must have at least one, of held-out images with labels.")
        return Evidence(
            _joined([part.logits for part in parts]),
            _joined([part.features for part in parts]),
            self.network if asks_network else None,
            _joined([part.images for part in parts]) if asks_network else None,
        ), torch.cat(labels)

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> Metadata:
        """Metadata for its files, as plain data."""
        return metadata_of(self.calibrator, self.classes, self.preprocessing, self.operating_point)

    def _check_classes(self) -> None:
        known = self.calibrator.num_classes
        if self.classes is not None and known > 0 and len(self.classes) != known:
            raise ValueError(f"classes has {len(self.classes)} names; it must have {known}, one for each class.")

    def _as_weights(self, image: Tensor) -> Tensor:
        dtypes = [parameter.dtype for parameter in self.network.parameters() if parameter.is_floating_point()]
        return image.to(self.device, dtypes[0] if dtypes and image.is_floating_point() else image.dtype)

    def _logits(self, image: Tensor) -> Tensor:
        return logits_of(self.network(image), image.shape[0])  # len() would fix it in an export


def _joined(parts: list[Any]) -> Any:
    """Concatenate tensors; ``None`` if the parts are ``None``."""
    return None if parts[0] is None else torch.cat(parts)
