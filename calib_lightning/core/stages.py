"""Stages of one training: from an epoch on, a frozen feature extractor and a new head with a training of its own."""

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
"""A stage with fewer steps is warned of."""

_HEAD = 101  # purpose that keeps the random stream of new heads apart from others


class StageTraining:
    """How a stage is trained.

    Args:
        optimizer: Called with the parameters of the new head. Default: SGD, lr 0.1, momentum 0.9, weight decay 5e-4.
        scheduler: Called with the optimiser; stepped once an epoch.
        criterion: Maps ``(logits (N, K), labels (N,))`` to a scalar; takes the place of the method's own loss and batch
            transform. ``None`` keeps what the stage before had; a module that is not of this package needs an attribute
            ``criterion`` that its training step calls.
        views: What is done with the training images, such as ``CleanViews()``; ``CachedFeatures()`` computes the
            features once. ``None`` keeps the data module's augmentation.
        batch_size: Rows of one batch of one process; ``None`` keeps that of the data module.
        frozen_bn: ``"eval"`` keeps the statistics of frozen BatchNorm layers as they are; with ``"train"`` they go on.

    Raises:
        TypeError: If ``criterion`` is no module.
        ValueError: If ``batch_size`` is below 1, or ``frozen_bn`` is another word or cannot be had with the cache.
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
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1, or None for that of the data module.")
        if criterion is not None and not isinstance(criterion, nn.Module):
            raise TypeError(
                f"criterion is {criterion!r}; it must be a module such as nn.CrossEntropyLoss(), because it goes with "
                "the module to its device."
            )
        if frozen_bn not in ("eval", "train"):
            raise ValueError(
                f"frozen_bn is {frozen_bn!r}; it must be 'eval' (statistics stay) or 'train' (they go on)."
            )
        if frozen_bn == "train" and isinstance(views, CachedFeatures):
            raise ValueError(
                "frozen_bn is 'train', but stored features cannot follow statistics that go on: leave it at 'eval', or "
                "use other views than CachedFeatures."
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.criterion = criterion
        self.views = views
        self.batch_size = batch_size
        self.frozen_bn = frozen_bn


class SwitchOptions(TypedDict, total=False):
    """Options that every kind of switch passes through to `StageSwitch`, typed once."""

    training: StageTraining | None
    encoder: str
    head: str
    init_from: str | None


class StageSwitch(Callback):
    """At an epoch: freeze all but the head, put a new head, train it in its own way.

    Parameters and BatchNorm statistics of what is frozen stay as they are, bit for bit. The switch works within one
    ``fit``, on one device or DDP, in any LightningModule that has a submodule for its head. Whether it has happened
    travels in the checkpoint: a fit that is resumed from any of them, and an evaluation of any of them, needs the same
    switches in its trainer. Several switches follow each other in the order of their epochs. ``EarlyStopping`` begins
    anew at a switch; a ``ModelCheckpoint`` with a metric compares all stages, `RunCheckpoint` those of the last alone.

    Args:
        at_epoch: First epoch of the new stage. A negative number adds a stage: -40 means 40 epochs more than the
            trainer's ``max_epochs``, after them; with ``init_from`` it takes their place. Several are added in their
            order, a method's own first.
        classifier: Builds the new head from ``(d, K)``: a class such as `LinearHead`, or a partial of one.
        training: How the stage is trained; `StageTraining` for the default.
        encoder: Name of the submodule that computes features (``"model.backbone"``, ``""`` for the whole module).
        head: Name of the submodule that is replaced (``"classifier"``, ``"model.fc"``).
        init_from: A trained checkpoint whose encoder, and head where it fits, is loaded before a fit that begins with
            this switch.

    Raises:
        ValueError: Before training starts, if the switch cannot be made: its epoch is not within the run, another
            switch has the same one, the new head does not fit, the strategy is another than a single device or DDP, the
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
        self._adds = False  # whether the epochs of this stage come after those of the trainer
        self._given: int | None = None  # what the trainer was told, where stages have added to it
        self._entered: _Entered | None = None
        self._stored: StoredFeatures | None = None
        self._looked_at = False

    # --- what a kind of switch may override --------------------------------------------------------------------------

    def new_head(self, module: LightningModule, old: nn.Module) -> nn.Module:
        """Build the head of the new stage; called at the switch, and before the weights of a checkpoint arrive.

        Args:
            module: The module, with its old head.
            old: That head.

        Returns:
            The new head.
        """
        return self.classifier(*head_size(module, old))

    def freeze(self, module: LightningModule, head: nn.Module) -> None:
        """Choose what is trained: by default the parameters of the head alone.

        Args:
            module: The module, with its new head.
            head: That head.
        """
        module.requires_grad_(False)
        head.requires_grad_(True)

    def look_at(self, batch: Any) -> None:
        """Refuse batches that the stage cannot use; called in the first step of a fit.

        Args:
            batch: A training batch.

        Raises:
            TypeError: If features are to be stored and the batch is no tuple or list.
        """
        if isinstance(self.training.views, CachedFeatures) and not isinstance(batch, list | tuple):
            raise TypeError(
                "CachedFeatures needs batches that are tuples of tensors, the images first, not "
                f"{type(batch).__name__}. Leave the cache out, or let the loader give tuples."
            )

    # --- what it may use ---------------------------------------------------------------------------------------------

    @property
    def uses_calibration(self) -> bool:
        """Whether the stage looks at the calibration split, so that it is no longer independent of the network."""
        return False

    @property
    def active(self) -> bool:
        """Whether the switch has happened."""
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
                f"max_epochs of the trainer is {epochs}, but {type(self).__name__} must know how long its stage lasts: "
                "set trainer.max_epochs."
            )
        later = [s._first(trainer) for s in _switches(trainer) if s._first(trainer) > self._first(trainer)]
        return min([*later, epochs]) - self._first(trainer)

    def stage_epoch(self, trainer: Trainer) -> int:
        """Return t, the epoch counted from the first one of this stage: 0 to T - 1.

        Args:
            trainer: The trainer, within ``fit``.

        Returns:
            The epoch within the stage.
        """
        return trainer.current_epoch - self._first(trainer)

    def features(self, module: LightningModule, batch: Any) -> Tensor:
        """Features ``(N, d)`` of a batch: what goes into the head when the module is called on its images.

        Args:
            module: The module, with its trainer.
            batch: A batch whose first part are the images; it is moved to the module's device.

        Returns:
            ``(N, d)``, without gradient, computed in evaluation mode.
        """
        with evaluating(module):
            return caught_features(module, self.module_head(module), batch)

    # --- the trainer's hooks -----------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this switch's state in a checkpoint: its position among the trainer's switches."""
        # two switches of a list must differ before they know their trainer
        return f"StageSwitch[{id(self) if self._position is None else self._position}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the switch can be made, and see to it that checkpoints find the right head."""
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
                # another trainer goes on with a module that is in this stage already, and counts from 0
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
        """Go on with stored features where a checkpoint was taken."""
        several = len(trainer.optimizers) > 1
        if several or (self.training.scheduler is not None and not pl_module.automatic_optimization):
            what = f"{len(trainer.optimizers)} optimisers" if several else "manual optimisation"
            raise ValueError(
                f"{type(pl_module).__name__} has {what}, but {type(self).__name__} puts one optimiser"
                f"{'' if several else ' and a scheduler'} that Lightning steps: use a module with one optimiser"
                f"{'.' if several else ', or leave the scheduler out.'}"
            )
        if self.current:
            self._store_features(trainer, pl_module, resumed=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell of a switch that never came."""
        if not self.active:
            rank_zero_warn(
                f"{type(self).__name__} was to switch at epoch {self._first(trainer)}, but training ended before it: "
                "the module is in the stage before. Train on, without what has stopped the run early."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the switch when its epoch has come."""
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
            if isinstance(callback, EarlyStopping):  # a new head begins below the old one
                callback.wait_count, callback.stopped_epoch = 0, 0
                callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if stored or can_change_loading(trainer):
            reload_train_loader(trainer)
        self._store_features(trainer, pl_module, resumed=False)
        if (trainer.max_epochs or -1) > 0 and isinstance(trainer.num_training_batches, int):
            steps = self.length(trainer) * trainer.num_training_batches // trainer.accumulate_grad_batches
            if steps < FEW_STEPS:
                rank_zero_warn(
                    f"The stage of {type(self).__name__} has only {steps} steps, in which a new head hardly learns: "
                    "give it more epochs (at_epoch) or smaller batches (batch_size of its training)."
                )
        rank_zero_info(
            f"Epoch {trainer.current_epoch}: {type(self).__name__} has frozen all but {self.head!r}, which is now "
            f"{type(self.module_head(pl_module)).__name__}."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what is frozen in evaluation mode, whoever has called ``train()`` on the module."""
        if not self._looked_at:  # in the first step of a fit, whatever the stage: what the switch needs later
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
        """Let everything outside a training step see images again."""
        if self._stored is not None:
            self._stored.in_use = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave module and data module as they are used outside of a fit."""
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
        """Whether the switch has happened, when, and which head it has put where; plain data."""
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
        """Take over when the switch happened; the head was put before the weights arrived."""
        if state_dict["active"]:
            self._first_epoch = state_dict["first_epoch"]
            self.current = state_dict["current"]

    # --- the switch --------------------------------------------------------------------------------------------------

    def _first(self, trainer: Trainer) -> int:
        """First epoch of the stage."""
        if self._first_epoch is not None:
            return self._first_epoch
        epochs = trainer.max_epochs
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # one epoch: the new stage is tried
            return 0
        if self.at_epoch >= 0:
            return self.at_epoch
        if epochs is None or epochs < 0:
            raise ValueError(
                f"at_epoch is {self.at_epoch}, a stage after those of the run, but max_epochs of the trainer is "
                f"{epochs}: set trainer.max_epochs, or give the epoch counted from the start."
            )
        added = _added(trainer)
        return epochs + sum(switch.at_epoch for switch in added[added.index(self) :])

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        """Put the head, freeze the rest, take over optimiser and images; a second time changes nothing."""
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
        """Go back to the module before the switch: a checkpoint from before it is loaded."""
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
                    f"at_epoch of {name} is {self.at_epoch}, beyond the last epoch of a run of {epochs}: the switch "
                    f"would never happen. Set it to at most {epochs - 1}, train longer, or add a stage of T epochs to "
                    "the run with at_epoch=-T."
                )
            if first == 0 and self.init_from is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_warn(
                    f"{name} freezes the module before its first step, and there is no init_from: right for a module "
                    "that is trained already, useless for a new one."
                )
        for other in _switches(trainer):
            if other is not self and other._first(trainer) == first:
                raise ValueError(
                    f"{name} and {type(other).__name__} both switch at epoch {first}: give them different at_epoch."
                )
        if self.init_from is not None and first > 0 and not self.active:
            raise ValueError(
                f"init_from is {self.init_from!r}, but the switch comes at epoch {first}: trained weights are for a "
                f"run that begins with it. Set at_epoch to 0 (now {self.at_epoch}), or train stage 1 without init_from."
            )
        averaging = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging | WeightAveraging)]  # type: ignore[attr-defined]
        if averaging:
            raise ValueError(
                f"{type(averaging[0]).__name__} averages the weights of all stages, so that what {name} freezes would "
                "move and two heads be mixed: leave it out, or average in a run of one stage."
            )
        self.module_head(module)
        encoder = submodule_of(module, self.encoder, "encoder")
        self._check_schedule(trainer, module)
        if isinstance(self.training.views, CachedFeatures):
            self.training.views.check(trainer, module, encoder, self.module_head(module), self.training)
        elif (self.training.views or self.training.batch_size) and not can_change_loading(trainer):
            data = datamodule_in_use(trainer)
            said = (
                f"{'views' if self.training.views else 'batch_size'} of {name}'s training cannot be had with "
                f"{type(data).__name__ if data else 'plain loaders'}: only data modules of this package change their "
                "images and batch size at a switch."
            )
            if self.training.views is None or not self.training.views.optional:
                raise ValueError(f"{said} Leave it out, or use a BenchmarkDataModule.")
            rank_zero_warn(f"{said} The stage is trained on the batches that the loader gives.")
        elif self.training.views is not None:
            self._check_views(module, self.training.views)
        foreign = not isinstance(module, ClassificationModule)
        if self.training.criterion is not None and foreign and not hasattr(module, "criterion"):
            raise ValueError(
                f"{name}'s training has a criterion, but {type(module).__name__} has no attribute 'criterion' that its "
                "training step would call. Leave the criterion out, or let the module call self.criterion."
            )

    def _check_schedule(self, trainer: Trainer, module: LightningModule) -> None:
        if self.training.scheduler is None:
            return
        schedule: Any = self.training.scheduler(self.training.optimizer([nn.Parameter(torch.zeros(1))]))
        if isinstance(schedule, CosineToEnd):
            self.length(trainer)  # which must be known
        elif isinstance(schedule, ReduceLROnPlateau) and not isinstance(module, ClassificationModule):
            raise ValueError(
                f"ReduceLROnPlateau would watch val/nll, which {type(module).__name__} need not log: give "
                f"{type(self).__name__} a schedule that follows the epochs, such as CosineToEnd."
            )

    def _check_views(self, module: LightningModule, views: Views) -> None:
        transform = module.batch_transform if isinstance(module, ClassificationModule) else None
        own = transform is not None and type(transform).views is not BatchTransform.views
        if own and self.training.criterion is None:
            raise ValueError(
                f"{type(transform).__name__} needs views of its own, but the stage has {type(views).__name__}: give "
                "the stage a criterion, which takes the transform's place, or leave its views out."
            )
        image = views.transform(_AsFloat(), None, 0)(torch.zeros(1, 3, 32, 32).byte(), torch.zeros(1).long(), 0)
        if image.ndim != 4:
            raise ValueError(
                f"{type(views).__name__} makes {image.shape[1]} views of each image, but a stage that classifies sees "
                "one: use CleanViews or ResizedCropFlip."
            )

    def _load_start(self, module: LightningModule) -> None:
        """Load the encoder, and the head where it fits, of a trained checkpoint."""
        assert self.init_from is not None
        if not Path(self.init_from).is_file():
            raise FileNotFoundError(
                f"init_from of {type(self).__name__} is {self.init_from!r}, but there is no such file."
            )
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
        if not self.encoder:  # of a whole module only what it knows: criteria and metrics stay behind
            theirs = {name: shape for name, shape in theirs.items() if name in mine}
        if mine != theirs:
            name = next(n for n in (*mine, *theirs) if mine.get(n) != theirs.get(n))
            raise ValueError(
                f"init_from is {self.init_from!r}, which holds another encoder: {name!r} is "
                f"{theirs.get(name, 'missing')} there and {mine.get(name, 'missing')} in this module. Build the module "
                "with the encoder that the checkpoint was trained with, or give another checkpoint."
            )
        wanted = set(mine)
        self.head_loaded = of(own, head) == of(state, head)
        if self.head_loaded:
            wanted |= set(of(own, head))
        module.load_state_dict({name: state[name] for name in wanted}, strict=False)


