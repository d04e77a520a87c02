"""Training in stages: from some epoch on, a frozen feature extractor and a new head with its own training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from calib_lightning.core.batch_transform import BatchTransform
from calib_lightning.core.distributed import check_strategy
from calib_lightning.core.feature_cache import (
    CachedFeatures,
    StoredFeatures,
    caught_features,
    reload_train_loader,
)
from calib_lightning.core.heads import Head, LinearHead, build_head
from calib_lightning.core.module import ClassificationModule, datamodule_in_use, load_checkpoint
from calib_lightning.core.schedules import CosineToEnd, with_schedule
from calib_lightning.core.submodules import evaluating, submodule_of
from calib_lightning.types import Views
from calib_lightning.utils.registry import class_path_of
from calib_lightning.utils.seeding import derive_seed, run_seed

HeadFactory = Callable[[int, int], nn.Module]
"""Builds a head from the number of features and of classes, ``(d, K)``."""

FEW_STEPS = 100
"""Warn when a stage has fewer steps."""

_HEAD = 101  # separates the random stream of new heads from others


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
        TypeError: If ``criterion`` is not a module.
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
        if frozen_bn not in ("eval", "train"):
            raise ValueError(
                f"frozen_bn is {frozen_bn!r}; it must be 'eval' (fixed statistics) or 'train' (updated statistics)."
            )
        if frozen_bn == "train" and isinstance(views, CachedFeatures):
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


class StageSwitch(Callback):
    """At a given epoch: freeze everything but the head, replace the head, and train it in its own way.

    Frozen parameters and BatchNorm statistics stay bit-identical. The switch works within one ``fit``, on a single
    device or DDP, in any LightningModule whose head is a submodule. Its state is saved in checkpoints: resuming or
    evaluating any of them needs the same switches in the trainer. Several switches take effect in the order of their
    epochs. ``EarlyStopping`` is reset at a switch; a ``ModelCheckpoint`` with a metric compares all stages,
    `RunCheckpoint` only checkpoints of the last one.

    Args:
        at_epoch: First epoch of the new stage. A negative number appends a stage: -40 adds 40 epochs after the
            trainer's ``max_epochs``; with ``init_from`` it replaces them. Several are appended in order, a method's
            own first.
        classifier: Builds the new head from ``(d, K)``: a class such as `LinearHead`, or a partial of one.
        training: How the stage is trained; the default is `StageTraining()`.
        encoder: Name of the submodule that computes features (``"model.backbone"``, ``""`` for the whole module).
        head: Name of the submodule that is replaced (``"classifier"``, ``"model.fc"``).
        init_from: A trained checkpoint whose encoder, and head if it fits, is loaded before a fit that begins with
            this switch.

    Raises:
        ValueError: Before training starts, if the switch is impossible: its epoch is not within the run, another
            switch has the same one, the new head does not fit, the strategy is neither a single device nor DDP, the
            data module cannot change its images or batch size, or ``init_from`` holds another encoder.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=10, callbacks=[StageSwitch(at_epoch=-4)], logger=False)
    """

    def __init__(
        self,
        at_epoch: int,
        classifier: HeadFactory = LinearHead,
        training: StageTraining | None = None,
        encoder: str = "encoder",
        head: str = "head",
        init_from: str | None = None,
    ) -> None:
        self.at_epoch = at_epoch
        self.classifier = classifier
        self.training = StageTraining() if training is None else training
        self.encoder = encoder
        self.head = head
        self.init_from = init_from
        self.head_loaded = False
        self.brought = False
        self.current = False
        self._position: int | None = None
        self._first_epoch: int | None = None
        self._adds = False  # whether this stage's epochs follow those of the trainer
        self._given: int | None = None  # the trainer's own max_epochs, if stages have extended it
        self._entered: _Entered | None = None
        self._stored: StoredFeatures | None = None
        self._looked_at = False

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
            TypeError: If features are to be stored and the batch is neither a tuple nor a list.
        """
        if isinstance(self.training.views, CachedFeatures) and not isinstance(batch, list | tuple):
            raise TypeError(
                f"The batch is a {type(batch).__name__}; CachedFeatures needs tuples of tensors that start with the "
                "images. Omit the cache, or let the loader return tuples."
            )

    # --- available to subclasses --------------------------------------------------------------------------------------

    @property
    def uses_calibration(self) -> bool:
        """Whether the stage uses the calibration split, which is then no longer independent of the network."""
        return False

    @property
    def active(self) -> bool:
        """Whether the switch has taken place."""
        return self._entered is not None

    def module_head(self, module: LightningModule) -> nn.Module:
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
        later = [s._first(trainer) for s in _switches(trainer) if s._first(trainer) > self._first(trainer)]
        return min([*later, epochs]) - self._first(trainer)

    def stage_epoch(self, trainer: Trainer) -> int:
        """Return t, the epoch counted from the start of this stage: 0 to T - 1.

        Args:
            trainer: The trainer, within ``fit``.

        Returns:
            The epoch within the stage.
        """
        return trainer.current_epoch - self._first(trainer)

    def features(self, module: LightningModule, batch: Any) -> Tensor:
        """Compute the features ``(N, d)`` of a batch: the head's input when the module is called on its images.

        Args:
            module: The module, with its trainer.
            batch: A batch that starts with the images; it is moved to the module's device.

        Returns:
            ``(N, d)``, without gradient, computed in evaluation mode.
        """
        with evaluating(module):
            return caught_features(module, self.module_head(module), batch)

    # --- the trainer's hooks -----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this switch's state in a checkpoint: its position among the trainer's switches."""
        # two switches must have different keys even before they have a trainer
        return f"StageSwitch[{id(self) if self._position is None else self._position}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the switch is possible, and make checkpoints load into the right head."""
        switches = _switches(trainer)
        self._position = switches.index(self)
        self._looked_at = False
        if stage == "fit" and self._position == 0:
            _add_epochs(trainer, switches)
        if self._entered is not None and self._entered.module is not pl_module:
            self._entered, self.current = None, False
        if stage == "fit":
            if not self.active:
                self._first_epoch = None
            elif trainer.ckpt_path is None and (self._first_epoch or 0) > trainer.current_epoch:
                # another trainer continues with a module that is already in this stage, and counts from 0
                self._first_epoch = trainer.current_epoch if self.current else self._position - len(switches)
            self._check(trainer, pl_module)
            if self.active:
                if self.current:
                    self._enter(trainer, pl_module)
            elif self.init_from is not None and trainer.ckpt_path is None:
                self._load_start(pl_module)
        if self._position == 0:
            if stage == "fit":
                _check_chain(switches, pl_module)
                if isinstance(pl_module, ClassificationModule):
                    pl_module.first_stage_epochs = min(switch._first(trainer) for switch in switches)
            _enter_before_weights(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store features again in a resumed stage."""
        several = len(trainer.optimizers) > 1
        if several or (self.training.scheduler is not None and not pl_module.automatic_optimization):
            what = f"{len(trainer.optimizers)} optimisers" if several else "manual optimisation"
            raise ValueError(
                f"{type(pl_module).__name__} has {what}, but {type(self).__name__} installs a single "
                f"optimiser{'' if several else ' and a scheduler'} that Lightning steps. Use a module with one "
                f"optimiser{'.' if several else ', or omit the scheduler.'}"
            )
        if self.current:
            self._store_features(trainer, pl_module, resumed=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the switch never took place."""
        if not self.active:
            rank_zero_warn(
                f"{type(self).__name__} should have switched at epoch {self._first(trainer)}, but training ended "
                "earlier, in the previous stage. Continue training without whatever stopped the run early."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch at the first epoch of the stage."""
        if self.active or trainer.current_epoch < self._first(trainer):
            return
        self._first_epoch = trainer.current_epoch
        stored = any(switch._stored is not None for switch in _switches(trainer))
        for switch in _switches(trainer):
            switch._leave()
        self._enter(trainer, pl_module)
        self.current = True
        _rebuild_training(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning does not declare it
            if isinstance(callback, EarlyStopping):  # a new head starts out worse than the old one
                callback.wait_count, callback.stopped_epoch = 0, 0
                callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if stored or can_change_loading(trainer):
            reload_train_loader(trainer)
        self._store_features(trainer, pl_module, resumed=False)
        if (trainer.max_epochs or -1) > 0 and isinstance(trainer.num_training_batches, int):
            steps = self.length(trainer) * trainer.num_training_batches // trainer.accumulate_grad_batches
            if steps < FEW_STEPS:
                rank_zero_warn(
                    f"The stage of {type(self).__name__} has only {steps} steps, too few for a new head. Use more "
                    "epochs (at_epoch) or smaller batches (batch_size of its training)."
                )
        rank_zero_info(
            f"Epoch {trainer.current_epoch}: {type(self).__name__} has frozen everything but {self.head!r}, which is "
            f"now {type(self.module_head(pl_module)).__name__}."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the frozen part in evaluation mode, even after ``train()`` calls."""
        if not self._looked_at:  # in the first step of any fit, even before the switch
            self.look_at(batch)
            self._looked_at = True
        if not self.current:
            return
        self._hold_still(pl_module)
        if self._stored is not None:
            self._stored.in_use = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Use images again outside training steps."""
        if self._stored is not None:
            self._stored.in_use = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore module and data module for use outside of a fit."""
        self._forget_features()
        for name in ("on_load_checkpoint", "configure_optimizers"):
            vars(pl_module).pop(name, None)
        if stage == "fit":
            _set_loading(trainer, None, None)
            if self._given is not None:
                trainer.fit_loop.max_epochs, self._given = self._given, None
            if isinstance(pl_module, ClassificationModule):
                pl_module.first_stage_epochs = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module usable."""
        self.teardown(trainer, pl_module, "fit" if trainer.state.fn == TrainerFn.FITTING else "")

    def state_dict(self) -> dict[str, Any]:
        """Whether and when the switch took place, and which head it installed; plain data."""
        spec = None
        if self._entered is not None:
            head = self.module_head(self._entered.module)
            spec = dict(head.spec) if isinstance(head, Head) else None
        return {
            "class_path": class_path_of(type(self)),
            "at_epoch": self.at_epoch,
            "active": self.active,
            "current": self.current,
            "first_epoch": self._first_epoch,
            "head": self.head,
            "head_spec": spec,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore when the switch took place; the head was installed before the weights were loaded."""
        if state_dict["active"]:
            self._first_epoch = state_dict["first_epoch"]
            self.current = state_dict["current"]

    # --- the switch --------------------------------------------------------------------------------------------------

    def _first(self, trainer: Trainer) -> int:
        """First epoch of the stage."""
        if self._first_epoch is not None:
            return self._first_epoch
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
        added = _added(trainer)
        return epochs + sum(switch.at_epoch for switch in added[added.index(self) :])

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        """Install the head, freeze the rest, replace optimiser and images; a second call has no effect."""
        if self._entered is None:
            old = self.module_head(module)
            entered = _Entered(module, old)
            with _seeded(self._position or 0):
                head = self.new_head(module, old)
            parameter = next(old.parameters(), None)
            head.to(module.device, None if parameter is None else parameter.dtype)
            _put(module, self.head, head)
            criterion = self.training.criterion
            if criterion is not None:
                criterion.to(module.device, None if parameter is None else parameter.dtype)
            if isinstance(module, ClassificationModule):
                module.enter_stage(module.stage + 1, criterion)
            elif criterion is not None:
                _set(module, "criterion", criterion)
            self._entered = entered
        self.freeze(module, self.module_head(module))
        self._hold_still(module)
        if trainer.state.fn == TrainerFn.FITTING:
            vars(module)["configure_optimizers"] = functools.partial(self._configure_optimizers, module)
            _set_loading(trainer, self.training.views, self.training.batch_size)

    def _leave(self) -> None:
        self.current = False
        self._forget_features()

    def _undo(self) -> None:
        """Return to the module before the switch, to load a checkpoint from before it."""
        if self._entered is not None:
            _put(self._entered.module, self.head, self._entered.old)
            self._entered.undo()
            self._entered, self._first_epoch, self.current = None, None, False

    def _hold_still(self, module: LightningModule) -> None:
        if self.training.frozen_bn == "train":
            return
        head = self.module_head(module)
        if any(child.training for child in module.children() if child is not head) or not head.training:
            for part in module.modules():
                part.training = False
            for part in head.modules():
                part.training = True
            module.training = True

    def _configure_optimizers(self, module: LightningModule) -> OptimizerLRScheduler:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = self.training.optimizer(parameters)
        known = (module.trainer.max_epochs or -1) > 0
        return with_schedule(optimizer, self.training.scheduler, self.length(module.trainer) if known else -1)

    def _store_features(self, trainer: Trainer, module: LightningModule, resumed: bool) -> None:
        views = self.training.views
        if isinstance(views, CachedFeatures):
            encoder, head = submodule_of(module, self.encoder, "encoder"), self.module_head(module)
            self._stored = views.store(trainer, module, encoder, head, resumed=resumed)

    def _forget_features(self) -> None:
        if self._stored is not None:
            self._stored.remove()
            self._stored = None

    # --- checks before training --------------------------------------------------------------------------------------

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        name = type(self).__name__
        check_strategy(trainer, name)
        first, epochs = self._first(trainer), trainer.max_epochs
        if not self.active:
            if epochs is not None and 0 <= epochs <= first:
                raise ValueError(
                    f"at_epoch of {name} is {self.at_epoch}; it must be at most {epochs - 1} in a run of {epochs} "
                    "epochs, or the switch never takes place. Train longer, or append a stage of T epochs with "
                    "at_epoch=-T."
                )
            if first == 0 and self.init_from is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_warn(
                    f"{name} freezes the module before its first step, and there is no init_from: this is right for a "
                    "trained module and useless for a new one."
                )
        for other in _switches(trainer):
            if other is not self and other._first(trainer) == first:
                raise ValueError(
                    f"{name} and {type(other).__name__} both switch at epoch {first}. Give them different values of "
                    "at_epoch."
                )
        if self.init_from is not None and first > 0 and not self.active:
            raise ValueError(
                f"init_from is {self.init_from!r}, but the switch is at epoch {first}: trained weights are only for a "
                f"run that begins with it. Set at_epoch to 0 (now {self.at_epoch}), or train stage 1 without init_from."
            )
        averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging | WeightAveraging)]  # type: ignore[attr-defined]
        if averaging:
            raise ValueError(
                f"{type(averaging[0]).__name__} averages the weights of all stages: it would change what {name} "
                "freezes and mix two heads. Omit it, or average in a run with one stage."
            )
        self.module_head(module)
        encoder = submodule_of(module, self.encoder, "encoder")
        self._check_schedule(trainer, module)
        if isinstance(self.training.views, CachedFeatures):
            self.training.views.check(trainer, module, encoder, self.module_head(module), self.training)
        elif (self.training.views or self.training.batch_size) and not can_change_loading(trainer):
            data = datamodule_in_use(trainer)
            said = (
                f"{'views' if self.training.views else 'batch_size'} of {name}'s training is incompatible with "
                f"{type(data).__name__ if data else 'plain loaders'}: only data modules of this package change their "
                "images and batch size at a switch."
            )
            if self.training.views is None or not self.training.views.optional:
                raise ValueError(f"{said} Omit it, or use a BenchmarkDataModule.")
            rank_zero_warn(f"{said} The stage uses the loader's batches.")
        elif self.training.views is not None:
            self._check_views(module, self.training.views)
        foreign = not isinstance(module, ClassificationModule)
        if self.training.criterion is not None and foreign and not hasattr(module, "criterion"):
            raise ValueError(
                f"{name}'s training has a criterion, but {type(module).__name__} has no attribute 'criterion' for its "
                "training step to call. Omit the criterion, or make the module call self.criterion."
            )

    def _check_schedule(self, trainer: Trainer, module: LightningModule) -> None:
        if self.training.scheduler is None:
            return
        schedule: Any = self.training.scheduler(self.training.optimizer([nn.Parameter(torch.zeros(1))]))
        if isinstance(schedule, CosineToEnd):
            self.length(trainer)  # must be known
        elif isinstance(schedule, ReduceLROnPlateau) and not isinstance(module, ClassificationModule):
            raise ValueError(
                f"ReduceLROnPlateau monitors val/nll, which {type(module).__name__} may not log. Give "
                f"{type(self).__name__} a schedule that follows the epochs, such as CosineToEnd."
            )

    def _check_views(self, module: LightningModule, views: Views) -> None:
        transform = module.batch_transform if isinstance(module, ClassificationModule) else None
        own = transform is not None and type(transform).views is not BatchTransform.views
        if own and self.training.criterion is None:
            raise ValueError(
                f"{type(transform).__name__} needs its own views, but the stage has {type(views).__name__}. Give the "
                "stage a criterion, which replaces the transform, or omit its views."
            )
        image = views.transform(_AsFloat(), None, 0)(torch.zeros(1, 3, 32, 32).byte(), torch.zeros(1).long(), 0)
        if image.ndim != 4:
            raise ValueError(
                f"{type(views).__name__} makes {image.shape[1]} views of each image; a stage that classifies needs "
                "exactly one. Use CleanViews or ResizedCropFlip."
            )

    def _load_start(self, module: LightningModule) -> None:
        """Load the encoder of a trained checkpoint, and its head if it fits."""
        assert self.init_from is not None
        if not Path(self.init_from).is_file():
            raise FileNotFoundError(f"init_from of {type(self).__name__} is {self.init_from!r}, which does not exist.")
        state: dict[str, Tensor] = load_checkpoint(self.init_from)["state_dict"]
        encoder, head = f"{self.encoder}." if self.encoder else "", f"{self.head}."
        own = {name: value for name, value in module.state_dict().items() if name.startswith((encoder, head))}

        def of(values: dict[str, Tensor], part: str) -> dict[str, tuple[int, ...]]:
            is_head = part == head
            return {
                name: tuple(value.shape)
                for name, value in values.items()
                if name.startswith(part) and name.startswith(head) == is_head
            }

        mine, theirs = of(own, encoder), of(state, encoder)
        if not self.encoder:  # of a whole module, skip criteria and metrics
            theirs = {name: shape for name, shape in theirs.items() if name in mine}
        if mine != theirs:
            name = next(n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n))
            raise ValueError(
                f"init_from is {self.init_from!r}, which holds another encoder: {name!r} is "
                f"{theirs.get(name, 'missing')} there and {mine.get(name, 'missing')} in this module. Build the module "
                "with the encoder of the checkpoint, or give another checkpoint."
            )
        wanted = set(mine)
        self.head_loaded = of(own, head) == of(state, head)
        if self.head_loaded:
            wanted |= set(of(own, head))
        module.load_state_dict({name: state[name] for name in wanted}, strict=False)


