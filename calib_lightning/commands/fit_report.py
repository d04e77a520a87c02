"""What a run of the trainer says at its beginning and at its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from calib_lightning.callbacks.record import uses_calibration
from calib_lightning.core import ClassificationModule
from calib_lightning.predictions.results import SHARED, print_table
from calib_lightning.utils.seeding import run_seed

_BY_EPOCH = {
    "val/nll": ("validation NLL", "{:.4f}"),
    "val/accuracy": ("accuracy", "{:.2%}"),
}
"""What is said of an epoch, and how."""


class EpochLines(Callback):
    """Prints a line for each epoch where there is no progress bar, as in the log of a benchmark.

    Its loss is the mean over the steps of the first process, after a resume within an epoch over those that were left.

    Args:
        quiet: Whether nothing is printed.
    """

    def __init__(self, quiet: bool) -> None:
        self.quiet, self._began = quiet, 0.0
        self._losses: list[Tensor] = []  # of the epoch, one per step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, also where a fit resumes within an epoch."""
        self._began, self._losses = time.monotonic(), []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the clock."""
        self._began, self._losses = time.monotonic(), []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of the step."""
        self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning has divided by it

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the epoch has come to."""
        if self.quiet or trainer.progress_bar_callback is not None or not trainer.is_global_zero:
            return
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if key in _BY_EPOCH}
        values = f", loss {torch.stack(self._losses).mean():.4f}" if self._losses else ""
        values += "".join(
            f", {name} {style.format(found[key])}" for key, (name, style) in _BY_EPOCH.items() if key in found
        )
        seconds = time.monotonic() - self._began
        print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}{values}, {seconds:.1f} s", flush=True)


def beginning(model: ClassificationModule, trainer: Trainer, folder: Path) -> str:
    """Say in one line what is trained where, in place of Lightning's table of modules.

    Args:
        model: The model.
        trainer: The trainer.
        folder: The run's folder.

    Returns:
        Such as ``CrossEntropy with digits_cnn, 53,362 parameters; cpu; seed 0; runs/digits-cross_entropy-0``.
    """
    encoder = model.hparams.get("encoder")
    encoder = encoder.get("name") if isinstance(encoder, dict) else encoder
    network = f" with {encoder}" if isinstance(encoder, str) else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = trainer.strategy.root_device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if trainer.world_size > 1:
        where = f"{trainer.world_size} x {where}"
    what = f"{type(model).__name__}{network}, {parameters:,} parameters"
    return f"{what}; {where}; seed {run_seed()}; {folder}"


def print_results(trainer: Trainer, datamodule: LightningDataModule, title: str) -> None:
    """Print the table of what the trainer has found, on the first process.

    Args:
        trainer: The trainer.
        datamodule: The data.
        title: What stands above the table.
    """
    if not trainer.is_global_zero:
        return
    if getattr(getattr(datamodule, "split", None), "share", False):
        title += f"; {SHARED}"
    for note in getattr(datamodule, "other_notes", []):
        print(note)
    print_table({key: float(value) for key, value in trainer.callback_metrics.items()}, title)
    for name in uses_calibration(trainer):
        print(f"{name} was trained with the calibration split: values and fits on it are not independent.")
