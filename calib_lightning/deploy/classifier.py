"""A network and its calibration as one module that can be kept and shipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypedDict

import torch
from torch import Tensor, nn

import calib_lightning
from calib_lightning.core.module import ClassificationModule
from calib_lightning.deploy.decision import Decision, OperatingPoint, decide, operating_point
from calib_lightning.deploy.preprocessing import Preprocessing
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.evidence import Evidence
from calib_lightning.types import Prediction
from calib_lightning.utils.described import Spec


class Metadata(TypedDict):
    """What a file says about its classifier; plain data.

    Attributes:
        calib_lightning: Version that wrote it.
        calibrator: How the calibrator is written.
        calibrator_spec: How it is built.
        temperature: That of the calibrator; ``None`` where it has none.
        num_classes: K.
        classes: Names of the classes, ``None`` where they are not known.
        preprocessing: How images are prepared, ``None`` where it is not known.
        operating_point: Threshold, wanted risk, risk, coverage and rows; ``None`` where no threshold was chosen. A
            threshold that accepts nothing is the string ``"inf"``, its risk ``None``.
    """

    calib_lightning: str
    calibrator: str
    calibrator_spec: Spec
    temperature: float | None
    num_classes: int
    classes: list[str] | None
    preprocessing: dict[str, Any] | None
    operating_point: dict[str, Any] | None


class CalibratedClassifier(nn.Module):
    """Network and calibrator as one module, images to calibrated log-probabilities.

    It takes the network and the calibrator as they are, not copies, onto the device of the network and into evaluation
    mode, where it stays: a calibration does not hold for a network that trains.

    Args:
        network: Maps images ``(N, C, H, W)`` to logits ``(N, K)``: any module, from timm, of this package or your own.
        calibrator: Fitted, or to be fitted with `fit`; any, also one that needs features or the network.
        preprocessing: How an image file becomes an image, for ``calib classify``.
        classes: K names; those of a `ClassificationModule` that knows them by default.
        features: Name of the network's submodule whose output is the features ``(N, d)``, for calibrators that need
            them.

    Attributes:
        operating_point: The threshold below which `predict` abstains; ``None`` until `set_threshold`.

    Raises:
        TypeError: ``network`` or ``calibrator`` is not what is asked for.
        ValueError: The number of names is not that of the classes, or ``features`` is missing or no submodule.

    Example:
        >>> from calib_lightning.posthoc import FixedTemperature
        >>> calibrator = FixedTemperature(1.5).fit(torch.randn(9, 3), torch.arange(9) % 3)
        >>> classifier = CalibratedClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), calibrator)
        >>> classifier(torch.zeros(2, 1, 8, 8)).exp().sum(dim=1)
        tensor([1., 1.], grad_fn=<SumBackward1>)
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
            raise TypeError(f"network is {network!r:.100}; it must be a torch.nn.Module that maps images to logits")
        if not isinstance(calibrator, Calibrator):
            raise TypeError(f"calibrator is {calibrator!r:.100}; it must be a calibrator such as Temperature()")
        if "features" in calibrator.needs and features is None:
            raise ValueError(
                f"{calibrator.name} needs features: name the network's submodule that gives them, as features='pool'"
            )
        if features is not None and features not in dict(network.named_modules()):
            names = ", ".join(name for name, _ in network.named_children())
            raise ValueError(f"features={features!r} is no submodule of {type(network).__name__}; it has {names}")
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
        """Where the network is."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode; see the class.

        Args:
            mode: Not used.

        Returns:
            Itself.
        """
        return super().train(False)

    # --- use ---------------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Calibrated log-probabilities.

        Args:
            image: ``(N, C, H, W)``, as the network was trained on.

        Returns:
            ``(N, K)``, float32 or float64.

        Raises:
            RuntimeError: The calibrator is not fitted.
            ValueError: The network gives another K than the calibrator was fitted to.
        """
        return self.outputs(image).logits

    def outputs(self, image: Tensor) -> Prediction:
        """Calibrated log-probabilities, and the confidence where it is not the largest of them.

        Args:
            image: As in `forward`.

        Returns:
            Log-probabilities ``(N, K)`` in place of logits; and the confidence ``(N,)``, or ``None``.
        """
        return self.calibrator.predict(*self.evidence(image))

    def evidence(self, image: Tensor) -> Evidence:
        """What the calibrator looks at: logits, features, or the network and the images.

        Args:
            image: As in `forward`.

        Returns:
            As much as the calibrator needs.

        Raises:
            TypeError: The network does not return one tensor.
            ValueError: The submodule of the features does not run once.
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
                f"features={self.features!r}: this submodule ran {len(caught)} times and must run once and return a "
                "tensor; name another"
            )
        return logits, caught[0].flatten(1)

    @torch.no_grad()
    def predict(self, image: Tensor, threshold: float | None = None) -> Decision:
        """Label, confidence and whether to abstain.

        Args:
            image: As in `forward`, on any device and in any floating dtype: it is cast to that of the network.
            threshold: Confidence below which to abstain; that of `operating_point` by default, and without one nothing
                abstains.

        Returns:
            All three, each ``(N,)``.
        """
        self.eval()  # the network may have been trained on since
        if threshold is None:
            threshold = 0.0 if self.operating_point is None else self.operating_point.threshold
        return decide(*self.outputs(self._as_weights(image)), threshold)

    # --- fits --------------------------------------------------------------------------------------------------------

    def fit(self, loader: Iterable[Any]) -> Self:
        """Fit the calibrator to held-out images, in one pass through the network; an older threshold is dropped.

        Args:
            loader: Batches ``(image, label, ...)``, or dicts with ``image`` and ``label``, of images that the network
                was not trained on.

        Returns:
            Itself; how it went is in ``calibrator.report``.

        Raises:
            TypeError: A batch is not of this form.
            ValueError: There are no batches, or an invalid value.

        Example:
            ``CalibratedClassifier(network, Temperature()).fit(data.calibration_dataloader())``
        """
        self.operating_point = None
        evidence, labels = self._collected(loader)
        self.calibrator.fit(labels=labels, **evidence._asdict())
        self._check_classes()
        return self

    def set_threshold(
        self, rows: Iterable[Any] | Tensor, labels: Tensor | None = None, *, risk: float = 0.05
    ) -> OperatingPoint:
        """Choose the lowest confidence at which the error rate of what is accepted is at most ``risk``.

        On the rows that the calibrator was fitted to the risk looks a little smaller than it is; other held-out rows
        are better. See `calib_lightning.deploy.operating_point`.

        Args:
            rows: Batches ``(image, label, ...)`` of held-out images, or logits ``(N, K)`` of the network on them where
                there is no perturbation.
            labels: Class labels ``(N,)`` of the logits.
            risk: Wanted error rate of the accepted rows, in ``[0, 1]``.

        Returns:
            The operating point, which is kept.

        Raises:
            TypeError: A batch is not of this form, or labels of logits are missing.
            ValueError: There are no rows, an invalid value, ``risk`` outside ``[0, 1]``, or logits where there is a
                perturbation.
        """
        if not isinstance(rows, Tensor):
            evidence, labels = self._collected(rows)
        elif "network" in self.calibrator.needs:
            raise ValueError(
                f"set_threshold: logits were given, but {self.calibrator.name} changes the images before the network "
                "sees them; give batches (image, label, ...)"
            )
        elif labels is None:
            raise TypeError("set_threshold: logits were given without labels; give the labels (N,) of the same rows")
        else:
            evidence, labels = Evidence(rows.to(self.device)), labels.to(self.device)
        with torch.no_grad():
            prediction = self.calibrator.predict(*evidence)
        self.operating_point = operating_point(prediction.logits, labels, prediction.confidence, risk=risk)
        return self.operating_point

    @torch.no_grad()
    def _collected(self, loader: Iterable[Any]) -> tuple[Evidence, Tensor]:
        """Evidence and labels of all batches; images are kept only for a calibrator that needs them."""
        self.eval()
        parts: list[Evidence] = []
        labels: list[Tensor] = []
        for batch in loader:
            found = [batch.get("image"), batch.get("label")] if isinstance(batch, Mapping) else batch
            if not isinstance(found, list | tuple) or len(found) < 2 or not isinstance(found[0], Tensor):
                raise TypeError(
                    f"the loader gives {type(batch).__name__}; batches must be tuples (image, label, ...) of tensors, "
                    "or dicts with 'image' and 'label'"
                )
            if found[1] is None:
                raise TypeError(f"the loader gives a dict without 'label', with the keys {', '.join(map(repr, batch))}")
            parts.append(self.evidence(found[0].to(self.device)))
            labels.append(torch.as_tensor(found[1]).to(self.device))
        if not parts:
            raise ValueError("the loader gives no batches; give one of held-out images with labels")
        asks_network = "network" in self.calibrator.needs
        return Evidence(
            _joined([part.logits for part in parts]),
            _joined([part.features for part in parts]),
            self.network if asks_network else None,
            _joined([part.images for part in parts]) if asks_network else None,
        ), torch.cat(labels)

    # --- facts -------------------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> Metadata:
        """What its files say about it; plain data."""
        temperature = getattr(self.calibrator, "temperature", None) if self.calibrator.fitted else None
        temperature = temperature if isinstance(temperature, float) else None
        return Metadata(
            calib_lightning=calib_lightning.__version__,
            calibrator=self.calibrator.name,
            calibrator_spec=self.calibrator.spec,
            temperature=temperature,
            num_classes=self.calibrator.num_classes,
            classes=None if self.classes is None else list(self.classes),
            preprocessing=None if self.preprocessing is None else self.preprocessing.record,
            operating_point=None if self.operating_point is None else self.operating_point.record,
        )

    def _check_classes(self) -> None:
        known = self.calibrator.num_classes
        if self.classes is not None and known and len(self.classes) != known:
            raise ValueError(f"{len(self.classes)} names of classes were given for {known} classes; give one for each")

    def _as_weights(self, image: Tensor) -> Tensor:
        dtypes = [parameter.dtype for parameter in self.network.parameters() if parameter.is_floating_point()]
        return image.to(self.device, dtypes[0] if dtypes and image.is_floating_point() else image.dtype)

    def _logits(self, image: Tensor) -> Tensor:
        logits: Any = self.network(image)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{type(self.network).__name__} returns {type(logits).__name__}; it must return logits (N, K) alone: "
                "wrap it in a module that does"
            )
        return logits


def _joined(parts: list[Any]) -> Any:
    """Tensors as one; ``None`` where there are none."""
    return None if parts[0] is None else torch.cat(parts)
