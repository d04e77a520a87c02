"""Several processes: rows of different numbers, and strategies under which parameters can be frozen."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors


def check_strategy(trainer: Trainer, name: str) -> None:
    """Refuse a strategy that may step tensors other than the network's own: freezing would not work.

    Args:
        trainer: The trainer.
        name: Who freezes.

    Raises:
        ValueError: If the strategy is another than a single device or DDP.
    """
    strategy = trainer.strategy
    # these two inherit from DDP, but step parameters of their own
    others = DeepSpeedStrategy | XLAStrategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, others):
        raise ValueError(
            f"{name} cannot freeze parameters under the strategy {type(strategy).__name__}: it may step tensors other "
            "than the network's. Allowed: a single device (trainer.strategy=auto with devices=1) or ddp."
        )


def world_size() -> int:
    """Return the number of processes that train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rows_by_rank(rows: Tensor) -> list[Tensor]:
    """Return the rows of every process, in the order of ranks; all processes must call it.

    Args:
        rows: ``(n, ...)``; n may differ between processes, the other sizes and the dtype may not.

    Returns:
        One tensor for every process, on the device of ``rows``.
    """
    parts: list[Tensor] = gather_all_tensors(rows) if world_size() > 1 else [rows]
    return parts


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, in the order of ranks; all processes must call it.

    Args:
        rows: ``(n, ...)``; n may differ between processes.

    Returns:
        ``(sum of n, ...)``, the same on every process.
    """
    return torch.cat(rows_by_rank(rows))


def own_rows(parts: list[Tensor], rank: int) -> Tensor:
    """Pick what a process gets back of rows that were saved by rank.

    Args:
        parts: Rows of every process that there was.
        rank: This process.

    Returns:
        Its own rows. With another number of processes nobody's rows are whose they were: the first one gets all.
    """
    if len(parts) == world_size():
        return parts[rank]
    return torch.cat(parts) if rank == 0 else parts[0][:0]
