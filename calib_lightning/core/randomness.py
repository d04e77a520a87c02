"""Seeds that make random numbers a function of the training step, or of the stage."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from calib_lightning.utils.seeding import derive_seed, run_seed

_HEAD = 101  # separates the random stream of new heads from others


class StepSeed(Callback):
    """Seed the global generators of torch, NumPy and Python before every training step.

    The seed is ``derive_seed(run seed, stage, rank, global step, batch index)``, so dropout, mixup weights and masks
    are a function of the step. No generator state needs saving: a run that is stopped anywhere and resumed draws the
    same numbers as an uninterrupted run. The batch index is included because all batches of a gradient-accumulation
    window share a global step. The stage is ``pl_module.stage`` if it exists, else 0.

    Evaluation is not seeded: whatever it draws, the next training step starts from its own seed. A batch is fetched
    before this hook runs, so loaders and augmentations must not use the global generators of the main process.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[StepSeed()], logger=False)
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the three generators (tens of microseconds)."""
        stage = int(getattr(pl_module, "stage", 0))
        seed = derive_seed(run_seed(), stage, trainer.global_rank, trainer.global_step, batch_idx)
        if pl_module.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed queries every absent accelerator
        else:
            torch.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)


@contextmanager
def seeded_head(position: int) -> Iterator[None]:
    """Make a new head a function of the run's seed and the stage, identical on all processes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(run_seed(), position, _HEAD))
        yield
