"""Entry into a stage: what a switch changes in module and trainer, its undoing, and the way from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from calib_lightning.core.data_in_use import set_loading
from calib_lightning.core.heads import Head
from calib_lightning.core.learning import learners_of
from calib_lightning.core.module import ClassificationModule
from calib_lightning.core.randomness import seeded_head
from calib_lightning.core.schedules import with_schedule
from calib_lightning.core.stage_base import Stage, stages_of
from calib_lightning.core.submodules import ModuleState, put_submodule, set_attribute, submodule_of
from calib_lightning.core.twins import is_twin
from calib_lightning.utils.registry import class_path_of, find_class

# --- entering and leaving --------------------------------------------------------------------------------------------


def enter(stage: Stage, trainer: Trainer, module: LightningModule) -> None:
    """Install the head, freeze the rest, replace optimiser and images; a second call has no effect."""
    if stage.before is None:
        old = stage.module_head(module)
        before = ModuleState(module, stage.head, ("stage", "criterion", "batch_transform", "plain_loss"))
        with seeded_head(stage.position or 0):
            head = stage.new_head(module, old)
        parameter = next(old.parameters(), None)
        head.to(module.device, None if parameter is None else parameter.dtype)
        put_submodule(module, stage.head, head)
        criterion = stage.training.criterion
        if criterion is not None:
            criterion.to(module.device, None if parameter is None else parameter.dtype)
            for part in learners_of(criterion):
                part.renew()
                part.first_epoch = stage.first(trainer)
        if isinstance(module, ClassificationModule):
            module.enter_stage(module.stage + 1, criterion)
        elif criterion is not None:
            set_attribute(module, "criterion", criterion)
        stage.before = before
    stage.freeze(module, stage.module_head(module))
    hold_still(stage, module)
    if trainer.state.fn == TrainerFn.FITTING:
        # Lightning asks the module alone for its optimisers, and on a resume before any hook of a callback
        _put_optimizers(module, partial(_optimizers_of, stage, module))
        set_loading(trainer, stage.training.views, stage.training.batch_size)


def leave(stage: Stage) -> None:
    """Make room for the next stage."""
    stage.current = False
    forget_features(stage)


def undo(stage: Stage) -> None:
    """Return to the module before the switch, to load a checkpoint from before it."""
    if stage.before is not None:
        stage.before.restore()
        stage.before, stage.first_epoch, stage.current = None, None, False


def hold_still(stage: Stage, module: LightningModule) -> None:
    """Keep everything but the head in evaluation mode."""
    if stage.training.frozen_bn == "train":
        return
    head = stage.module_head(module)
    if any(child.training for child in module.children() if child is not head) or not head.training:
        for part in module.modules():
            part.training = False
        for part in head.modules():
            part.training = True
        module.training = True


def store_features(stage: Stage, trainer: Trainer, module: LightningModule, *, resumed: bool) -> None:
    """Replace the images by features, if the views of the stage do so."""
    if stage.training.views is not None:
        encoder, head = submodule_of(module, stage.encoder, "encoder"), stage.module_head(module)
        stage.feed = stage.training.views.store(trainer, module, encoder, head, resumed=resumed)


def forget_features(stage: Stage) -> None:
    """Let the encoder receive images again."""
    if stage.feed is not None:
        stage.feed.remove()
        stage.feed = None


def rebuild_training(trainer: Trainer) -> None:
    """New optimisers; under DDP a new wrapper, since the reducer of the old one does not know the new parameters."""
    strategy = trainer.strategy
    if is_twin(strategy, DDPStrategy):
        assert strategy.lightning_module is not None
        strategy.model = strategy.lightning_module
        if strategy._layer_sync is not None:
            strategy.model = strategy._layer_sync.apply(strategy.model)
        strategy.configure_ddp()
    strategy.setup_optimizers(trainer)


def _optimizers_of(stage: Stage, module: LightningModule) -> OptimizerLRScheduler:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = stage.training.optimizer(parameters)
    known = (module.trainer.max_epochs or -1) > 0
    return with_schedule(optimizer, stage.training.scheduler, stage.length(module.trainer) if known else -1)


def plan_first_stage(trainer: Trainer, module: LightningModule) -> None:
    """Let a module from outside this package see the epochs of the first stage while it makes its schedule.

    Modules of this package have ``first_stage_epochs`` for that.
    """
    stages = stages_of(trainer)
    if isinstance(module, ClassificationModule) or any(stage.active for stage in stages):
        return
    begin = min(stage.first(trainer) for stage in stages)
    if begin < 1:
        return
    _put_optimizers(module, partial(_planned, module.configure_optimizers, trainer, begin))


def _planned(own: Callable[[], OptimizerLRScheduler], trainer: Trainer, epochs: int) -> OptimizerLRScheduler:
    given = trainer.fit_loop.max_epochs
    trainer.fit_loop.max_epochs = epochs
    try:
        return own()
    finally:
        trainer.fit_loop.max_epochs = given


def _put_optimizers(module: LightningModule, make: partial[OptimizerLRScheduler]) -> None:
    """Replace the module's hook; what stood at the module itself, as LightningCLI puts it there, is kept."""
    give_optimizers_back(module)
    vars(make)["given"] = vars(module).get("configure_optimizers")
    vars(module)["configure_optimizers"] = make


