"""A training stage: how it is trained, where it lies in the run, and what subclasses may override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD

from calib_lightning.core.heads import LinearHead, head_size
from calib_lightning.core.learning import learners_of
from calib_lightning.core.own_data import BatchParts, check_parts
from calib_lightning.core.stored_features import caught_features
from calib_lightning.core.submodules import ModuleState, evaluating, submodule_of
from calib_lightning.types import FeatureFeed, Views

HeadFactory = Callable[[int, int], nn.Module]
"""Builds a head from the number of features and of classes, ``(d, K)``."""


class StageTraining:
    """How a stage is trained.

    Args:
        optimizer: Called with the parameters of the new head. Default: SGD, lr 0.1, momentum 0.9, weight decay 5e-4.
        scheduler: Called with the optimiser; stepped once per epoch.
        criterion: Maps ``(logits (N, K), labels (N,))`` to a scalar; replaces the method's own loss and batch
            transform. ``None`` keeps the loss of the previous stage. A module from outside this package needs an
            attribute ``criterion`` that its training step calls.
        views: Transform of the training images, such as ``CleanViews()``; ``CachedFeatures()`` computes the features
            once. ``None`` keeps the data module's augmentation.
        batch_size: Batch size per process; ``None`` keeps that of the data module.
        frozen_bn: ``"eval"`` fixes the statistics of frozen BatchNorm layers; ``"train"`` keeps updating them.

    Raises:
        TypeError: If ``criterion`` is not a module, or ``views`` are not `Views`.
        ValueError: If ``batch_size`` is below 1, or ``frozen_bn`` is unknown or incompatible with cached features.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        scheduler: LRSchedulerCallable | None = None,
        criterion: nn.Module | None = None,
        views: Views | None = None,
        batch_size: int | None = None,
        frozen_bn: str = "eval",
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(
                f"batch_size is {batch_size}; it must be at least 1, or None to keep that of the data module."
            )
        if criterion is not None and not isinstance(criterion, nn.Module):
            raise TypeError(
                f"criterion is {criterion!r}; it must be a module such as nn.CrossEntropyLoss(), which can move to the "
                "device."
            )
        if views is not None and not isinstance(views, Views):
            raise TypeError(f"views is {views!r}; it must be an object of a class derived from Views, as CleanViews().")
        if frozen_bn not in ("eval", "train"):
            raise ValueError(
                f"frozen_bn is {frozen_bn!r}; it must be 'eval' (fixed statistics) or 'train' (updated statistics)."
            )
        if frozen_bn == "train" and views is not None and views.stores_features:
            raise ValueError(
                "frozen_bn is 'train', which is incompatible with CachedFeatures: stored features cannot follow "
                "updated statistics. Use 'eval', or other views."
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.criterion = criterion
        self.views = views
        self.batch_size = batch_size
        self.frozen_bn = frozen_bn


class SwitchOptions(TypedDict, total=False):
    """Options that every kind of switch forwards to `StageSwitch`, typed once."""

    training: StageTraining | None
    encoder: str
    head: str
    init_from: str | None
    batch: BatchParts | None


class Stage(Callback):
    """What a stage is, and where it lies in the run; `StageSwitch`, the class to use, describes the arguments.

    Read on in ``stage_checks.py``, which rejects a stage before training, ``stage_entry.py``, which changes module and
    trainer, and ``stages.py``, which does both at the right time.
    """

    def __init__(
        self,
        at_epoch: int,
        classifier: HeadFactory = LinearHead,
        training: StageTraining | None = None,
        encoder: str = "encoder",
        head: str = "head",
        init_from: str | None = None,
        batch: BatchParts | None = None,
    ) -> None:
        self.at_epoch = at_epoch
        self.classifier = classifier
        self.training = StageTraining() if training is None else training
        self.encoder = encoder
        self.head = head
        self.init_from = init_from
        check_parts(batch, type(self).__name__)
        self.batch = batch
        self.head_loaded = False  # whether the head of init_from fitted
        self.brought = False  # whether a method brought the switch, rather than the trainer
        # state of the run; a checkpoint has current and first_epoch, and whether before is there
        self.before: ModuleState | None = None  # the module before the switch; None until then
        self.current = False  # whether this stage is the latest
        self.first_epoch: int | None = None  # epoch of the switch, once it has taken place
        self.feed: FeatureFeed | None = None  # stored features in use
        self.position: int | None = None  # among the trainer's switches
        self.adds = False  # whether this stage's epochs follow those of the trainer
        self.given_epochs: int | None = None  # the trainer's own max_epochs, if the stages have extended it
        self.looked_at = False  # whether the first batch of the fit has passed look_at

    # --- hooks for subclasses -----------------------------------------------------------------------------------------

    def new_head(self, module: LightningModule, old: nn.Module) -> nn.Module:
        """Build the head of the new stage; called at the switch, and before the weights of a checkpoint are loaded.

        Args:
            module: The module, with its old head.
            old: The old head.

        Returns:
            The new head.
        """
        return self.classifier(*head_size(module, old))

    def freeze(self, module: LightningModule, head: nn.Module) -> None:
        """Choose the trainable parameters: by default those of the head only.

        Args:
            module: The module, with its new head.
            head: The new head.
        """
        module.requires_grad_(False)
        head.requires_grad_(True)

    def look_at(self, batch: Any) -> None:
        """Reject batches that the stage cannot use; called in the first step of a fit.

        Args:
            batch: A training batch.

        Raises:
            TypeError: If the views of the stage cannot use the batch.
            ValueError: If its criterion cannot learn from it.
        """
        if self.training.views is not None:
            self.training.views.check_batch(batch)
        for part in learners_of(self.training.criterion):
            part.look_at(batch)

    # --- available to subclasses --------------------------------------------------------------------------------------

    @property
    def uses_calibration(self) -> bool:
        """Whether the stage uses the calibration split, which is then no longer independent of the network."""
        return False

    @property
    def active(self) -> bool:
        """Whether the switch has taken place."""
        return self.before is not None

    def module_head(self, module: nn.Module) -> nn.Module:
        """Return the head in use.

        Args:
            module: The module.

        Returns:
            Its submodule named ``head``.
        """
        return submodule_of(module, self.head, "head")

    def length(self, trainer: Trainer) -> int:
        """Return T, the number of epochs of this stage.

        Args:
            trainer: The trainer, within ``fit``.

        Returns:
            Epochs up to the next switch or the end.

        Raises:
            ValueError: If the trainer has no number of epochs.
        """
        epochs = trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(
                f"max_epochs of the trainer is {epochs}, but {type(self).__name__} needs the length of its stage. Set "
                "trainer.max_epochs."
            )
        begins = [stage.first(trainer) for stage in stages_of(trainer)]
        return min([*(epoch for epoch in begins if epoch > self.first(trainer)), epochs]) - self.first(trainer)

    def stage_epoch(self, trainer: Trainer) -> int:
        """Return t, the epoch counted from the start of this stage: 0 to T - 1.

        Args:
            trainer: The trainer, within ``fit``.

        Returns:
            The epoch within the stage.
        """
        return trainer.current_epoch - self.first(trainer)

    def features(self, module: LightningModule, batch: Any) -> Tensor:
        """Compute the features ``(N, d)`` of a batch: the head's input when the module is called on its images.

        Args:
            module: The module, with its trainer.
            batch: A batch of the loader; it is moved to the module's device.

        Returns:
            ``(N, d)``, without gradient, computed in evaluation mode.
        """
        with evaluating(module):
            return caught_features(module, self.module_head(module), batch, parts=self.batch)

    def first(self, trainer: Trainer) -> int:
        """First epoch of the stage."""
        if self.first_epoch is not None:
            return self.first_epoch
        epochs = trainer.max_epochs
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a single epoch: try the new stage
            return 0
        if self.at_epoch >= 0:
            return self.at_epoch
        if epochs is None or epochs < 0:
            raise ValueError(
                f"at_epoch is {self.at_epoch}, which appends a stage, but max_epochs of the trainer is {epochs}. Set "
                "trainer.max_epochs, or give the epoch counted from the start."
            )
        added = added_stages(trainer)
        return epochs + sum(switch.at_epoch for switch in added[added.index(self) :])


def stages_of(trainer: Trainer) -> list[Stage]:
    """The trainer's stages, in the order of its callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Stage)]  # type: ignore[attr-defined]


def stages_behind(trainer: Trainer, module: LightningModule) -> int:
    """How many switches a module has behind it; one from outside this package does not count them itself."""
    stage: int | None = getattr(module, "stage", None)
    return sum(switch.active for switch in stages_of(trainer)) if stage is None else stage


def added_stages(trainer: Trainer) -> list[Stage]:
    """Stages that follow the trainer's epochs, in order: a method's own come before callbacks."""
    return sorted((stage for stage in stages_of(trainer) if stage.adds), key=lambda stage: not stage.brought)
