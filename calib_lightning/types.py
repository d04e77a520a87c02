"""Types shared by all parts of the package; this module imports nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Maps ``(logits (N, K), labels (N,))`` to a scalar loss."""

EncoderSpec = str | dict[str, Any]
"""An encoder's name, or ``{"name": ..., **options}``: plain data that can be stored in a checkpoint."""


class Batch(NamedTuple):
    """One mini-batch, with the position of every sample in its set.

    Attributes:
        image: Images ``(N, C, H, W)``, floating point.
        label: Class labels ``(N,)``, int64 in ``0..K-1``, or -1 if unlabelled.
        index: Position ``(N,)``, int64, of each sample in its split.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, which batches do not need


class Prediction(NamedTuple):
    """A classifier's output for one batch.

    Attributes:
        logits: Unnormalised log-probabilities ``(N, K)``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` in the predicted class, if the method defines its own (a
            confidence network, for example); ``None`` means the largest softmax probability.
    """

    logits: Tensor
    confidence: Tensor | None = None


class Views(ABC):
    """How a training stage prepares its images, instead of the data module's augmentation.

    Attributes:
        optional: Whether a stage can do without, if the data cannot change its images.
    """

    optional: ClassVar[bool] = False

    @abstractmethod
    def transform(self, normalize: nn.Module, augment: nn.Module | None, seed: int) -> nn.Module:
        """Build the transform of the training images.

        All three modules are called as ``module(image, index, epoch)`` with images ``(N, C, H, W)``, positions ``(N,)``
        and the epoch; every random number is a function of (seed, epoch, position).

        Args:
            normalize: Maps uint8 images to standardised ones.
            augment: The data module's random augmentation of uint8 images, or ``None``.
            seed: Seed of the run.

        Returns:
            A module that maps uint8 images to ``(N, C, H, W)``, or to several views ``(N, V, C, H, W)``.
        """
