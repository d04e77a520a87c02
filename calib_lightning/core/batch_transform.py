"""Batch transforms: training methods that mix or multiply images and work with any criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from torch import Tensor, nn

from calib_lightning.core.encoders import Encoder
from calib_lightning.types import Batch


class Classifier(Protocol):
    """What a batch transform may use of the `ClassificationModule` that it trains."""

    @property
    def encoder(self) -> Encoder:
        """Maps images to features."""

    @property
    def head(self) -> nn.Module:
        """Maps features to logits."""

    def __call__(self, image: Tensor) -> Any:
        """Logits ``(N, K)`` of images."""

    def criterion_value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Criterion (scalar) of logits and labels, in float32 or wider."""


class BatchTransform(nn.Module, ABC):
    """Replaces "forward, then criterion" in a training step; evaluation is unaffected.

    Passed to a module as ``batch_transform``, it composes with every method whose loss is a criterion:
    ``Focal(10, batch_transform=MixupTransform())``. Random numbers come from the global generators, which are seeded
    before each step. It has no state that a checkpoint would need to store.
    """

    def attach(self, module: Classifier) -> None:
        """Reject a module that this transform cannot work with; called once, while the module is built.

        Args:
            module: The module, with encoder, head and criterion.

        Raises:
            ValueError: If the module and the transform are incompatible.
        """

    def views(self, normalize: nn.Module, seed: int) -> nn.Module | None:
        """Return the data module's replacement for ``normalize`` on training images; ``None`` keeps it.

        Args:
            normalize: Maps uint8 images to standardised ones.
            seed: Seed of the run.

        Returns:
            A transform of uint8 batches into several views ``(N, V, C, H, W)``, or ``None``.
        """
        return None

    @abstractmethod
    def loss(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the loss of one training batch.

        Args:
            module: The module; see `Classifier`.
            batch: Images and labels.

        Returns:
            Loss (scalar), and logits ``(N, K)`` that belong to ``batch.label``, for the training metrics.
        """


def attached(transform: Any, module: Classifier) -> BatchTransform | None:
    """Return the batch transform, or ``None``, once it has been checked that it can work with the module."""
    if transform is None:
        return None
    if not isinstance(transform, BatchTransform):
        raise TypeError(f"batch_transform is {transform!r}; it must be an object such as MixupTransform().")
    transform.attach(module)
    return transform