class _Entered:
    """What a module was before a switch."""

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
    """Stands for a normalisation."""

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        return image.float()


def own_switches(module: LightningModule, *switches: StageSwitch) -> list[Callback]:
    """Return a method's own switches for ``configure_callbacks``, unless the trainer has one that they would push out.

    Lightning drops a trainer's callback in favour of a module's of the same class, and says so in passing.

    Args:
        module: The method.
        *switches: Its switches.

    Returns:
        The switches.

    Raises:
        ValueError: If the trainer was given a switch that would be dropped.

    Example:
        ``return own_switches(self, self.switch)``
    """
    if getattr(module, "_trainer", None) is None:
        return list(switches)
    for callback in _switches(module.trainer):
        lost = any(issubclass(type(own), type(callback)) for own in switches)
        if lost and callback not in switches and not callback.brought:
            raise ValueError(
                f"The trainer has a {type(callback).__name__}, but {type(module).__name__} brings one of its own, in "
                "whose favour Lightning would drop it: give the method its switch as switch=..., or use a method "
                "without, such as CrossEntropy."
            )
    for own in switches:
        own.brought = True
    # those that the trainer has from an earlier call stay where they are
    there = module.trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
    return [own for own in switches if own not in there]


def head_size(module: LightningModule, head: nn.Module) -> tuple[int, int]:
    """Return d and K of a head: what goes in, and the number of classes.

    Args:
        module: The module that it belongs to; its ``num_classes`` counts where it has one.
        head: A `Head` with ``in_features``, or any module with linear layers.

    Returns:
        ``(d, K)``.

    Raises:
        ValueError: If the head does not tell.
    """
    arguments = head.spec["init_args"] if isinstance(head, Head) else {}
    linear = [part for part in head.modules() if isinstance(part, nn.Linear)]
    features = arguments.get("in_features", linear[0].in_features if linear else None)
    classes = getattr(module, "num_classes", None)
    if not isinstance(classes, int):
        classes = arguments.get("num_classes", linear[-1].out_features if linear else None)
    if features is None or classes is None:
        raise ValueError(
            f"The head {type(head).__name__} does not tell how many features and classes it has: it is no Head and has "
            "no nn.Linear. Name another submodule with head=..., or override StageSwitch.new_head."
        )
    return features, classes


