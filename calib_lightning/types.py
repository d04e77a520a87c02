"""Types that every part of the package shares; this module imports nothing of ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Maps ``(logits (N, K), labels (N,))`` to a scalar loss."""

EncoderSpec = str | dict[str, Any]
"""An encoder's name, or ``{"name": ..., **options}``: plain data, so that it can travel in a checkpoint."""


class Batch(NamedTuple):
    """One mini-batch, with the position of every sample in its set.

    Attributes:
        image: Images ``(N, C, H, W)``, floating point.
        label: Class labels ``(N,)``, int64 in ``0..K-1``, or -1 where a set has none.
        index: Position ``(N,)``, int64, of each sample in the split that it was read from.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple has a method of this name; nobody searches a batch with it


class Prediction(NamedTuple):
    """What a classifier says about one batch.

    Attributes:
        logits: Unnormalised log-probabilities ``(N, K)``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` of the predicted class where the method brings its own
            (a confidence network, say); ``None`` means the largest softmax probability.
    """

    logits: Tensor
    confidence: Tensor | None = None


class Views(ABC):
    """What a stage of training does with its images, in place of the data module's augmentation.

    Attributes:
        optional: Whether a stage can do without, where the data cannot change its images.
    """

    optional: ClassVar[bool] = False

    @abstractmethod
    def transform(self, normalize: nn.Module, augment: nn.Module | None, seed: int) -> nn.Module:
        """Build the transform of the training images.

        All three are called as ``module(image, index, epoch)`` with images ``(N, C, H, W)``, positions ``(N,)`` and the
        epoch's number; every random number depends on (seed, epoch, position) alone.

        Args:
            normalize: Maps uint8 images to standardised ones.
            augment: The data module's own random augmentation of uint8 images, ``None`` where it has none.
            seed: Seed of the run.

        Returns:
            A module that maps uint8 images to ``(N, C, H, W)``, or to several views ``(N, V, C, H, W)``.
        """
