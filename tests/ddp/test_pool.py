"""The pool itself: results in order, errors that say where, a fresh start after a failure, Lightning inside."""

import os
import time

import pytest
import torch
import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.ddp.pool import PoolError, ProcessPool


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return (self.layer(batch[0]) - 3 * batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _sum(rank: int, world: int, start: int) -> tuple[int, int, float, int]:
    total = torch.tensor(float(start + rank))
    torch.distributed.all_reduce(total)
    return os.getpid(), rank, total.item(), torch.get_num_threads()


def _fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("rank one has had enough")
    torch.distributed.barrier()


def _sleep(rank: int, world: int) -> None:
    time.sleep(60)


def _die(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(7)


def _fit(rank: int, world: int, rows: int) -> tuple[int, int, float]:
    torch.manual_seed(rank)  # the ranks start apart; DDP must bring them together
    module = Line()
    x = torch.linspace(-1, 1, rows).unsqueeze(1)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=2))
    return trainer.world_size, trainer.global_step, module.layer.weight.item()


def test_results_come_in_the_order_of_ranks_and_workers_are_kept(pool2: ProcessPool) -> None:
    first = pool2.run(_sum, 5)
    second = pool2.run(_sum, 10)
    assert [(rank, total, threads) for _, rank, total, threads in first] == [(0, 11.0, 1), (1, 11.0, 1)]
    assert [total for _, _, total, _ in second] == [21.0, 21.0]
    assert [row[0] for row in first] == [row[0] for row in second] == pool2.pids()


def test_lightning_fits_twice_in_one_pool(pool2: ProcessPool) -> None:
    for rows, steps in ((8, 4), (16, 8)):  # half the rows on each rank, batches of two, two epochs
        (world, count, weight), (_, _, other) = pool2.run(_fit, rows)
        assert (world, count) == (2, steps)
        assert weight == other


def test_an_error_names_the_rank_and_the_next_use_starts_anew(pool2: ProcessPool) -> None:
    with pytest.raises(PoolError, match=r"(?s)rank 1:.*rank one has had enough"):
        pool2.run(_fail_on_one)
    assert [row[2] for row in pool2.run(_sum, 0)] == [1.0, 1.0]


@pytest.mark.slow
def test_a_dead_worker_and_a_timeout_are_errors(pool3: ProcessPool) -> None:
    with pytest.raises(PoolError, match="exit code 7"):
        pool3.run(_die)
    with pytest.raises(PoolError, match=r"no answer in 1\.0 s"):
        pool3.run(_sleep, timeout=1.0)
    assert [row[2] for row in pool3.run(_sum, 0)] == [3.0, 3.0, 3.0]