def load_stages(module: LightningModule, path: str | Path) -> LightningModule:
    """Put the heads of a staged training into a module that is not of this package, and load its weights.

    Modules of this package come back with `load_module`. A head of your own must derive from `Head`, and the file that
    defines it be imported.

    Args:
        module: The module as it was built for training.
        path: A checkpoint of the training.

    Returns:
        The module, with the weights of the checkpoint, in ``eval()`` mode.

    Raises:
        ValueError: If a head in the file is none of this package's and so cannot be built from it.

    Example:
        ``module = load_stages(MyModule(), "last.ckpt")``
    """
    checkpoint = load_checkpoint(path)
    states = [s for key, s in checkpoint.get("callbacks", {}).items() if key.startswith("StageSwitch[") and s["active"]]
    for state in sorted(states, key=lambda state: int(state["first_epoch"])):
        if state["head_spec"] is None:
            raise ValueError(
                f"{path} holds a head {state['head']!r} that is no Head of this package: it cannot be built from the "
                "file. Test or resume with a trainer that has the same StageSwitch."
            )
        if state["current"] or len(states) == 1:
            _put(module, state["head"], build_head(state["head_spec"]))
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


# --- helpers ---------------------------------------------------------------------------------------------------------


def _switches(trainer: Trainer) -> list[StageSwitch]:
    return [callback for callback in trainer.callbacks if isinstance(callback, StageSwitch)]  # type: ignore[attr-defined]