class _Entered:
    """The state of a module before a switch."""

    def __init__(self, module: LightningModule, old: nn.Module) -> None:
        self.module, self.old = module, old
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        self._modes = [(part, part.training) for part in module.modules()]
        names = ("stage", "criterion", "batch_transform", "plain_loss")
        self._attributes = {name: getattr(module, name) for name in names if hasattr(module, name)}

    def undo(self) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        for part, mode in self._modes:
            part.training = mode
        for name, value in self._attributes.items():
            _set(self.module, name, value)


class _AsFloat(nn.Module):
    """Stands in for a normalisation."""

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        return image.float()


def own_switches(module: LightningModule, *switches: StageSwitch) -> list[Callback]:
    """A method's own switches for ``configure_callbacks``; rejects a switch that Lightning would drop for them."""
    if getattr(module, "_trainer", None) is None:
        return list(switches)
    for callback in _switches(module.trainer):
        lost = any(issubclass(type(own), type(callback)) for own in switches)
        if lost and callback not in switches and not callback.brought:
            raise ValueError(
                f"The trainer has a {type(callback).__name__}, but {type(module).__name__} has its own, for which "
                "Lightning would drop it. Pass the switch to the method as switch=..., or use a method without one, "
                "such as CrossEntropy."
            )
    for own in switches:
        own.brought = True
    # switches from an earlier call keep their place
    there = module.trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
    return [own for own in switches if own not in there]


