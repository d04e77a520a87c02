"""Batch transforms: training methods that mix or multiply images and work with any criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from calib_lightning.types import Batch

if TYPE_CHECKING:
    from calib_lightning.core.module import ClassificationModule


class BatchTransform(nn.Module, ABC):
    """Replaces "forward, then criterion" in a training step; evaluation is unaffected.

    Passed to a module as ``batch_transform``, it composes with every method whose loss is a criterion:
    ``Focal(10, batch_transform=MixupTransform())``. Random numbers come from the global generators, which are seeded
    before each step. It has no state that a checkpoint would need to store.
    """

    def attach(self, module: ClassificationModule) -> None:
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
    def loss(self, module: ClassificationModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the loss of one training batch.

        Args:
            module: Provides ``module(image)`` and ``module.criterion_value(logits, labels)``.
            batch: Images and labels.

        Returns:
            Loss (scalar), and logits ``(N, K)`` that belong to ``batch.label``, for the training metrics.
        """