def _added(trainer: Trainer) -> list[StageSwitch]:
    """Switches whose stages come after the trainer's epochs, in their order; a callback comes after the method."""
    return sorted((s for s in _switches(trainer) if s._adds), key=lambda switch: not switch.brought)


def _add_epochs(trainer: Trainer, switches: list[StageSwitch]) -> None:
    """Let the trainer go on for the stages that are added to its epochs."""
    for switch in switches:
        # a module that is in the stage already goes on in it for the trainer's epochs
        switch._adds = switch.at_epoch < 0 and (not switch.active or trainer.ckpt_path is not None)
    epochs, added = trainer.max_epochs, _added(trainer)
    if not added or epochs is None or epochs < 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    trained = len(added) == len(switches) and added[0].init_from is not None
    switches[0]._given = epochs
    trainer.fit_loop.max_epochs = (0 if trained else epochs) - sum(switch.at_epoch for switch in added)


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute whether or not it is a submodule now, and is to be one."""
    module._modules.pop(name, None)
    setattr(module, name, value)


def _put(module: nn.Module, name: str, head: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, head)


@contextmanager
def _seeded(position: int) -> Iterator[None]:
    """A new head is a function of the run's seed and the stage, the same on all processes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(run_seed(), position, _HEAD))
        yield


