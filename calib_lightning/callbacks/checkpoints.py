"""The checkpoints of a run, with fixed names and without numbered copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from calib_lightning.core.finite import guard_saves
from calib_lightning.core.module_record import equal_weights, load_checkpoint, stage_of
from calib_lightning.core.stage_base import stages_behind
from calib_lightning.utils.files import write_whole


class RunCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint callback with a fixed file name, saved at the end of an epoch.

    A run folder may be moved: the best score so far is kept if its file is in the folder. When a module enters a new
    stage, the selection restarts, so that the selected checkpoint is from the last stage; the file of the previous
    stage is kept as ``stage-<number>-<filename>.ckpt``, from which other runs may start. It is never replaced: a run
    that goes on from it trains the later stages again, and a longer first stage is kept as
    ``stage-<number>-<filename>-2.ckpt``.

    Args:
        folder: Folder of the file.
        filename: Its name without suffix; each save replaces it.
        monitor: The metric that must improve for a save; ``None`` saves after every epoch. A stage without a classifier
            is not saved by a metric.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(self, folder: str | Path, filename: str, monitor: str | None = None, mode: str = "min") -> None:
        # Saved at the end of the epoch, so that a resumed run starts with the next one.
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
        self._limits: tuple[int | float, int | float] | None = None  # the trainer's limits, while there is no training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights that are not finite: the file from before can still be used."""
        super().setup(trainer, pl_module, stage)
        guard_saves(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check whether there is anything to train; Lightning would read the images anyway."""
        if trainer.max_epochs != 0 or self.monitor is not None:
            return
        self._limits = trainer.limit_train_batches, trainer.limit_val_batches
        trainer.limit_train_batches = trainer.limit_val_batches = 0
        self.best_model_path = str(Path(str(self.dirpath)) / f"{self.filename}.ckpt")
        if not getattr(pl_module, "pretrained_head", True):
            rank_zero_warn(
                f"max_epochs is 0 and the head of {type(pl_module).__name__} has random weights, so its predictions "
                "are random. Use a pretrained network with as many classes as the data, or train."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save an untrained (pretrained, for example) network unchanged."""
        if self._limits is not None:
            trainer.save_checkpoint(self.best_model_path)
            (trainer.limit_train_batches, trainer.limit_val_batches), self._limits = self._limits, None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset in a new stage; checkpoint callbacks run after the switch."""
        stage = stages_behind(trainer, pl_module)
        if stage == self.stage:
            return
        kept = Path(str(self.dirpath)) / f"{self.filename}.ckpt"
        if trainer.is_global_zero and trainer.current_epoch > 0 and kept.is_file():
            _keep(kept, stage)
        self.stage = stage
        self.best_k_models, self.best_model_path, self.kth_best_model_path = {}, "", ""
        self.best_model_score = self.current_score = None
        self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self._validated = False  # the trainer still has the previous stage's metrics

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that metrics of this stage are available."""
        super().on_validation_end(trainer, pl_module)
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the metric is from the previous stage or not available yet."""
        if self.monitor is None or (self._validated and getattr(pl_module, "classifies", True)):
            super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The scores so far and their stage."""
        return {**super().state_dict(), "stage": self.stage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores of a checkpoint, with the current paths of its files; forget a best that was replaced."""
        self.stage = int(state_dict.get("stage", 0))
        folder = Path(str(self.dirpath))
        name = Path(state_dict.get("best_model_path", "")).name
        file = folder / name
        if name and file.is_file():
            best = self._best_of(state_dict, file)
            # The file name of later saves; Lightning would remove another one's file after the next save.
            here = str(file) if best else ""
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": best,
                "best_model_score": state_dict["best_model_score"] if best else None,
                "kth_best_model_path": here,
                "best_k_models": {here: state_dict["best_model_score"]} if self.monitor and best else {},
            }
        super().load_state_dict(state_dict)

    def _best_of(self, state: dict[str, Any], file: Path) -> str:
        """The file with the best weights of a state: ``file``, unless a later stage has replaced it; ``""`` if lost."""
        kept = sorted(file.parent.glob(f"stage-{self.stage + 1}-{file.stem}*.ckpt")) if self.monitor else []
        return next((str(path) for path in (file, *kept) if self._wrote(path, state)), "")

    def _wrote(self, path: Path, state: dict[str, Any]) -> bool:
        try:
            found = load_checkpoint(path)["callbacks"][self.state_key]
        except (KeyError, RuntimeError, UnpicklingError):  # damaged, or not of such a run
            return False
        return _stage_and_score(found) == _stage_and_score(state)


def _stage_and_score(state: dict[str, Any]) -> tuple[int, float | None]:
    score = state["best_model_score"]
    return int(state.get("stage", 0)), None if score is None else float(score)


def _keep(path: Path, stage: int) -> None:
    """Copy a checkpoint of the previous stage, unless the file is of another one (a resumed run's) or kept already."""
    try:
        found = load_checkpoint(path)
    except (RuntimeError, UnpicklingError) as error:
        rank_zero_warn(f"{path} was not kept as a checkpoint of stage {stage}: {error}")
        return
    if stage_of(found) != stage - 1:
        return
    copy = first = path.with_name(f"stage-{stage}-{path.name}")
    number = 1
    while copy.exists():
        if _holds(copy, found["state_dict"]):
            return
        number += 1
        copy = first.with_stem(f"{first.stem}-{number}")
    with path.open("rb") as source:
        write_whole(copy, lambda target: shutil.copyfileobj(source, target))


def _holds(path: Path, weights: dict[str, Any]) -> bool:
    try:
        return equal_weights(load_checkpoint(path)["state_dict"], weights)
    except (RuntimeError, UnpicklingError):  # damaged: it stays, too
        return False
