"""The checkpoints of a run: fixed names, never a numbered copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn


class RunCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback with a fixed file name, saved when an epoch is over.

    A run folder may be moved: the best score so far is kept if the file that it belongs to is in the folder now. When a
    module enters a new stage, the choice begins anew, so that the chosen checkpoint is one of the last stage; the file
    of the stage before stays as ``stage-<number>-<filename>.ckpt``, from which other runs may start.

    Args:
        folder: Where the file goes.
        filename: Its name without ending; each save replaces it.
        monitor: The metric that must improve for a save; None saves after every epoch. A stage that has no classifier
            yet is not saved by a metric.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(self, folder: str | Path, filename: str, monitor: str | None = None, mode: str = "min") -> None:
        # Saved when the epoch is over, so that a resumed run begins with the next one.
        super().__init__(
            folder,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.stage = 0
        self._validated = True
        self._limits: tuple[int | float, int | float] | None = None  # the trainer's, while nothing is trained

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether there is anything to train; Lightning would ask for the images all the same."""
        if trainer.max_epochs != 0 or self.monitor is not None:
            return
        self._limits = trainer.limit_train_batches, trainer.limit_val_batches
        trainer.limit_train_batches = trainer.limit_val_batches = 0
        self.best_model_path = str(Path(str(self.dirpath)) / f"{self.filename}.ckpt")
        if not getattr(pl_module, "pretrained_head", True):
            rank_zero_warn(
                f"max_epochs is 0 and the head of {type(pl_module).__name__} has random weights, so its answers are by "
                "chance. Use a pretrained network with as many classes as the data, or train."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a network that was not to be trained, such as a pretrained one, as it is."""
        if self._limits is not None:
            trainer.save_checkpoint(self.best_model_path)
            (trainer.limit_train_batches, trainer.limit_val_batches), self._limits = self._limits, None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew in a new stage; checkpoint callbacks come after the switch that makes it."""
        stage = int(getattr(pl_module, "stage", 0))
        if stage == self.stage:
            return
        kept = Path(str(self.dirpath)) / f"{self.filename}.ckpt"
        if trainer.is_global_zero and trainer.current_epoch > 0 and kept.is_file():
            copy = kept.with_name(f"stage-{stage}-{kept.name}")
            shutil.copyfile(kept, copy.with_suffix(".tmp"))
            copy.with_suffix(".tmp").replace(copy)
        self.stage = stage
        self.best_k_models, self.best_model_path, self.kth_best_model_path = {}, "", ""
        self.best_model_score = self.current_score = None
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self._validated = False  # the trainer still has the figures of the stage before

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there are figures of this stage."""
        super().on_validation_end(trainer, pl_module)
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the metric that decides is one of the stage before, or cannot be there yet."""
        if self.monitor is None or (self._validated and getattr(pl_module, "classifies", True)):
            super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The scores so far and the stage that they belong to."""
        return {**super().state_dict(), "stage": self.stage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the scores of a checkpoint, under the paths that its files have now."""
        self.stage = int(state_dict.get("stage", 0))
        folder = Path(str(self.dirpath))
        name = Path(state_dict.get("best_model_path", "")).name
        if name and (folder / name).is_file():
            here = str(folder / name)
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": here,
                "kth_best_model_path": here,
                "best_k_models": dict.fromkeys([here], state_dict["best_model_score"]) if self.monitor else {},
            }
        super().load_state_dict(state_dict)