def head_size(module: LightningModule, head: nn.Module) -> tuple[int, int]:
    """Return ``(d, K)`` of a head: the size of its input, and the number of classes."""
    arguments = head.spec["init_args"] if isinstance(head, Head) else {}
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    features = arguments.get("in_features", linear[0].in_features if linear else None)
    classes = getattr(module, "num_classes", None)
    if not isinstance(classes, int):
        classes = arguments.get("num_classes", linear[-1].out_features if linear else None)
    if features is None or classes is None:
        raise ValueError(
            f"The head is a {type(head).__name__}, whose numbers of features and classes are unknown: it is not a Head "
            "and has no nn.Linear. Name another submodule with head=..., or override StageSwitch.new_head."
        )
    return features, classes


def load_stages(module: LightningModule, path: str | Path) -> LightningModule:
    """Install the heads of a staged training in a module from outside this package, and load its weights.

    Use `load_module` for modules of this package. Your own head classes must derive from `Head`, and the file that
    defines them must be imported.

    Args:
        module: The module as it was built for training.
        path: A checkpoint of the training.

    Returns:
        The module, with the weights of the checkpoint, in ``eval()`` mode.

    Raises:
        ValueError: If a head in the file is not a `Head` and therefore cannot be rebuilt.

    Example:
        ``module = load_stages(MyModule(), "last.ckpt")``
    """
    checkpoint = load_checkpoint(path)
    states = [s for key, s in checkpoint.get("callbacks", {}).items() if key.startswith("StageSwitch[") and s["active"]]
    for state in sorted(states, key=lambda state: int(state["first_epoch"])):
        if state["head_spec"] is None:
            raise ValueError(
                f"{path} holds a head {state['head']!r} that is not a calib_lightning.core.Head, so it cannot be "
                "rebuilt from the file. Test or resume with a trainer that has the same StageSwitch."
            )
        if state["current"] or len(states) == 1:
            _put(module, state["head"], build_head(state["head_spec"]))
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