def give_optimizers_back(module: LightningModule) -> None:
    """Undo `_put_optimizers`."""
    there = vars(module).get("configure_optimizers")
    if isinstance(there, partial) and "given" in vars(there):
        vars(module)["configure_optimizers"] = vars(there)["given"]
        if vars(there)["given"] is None:
            del vars(module)["configure_optimizers"]


# --- from a checkpoint -----------------------------------------------------------------------------------------------


def record_of(stage: Stage) -> dict[str, Any]:
    """What a checkpoint stores of a stage: whether and when it was entered, and with which head; plain data."""
    spec = None
    if stage.before is not None:
        head = stage.module_head(stage.before.module)
        spec = dict(head.spec) if isinstance(head, Head) else None
    return {
        "class_path": class_path_of(type(stage)),
        "at_epoch": stage.at_epoch,
        "active": stage.active,
        "current": stage.current,
        "first_epoch": stage.first_epoch,
        "head": stage.head,
        "head_spec": spec,
    }


def enter_before_weights(trainer: Trainer, module: LightningModule) -> None:
    """Make the module enter a checkpoint's stages when it is loaded, before its weights.

    Lightning offers a callback nothing between reading a checkpoint and loading its weights: a callback's own
    ``on_load_checkpoint`` comes after them. So the module's is wrapped, until `restore_module_hooks`.
    """
    load = type(module).on_load_checkpoint.__get__(module)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        stages = stages_of(trainer)
        records = {s: checkpoint.get("callbacks", {}).get(s.state_key) or {"active": False} for s in stages}
        for stage, record in records.items():
            _check_same_switch(stage, record)
        # the latest first
        for stage in sorted(stages, key=lambda s: -1 if s.first_epoch is None else s.first_epoch, reverse=True):
            if not records[stage]["active"]:
                undo(stage)
        if trainer.state.fn == TrainerFn.FITTING:
            give_optimizers_back(module)
            plan_first_stage(trainer, module)
            set_loading(trainer, None, None)
        active = {stage: record for stage, record in records.items() if record["active"]}
        for stage, record in sorted(active.items(), key=lambda item: int(item[1]["first_epoch"])):
            if trainer.state.fn == TrainerFn.FITTING:
                _tell_of_other_epochs(stage, trainer, int(record["first_epoch"]))
            stage.first_epoch = record["first_epoch"]
            enter(stage, trainer, module)
            stage.current = record["current"]
        load(checkpoint)

    vars(module)["on_load_checkpoint"] = on_load_checkpoint


def _tell_of_other_epochs(stage: Stage, trainer: Trainer, began: int) -> None:
    """Tell of a stage that gets longer or shorter since ``max_epochs`` is not that of the run before."""
    stage.first_epoch = None
    planned, epochs = stage.first(trainer), trainer.max_epochs
    if stage.at_epoch < 0 and planned != began and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        given = stages_of(trainer)[0].given_epochs
        rank_zero_warn(
            f"The checkpoint's stage began at epoch {began}. With max_epochs={given}, to which its stages are added, "
            f"training goes on to epoch {epochs}. To finish the run as it was planned, resume with "
            f"max_epochs={(given or 0) + began - planned}."
        )


def restore_module_hooks(module: LightningModule) -> None:
    """Give the module its own hooks back."""
    give_optimizers_back(module)
    vars(module).pop("on_load_checkpoint", None)


def _check_same_switch(stage: Stage, record: dict[str, Any]) -> None:
    known, mine = record.get("class_path"), class_path_of(type(stage))
    moved = record["active"] and record["at_epoch"] != stage.at_epoch
    if moved or (known is not None and known != mine and not _leads_to(known, type(stage))):
        raise ValueError(
            f"The checkpoint was trained with {known} at epoch {record['at_epoch']}, but this trainer has "
            f"{mine} at epoch {stage.at_epoch} in its place. Use the switches of the training, in the same "
            "order."
        )


def _leads_to(class_path: str, cls: type[Stage]) -> bool:
    """Whether a path is that of a class from before it moved to another file."""
    try:
        return find_class(class_path, Stage) is cls
    except ValueError:
        return False
