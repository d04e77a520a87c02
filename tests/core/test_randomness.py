"""What a training step draws depends on the step and on nothing else."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from calib_lightning.core.randomness import StepSeed

STEPS = 4


class Drawing(LightningModule):
    """Writes down what each training step draws; ``waste`` draws in validation as well."""

    def __init__(self, waste: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.drawn: list[tuple[float, float, float]] = []
        self.waste = waste

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
        return self.weight * batch.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        for _ in range(self.waste):
            self.training_step(batch, batch_idx)
            self.drawn.pop()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def draw(seed: int = 0, waste: int = 0, stage: int | None = None, **options: Any) -> list[tuple[float, float, float]]:
    seed_everything(seed)
    torch.rand(seed + waste)  # where the generators stand before must not matter
    module = Drawing(waste)
    if stage is not None:
        module.stage = stage
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepSeed()],
        **{"max_epochs": 2, **options},
    )
    rows = torch.ones(2 * STEPS, 3)
    trainer.fit(module, DataLoader(rows, batch_size=2), DataLoader(rows[:2], batch_size=2))
    return module.drawn


def test_draws_repeat_and_validation_does_not_disturb_them() -> None:
    first = draw()
    assert len(first) == 2 * STEPS
    assert draw(waste=3, val_check_interval=1) == first


def test_every_step_seed_stage_and_batch_of_a_window_draws_its_own() -> None:
    runs = [draw(), draw(seed=1), draw(stage=1)]
    for column in range(3):
        values = [row[column] for run in runs for row in run]
        assert len(set(values)) == len(values) == 3 * 2 * STEPS
    window = draw(accumulate_grad_batches=STEPS, max_epochs=1)  # one global step
    assert len({row[0] for row in window}) == STEPS


def test_a_module_without_a_stage_is_in_stage_0() -> None:
    assert draw(stage=0) == draw()


@pytest.mark.parametrize("step", [0, 7, 10**9])
def test_the_step_alone_decides(step: int) -> None:
    module = Drawing()

    def at(rank: int, step: int, batch: int) -> tuple[float, float, float]:
        StepSeed().on_train_batch_start(SimpleNamespace(global_rank=rank, global_step=step), module, None, batch)
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    here = at(0, step, 1)
    others = [at(1, step, 1), at(0, step + 1, 1), at(0, step, 2)]
    assert at(0, step, 1) == here
    assert all(a != b for other in others for a, b in zip(here, other, strict=True))