# --- helpers ---------------------------------------------------------------------------------------------------------


def _switches(trainer: Trainer) -> list[StageSwitch]:
    return [callback for callback in trainer.callbacks if isinstance(callback, StageSwitch)]  # type: ignore[attr-defined]


def _added(trainer: Trainer) -> list[StageSwitch]:
    """Switches whose stages follow the trainer's epochs, in order: a method's own come before callbacks."""
    return sorted((s for s in _switches(trainer) if s._adds), key=lambda switch: not switch.brought)


def _add_epochs(trainer: Trainer, switches: list[StageSwitch]) -> None:
    """Extend the trainer by the appended stages."""
    for switch in switches:
        # a module that is already in the stage stays in it for the trainer's epochs
        switch._adds = switch.at_epoch < 0 and (not switch.active or trainer.ckpt_path is not None)
    epochs, added = trainer.max_epochs, _added(trainer)
    if not added or epochs is None or epochs < 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    trained = len(added) == len(switches) and added[0].init_from is not None
    switches[0]._given = epochs
    trainer.fit_loop.max_epochs = (0 if trained else epochs) - sum(switch.at_epoch for switch in added)


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute regardless of whether it is or was a submodule."""
    module._modules.pop(name, None)
    setattr(module, name, value)


def _put(module: nn.Module, name: str, head: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, head)


@contextmanager
def _seeded(position: int) -> Iterator[None]:
    """Make a new head a function of the run's seed and the stage, identical on all processes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(run_seed(), position, _HEAD))
        yield