def _check_chain(switches: list[StageSwitch], module: LightningModule) -> None:
    """Build all new heads once and run them: a width that does not fit is said before training starts."""
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
            told = f"The head {name} of {type(switch).__name__} is no calib_lightning.core.Head"
            if isinstance(module, ClassificationModule):
                raise ValueError(f"{told}, so a checkpoint could not say how to build it: derive it from Head.")
            rank_zero_warn(
                f"{told}, so load_stages cannot build it from a checkpoint: derive it from Head if it should."
            )
        rows = torch.zeros(2, features) if parameter is None else parameter.new_zeros(2, features)
        try:
            with torch.no_grad(), evaluating(new):
                shape = tuple(new(rows).shape)
        except RuntimeError as error:
            raise ValueError(
                f"The head {name} of {type(switch).__name__} does not fit: it cannot take {features} features "
                f"({error}). Build it for as many as the encoder gives."
            ) from error
        if shape != (2, classes):
            raise ValueError(
                f"The head {name} of {type(switch).__name__} does not fit: from 2 rows of {features} features it makes "
                f"{shape}, but {classes} classes need (2, {classes})."
            )


def _enter_before_weights(trainer: Trainer, module: LightningModule) -> None:
    """Let the stages of a checkpoint be entered before its weights arrive: a callback's own hook comes after them."""
    load = type(module).on_load_checkpoint.__get__(module)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        states = {s: checkpoint.get("callbacks", {}).get(s.state_key) or {"active": False} for s in _switches(trainer)}
        active = {switch: state for switch, state in states.items() if state["active"]}
        for switch, state in states.items():
            known, mine = state.get("class_path"), class_path_of(type(switch))
            moved = state["active"] and state["at_epoch"] != switch.at_epoch
            if (known is not None and known != mine) or moved:
                raise ValueError(
                    f"The checkpoint was trained with a {known} at epoch {state['at_epoch']}, this trainer has a "
                    f"{mine} at epoch {switch.at_epoch} in its place: give the switches that it was trained with, in "
                    "their order."
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
    """Tell whether the data of a trainer can change its images and batch size at a switch.

    Args:
        trainer: The trainer, within ``fit``.

    Returns:
        True for data modules of this package.
    """
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
