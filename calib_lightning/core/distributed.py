"""Several processes: gathering rows, and strategies that allow freezing parameters."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from calib_lightning.core.twins import is_twin


def check_strategy(trainer: Trainer, name: str) -> None:
    """Reject a strategy that may step tensors other than the network's own, which would defeat freezing."""
    strategy = trainer.strategy
    # the last two inherit from DDP but step their own parameters
    if not is_twin(strategy, SingleDeviceStrategy, DDPStrategy) or is_twin(strategy, DeepSpeedStrategy, XLAStrategy):
        raise ValueError(
            f"The strategy is {type(strategy).__name__}, under which {name} cannot freeze parameters: it may step "
            "tensors other than the network's. Use a single device (trainer.strategy=auto with devices=1) or ddp."
        )


def world_size() -> int:
    """Return the number of training processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows_by_rank(rows: Tensor) -> list[Tensor]:
    """Return the rows ``(n, ...)`` of every process in rank order; collective, n may differ between processes."""
    parts: list[Tensor] = gather_all_tensors(rows) if world_size() > 1 else [rows]
    return parts


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows ``(n, ...)`` of all processes in rank order; collective, n may differ."""
    return torch.cat(rows_by_rank(rows))


def own_rows(parts: list[Tensor], rank: int) -> Tensor:
    """Return a rank's share of rows that were saved by rank.

    If the number of processes has changed, rank 0 gets all rows.
    """
    if len(parts) == world_size():
        return parts[rank]
    return torch.cat(parts) if rank == 0 else parts[0][:0]
