"""Types shared by all parts of the package; this module imports nothing else of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:  # metrics import this module, but never Lightning
    from lightning.pytorch import LightningModule, Trainer

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


class FeatureFeed(Protocol):
    """Stored features on their way to a head, as `Views.store` returns them."""

    in_use: bool
    """Whether the encoder receives features now: within a training step, and not in a validation."""

    def remove(self) -> None:
        """Let the encoder compute again; a second call has no effect."""


class Views(ABC):
    """How a training stage prepares its images, instead of the data module's augmentation.

    A subclass needs `transform`; the other methods have defaults for views that are images.

    Attributes:
        optional: Whether a stage can do without, if the data cannot change its images.
        stores_features: Whether `store` replaces the images by features, which a frozen encoder has computed once.
    """

    optional: ClassVar[bool] = False
    stores_features: ClassVar[bool] = False

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

    def check(  # noqa: B027  a default: images are always possible
        self,
        trainer: Trainer,
        module: LightningModule,
        encoder: nn.Module,
        head: nn.Module,
        transform: nn.Module | None,
    ) -> None:
        """Reject a run in which the views are impossible, before training starts.

        Args:
            trainer: The trainer.
            module: The module.
            encoder: The frozen encoder.
            head: The head before the switch.
            transform: The batch transform that the stage keeps, if any.

        Raises:
            ValueError: If they are impossible.
        """

    def check_batch(self, batch: Any) -> None:  # noqa: B027  a default
        """Reject batches that the views cannot use; called in the first step of a fit.

        Args:
            batch: A training batch.

        Raises:
            TypeError: If they cannot use it.
        """

    def store(
        self, trainer: Trainer, module: LightningModule, encoder: nn.Module, head: nn.Module, *, resumed: bool
    ) -> FeatureFeed | None:
        """Compute the features of the stage and pass them to its training loader, if these views store features.

        Args:
            trainer: The trainer, within ``fit``, at the start of an epoch or of the fit.
            module: The module, with its new head.
            encoder: The frozen encoder.
            head: The new head.
            resumed: Whether the loader may be in the middle of an epoch, where it continues.

        Returns:
            What feeds the features to the head; ``None`` for images.
        """
        return None