def _check_chain(switches: list[StageSwitch], module: LightningModule) -> None:
    """Build and run all new heads once, to report a wrong width before training starts."""
    trainer = module.trainer
    head: dict[str, nn.Module] = {}
    for switch in sorted(switches, key=lambda switch: switch._first(trainer)):
        if switch.active:
            continue
        old = head.get(switch.head, switch.module_head(module))
        features, classes = head_size(module, old)
        with _seeded(0):
            new = head[switch.head] = switch.new_head(module, old)
        name, parameter = type(new).__name__, next(new.parameters(), None)
        if not isinstance(new, Head):
            told = f"The head {name} of {type(switch).__name__} is not a calib_lightning.core.Head"
            if isinstance(module, ClassificationModule):
                raise ValueError(f"{told}, so a checkpoint could not rebuild it. Derive it from Head.")
            rank_zero_warn(
                f"{told}, so load_stages cannot rebuild it from a checkpoint. Derive it from Head if it should."
            )
        rows = torch.zeros(2, features) if parameter is None else parameter.new_zeros(2, features)
        try:
            with torch.no_grad(), evaluating(new):
                shape = tuple(new(rows).shape)
        except RuntimeError as error:
            raise ValueError(
                f"The head {name} of {type(switch).__name__} does not fit: it cannot process {features} features "
                f"({error}). Build it for the encoder's number of features."
            ) from error
        if shape != (2, classes):
            raise ValueError(
                f"The head {name} of {type(switch).__name__} does not fit: it maps 2 rows of {features} features to "
                f"{shape}, but {classes} classes need (2, {classes})."
            )


