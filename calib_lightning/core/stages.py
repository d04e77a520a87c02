"""Training in stages: from some epoch on, a frozen feature extractor and a new head with its own training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from calib_lightning.core.data_in_use import can_change_views, reload_train_loader, set_loading, tell_epoch
from calib_lightning.core.module import ClassificationModule
from calib_lightning.core.stage_base import (
    HeadFactory,
    Stage,
    StageTraining,
    SwitchOptions,
    added_stages,
    stages_of,
)
from calib_lightning.core.stage_checks import (
    check_heads,
    check_is_last,
    check_optimizers,
    check_stage,
    warn_of_few_steps,
)
from calib_lightning.core.stage_entry import (
    enter,
    enter_before_weights,
    forget_features,
    hold_still,
    leave,
    plan_first_stage,
    rebuild_training,
    record_of,
    restore_module_hooks,
    store_features,
)
from calib_lightning.core.stage_files import load_stages, load_start, warn_of_earlier_files
from calib_lightning.core.twins import is_twin

__all__ = [  # what methods need, and class paths in older configurations
    "HeadFactory",
    "StageSwitch",
    "StageTraining",
    "SwitchOptions",
    "load_stages",
    "own_switches",
]


class StageSwitch(Stage):
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
        batch: Where a stage that reads batches, such as `MaskedClassifier`, finds the input and the labels in those of
            another package: two keys or positions, as in ``("pixel_values", "labels")``, or a function
            ``batch -> (input, labels)``; ``None`` reads ``(image, label, ...)`` and ``{"image": ..., "label": ...}``.

    Raises:
        ValueError: Before training starts, if the switch is impossible: its epoch is not within the run, another
            switch has the same one, the new head does not fit, the strategy is neither a single device nor DDP, the
            data module cannot change its images or batch size, or ``init_from`` holds another encoder.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=10, callbacks=[StageSwitch(at_epoch=-4)], logger=False)
    """

    @property
    def state_key(self) -> str:
        """Key of this switch's state in a checkpoint: its position among the trainer's switches."""
        # two switches must have different keys even before they have a trainer
        return f"StageSwitch[{id(self) if self.position is None else self.position}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the switch is possible, and make checkpoints load into the right head."""
        stages = stages_of(trainer)
        self.position = stages.index(self)
        self.looked_at = False
        if self.position == 0:
            for other in stages:  # used before, with another module
                if other.before is not None and other.before.module is not pl_module:
                    other.before, other.current, other.first_epoch = None, False, None
        if stage == "fit" and self.position == 0:
            self.given_epochs = _add_epochs(trainer)
        if stage == "fit":
            if not self.active:
                self.first_epoch = None
            elif trainer.ckpt_path is None and (self.first_epoch or 0) > trainer.current_epoch:
                # another trainer continues with a module that is already in this stage, and counts from 0
                self.first_epoch = trainer.current_epoch if self.current else self.position - len(stages)
            check_stage(self, trainer, pl_module)
            if self.active:
                if self.init_from is not None and trainer.ckpt_path is None:
                    rank_zero_warn(
                        f"{type(self).__name__} has taken place in this module, which goes on in its stage, and "
                        "init_from is not read again. To start anew, build the module anew."
                    )
                if self.current:
                    enter(self, trainer, pl_module)
            elif self.init_from is not None and trainer.ckpt_path is None:
                load_start(self, pl_module)
        if self.position == 0:
            if stage == "fit":
                check_heads(stages, pl_module)
                if isinstance(pl_module, ClassificationModule):
                    pl_module.first_stage_epochs = min(other.first(trainer) for other in stages)
                plan_first_stage(trainer, pl_module)
            enter_before_weights(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store features again in a resumed stage."""
        check_optimizers(self, trainer, pl_module)
        if self.current:
            store_features(self, trainer, pl_module, resumed=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch at the first epoch of the stage."""
        tell_epoch(trainer)  # to a data set that prepares its images; other modules than ours do not
        if self.active or trainer.current_epoch < self.first(trainer):
            return
        self.first_epoch = trainer.current_epoch
        stages = stages_of(trainer)
        stored = any(stage.feed is not None for stage in stages)
        for stage in stages:
            leave(stage)
        enter(self, trainer, pl_module)
        self.current = True
        rebuild_training(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning does not declare it
            if is_twin(callback, EarlyStopping):  # a new head starts out worse than the old one
                callback.wait_count, callback.stopped_epoch = 0, 0
                callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if stored or can_change_views(trainer):
            reload_train_loader(trainer)
        store_features(self, trainer, pl_module, resumed=False)
        warn_of_few_steps(self, trainer)
        rank_zero_info(
            f"Epoch {trainer.current_epoch}: {type(self).__name__} has frozen everything but {self.head!r}, which is "
            f"now {type(self.module_head(pl_module)).__name__}."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the frozen part in evaluation mode, even after ``train()`` calls."""
        if not self.looked_at:  # in the first step of any fit, even before the switch
            self.look_at(batch)
            check_is_last(self, trainer, pl_module, batch)
            self.looked_at = True
        if not self.current:
            return
        hold_still(self, pl_module)
        if self.feed is not None:
            self.feed.in_use = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Use images again outside training steps."""
        if self.feed is not None:
            self.feed.in_use = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the switch never took place."""
        if not self.active:
            rank_zero_warn(
                f"{type(self).__name__} should have switched at epoch {self.first(trainer)}, but training ended "
                "earlier, in the previous stage. Continue training without whatever stopped the run early, or train "
                "this stage in a run of its own, with init_from=CHECKPOINT."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of checkpoints from before the last stage, which would be mistaken for those of the new head."""
        if not self.current or not trainer.is_global_zero:
            return
        warn_of_earlier_files(self, trainer)
        length, done = self.length(trainer) if (trainer.max_epochs or -1) > 0 else 0, self.stage_epoch(trainer)
        if trainer.should_stop and done < length and self.training.scheduler is not None:
            rank_zero_warn(
                f"The stage of {type(self).__name__} was stopped after {done} of {length} epochs, before the end of "
                "its schedule. Leave EarlyStopping out of a run with such a stage, or give it more patience."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore module and data module for use outside of a fit."""
        forget_features(self)
        restore_module_hooks(pl_module)
        if stage == "fit":
            set_loading(trainer, None, None)
            if self.given_epochs is not None:
                trainer.fit_loop.max_epochs, self.given_epochs = self.given_epochs, None
            if isinstance(pl_module, ClassificationModule):
                pl_module.first_stage_epochs = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module usable."""
        self.teardown(trainer, pl_module, "fit" if trainer.state.fn == TrainerFn.FITTING else "")

    def state_dict(self) -> dict[str, Any]:
        """Whether and when the switch took place, and which head it installed; plain data."""
        return record_of(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore when the switch took place; the head was installed before the weights were loaded."""
        if state_dict["active"]:
            self.first_epoch = state_dict["first_epoch"]
            self.current = state_dict["current"]


def _add_epochs(trainer: Trainer) -> int | None:
    """Extend the trainer by the appended stages; return its own number of epochs if it changed."""
    stages = stages_of(trainer)
    for stage in stages:
        # a module that is already in the stage stays in it for the trainer's epochs
        stage.adds = stage.at_epoch < 0 and (not stage.active or trainer.ckpt_path is not None)
    epochs, added = trainer.max_epochs, added_stages(trainer)
    if not added or epochs is None or epochs < 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    trained = len(added) == len(stages) and added[0].init_from is not None
    trainer.fit_loop.max_epochs = (0 if trained else epochs) - sum(stage.at_epoch for stage in added)
    return epochs


def own_switches(module: LightningModule, *switches: StageSwitch) -> list[Callback]:
    """A method's own switches for ``configure_callbacks``; rejects a switch that Lightning would drop for them."""
    if getattr(module, "_trainer", None) is None:
        return list(switches)
    for callback in stages_of(module.trainer):
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