def _enter_before_weights(trainer: Trainer, module: LightningModule) -> None:
    """Enter a checkpoint's stages before its weights are loaded; a callback's own hook runs too late."""
    load = type(module).on_load_checkpoint.__get__(module)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        states = {s: checkpoint.get("callbacks", {}).get(s.state_key) or {"active": False} for s in _switches(trainer)}
        active = {switch: state for switch, state in states.items() if state["active"]}
        for switch, state in states.items():
            known, mine = state.get("class_path"), class_path_of(type(switch))
            moved = state["active"] and state["at_epoch"] != switch.at_epoch
            if (known is not None and known != mine) or moved:
                raise ValueError(
                    f"The checkpoint was trained with {known} at epoch {state['at_epoch']}, but this trainer has "
                    f"{mine} at epoch {switch.at_epoch} in its place. Use the switches of the training, in the same "
                    "order."
                )
        # the latest first
        for switch in sorted(states, key=lambda s: -1 if s._first_epoch is None else s._first_epoch, reverse=True):
            if switch not in active:
                switch._undo()
        if trainer.state.fn == TrainerFn.FITTING:
            vars(module).pop("configure_optimizers", None)
            _set_loading(trainer, None, None)
        for switch, state in sorted(active.items(), key=lambda item: int(item[1]["first_epoch"])):
            switch._first_epoch = state["first_epoch"]
            switch._enter(trainer, module)
            switch.current = state["current"]
        load(checkpoint)

    vars(module)["on_load_checkpoint"] = on_load_checkpoint


def can_change_loading(trainer: Trainer) -> bool:
    """Return whether the trainer's data can change its images and batch size at a switch."""
    return hasattr(datamodule_in_use(trainer), "stage_views")


def _set_loading(trainer: Trainer, views: Views | None, batch_size: int | None) -> None:
    data: Any = datamodule_in_use(trainer)
    if hasattr(data, "stage_views"):
        data.stage_views, data.stage_batch_size, data.stage_features = views, batch_size, None


def _rebuild_training(trainer: Trainer) -> None:
    """New optimisers; under DDP a new wrapper, since the reducer of the old one does not know the new parameters."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        assert strategy.lightning_module is not None
        strategy.model = strategy.lightning_module
        if strategy._layer_sync is not None:
            strategy.model = strategy._layer_sync.apply(strategy.model)
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)
