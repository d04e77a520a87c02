"""A staged run that is killed at random moments, again and again, ends in the bits of the one that never was."""

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from calib_lightning.callbacks.checkpoints import RunCheckpoint
from calib_lightning.core import CachedFeatures, Preemption, StageTraining, StepSeed
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import AdaptiveSparsity, MaCCal, MaskedBottleneck, MaskedClassifier
from tests.ddp.cases import cosine, digest, sgd, trainer
from tests.ddp.pool import PoolError, ProcessPool

EPOCHS = 8


class _Pause(Callback):
    """Makes steps long enough to be hit."""

    def __init__(self, folder: str, rank: int, seconds: float) -> None:
        self.ready, self.seconds = Path(folder) / f"ready-{rank}", seconds

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.ready.touch()
        time.sleep(self.seconds)


def staged(rank: int, world: int, folder: str, seconds: float = 0.0) -> dict[str, Any]:
    """Goes on from ``last.ckpt`` where there is one; adaptive masks from the steps of the epoch, stored features."""
    seed_everything(11)
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130)
    switch = MaskedClassifier(
        -4,
        MaskedBottleneck,
        AdaptiveSparsity(held_out=False),
        training=StageTraining(sgd, views=CachedFeatures(folder=folder), batch_size=8),
    )
    module = MaCCal(3, switch, encoder="digits_cnn", optimizer=sgd, scheduler=cosine)
    last = Path(folder) / "last.ckpt"
    callbacks = [StepSeed(), _Pause(folder, rank, seconds), Preemption(folder), RunCheckpoint(folder, "last")]
    run = trainer(folder, world, callbacks, max_epochs=EPOCHS - 4)  # the stage adds its four
    stopped = None
    try:
        run.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    except Preempted as leaving:
        stopped = leaving.code
    os.environ.pop("PL_GLOBAL_SEED", None)
    return {"stopped": stopped, "digest": digest(module), "steps": run.global_step}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path: Path, seed: int, world: int) -> None:
    draw, pool = random.Random(100 * world + seed), ProcessPool(world)
    whole_folder, folder = tmp_path / "whole", tmp_path / "cut"
    whole_folder.mkdir()
    folder.mkdir()
    try:
        whole = pool.run(staged, str(whole_folder))
        kills = {"SIGTERM": 0, "SIGKILL": 0}
        for _ in range(6):
            for ready in folder.glob("ready-*"):
                ready.unlink()
            over = threading.Event()
            signum = draw.choice([signal.SIGTERM, signal.SIGKILL])
            killer = threading.Thread(target=_kill, args=(pool, folder, signum, draw.uniform(0, 0.8), draw, over))
            if not pool.pids():
                pool.run(_nothing)  # starts the workers
            killer.start()
            try:
                parts = pool.run(staged, str(folder), 0.03)
                kills["SIGTERM"] += parts[0]["stopped"] == 143
                assert len({part["stopped"] for part in parts}) == 1
            except PoolError:
                kills["SIGKILL"] += 1
            over.set()
            killer.join()
            pool.close()
        parts = pool.run(staged, str(folder))
    finally:
        pool.close()
    assert sum(kills.values()) > 0
    assert {part["digest"] for part in parts} == {part["digest"] for part in whole} == {whole[0]["digest"]}
    assert parts[0]["steps"] == whole[0]["steps"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == EPOCHS - 1


def _nothing(rank: int, world: int) -> None:
    pass


def _kill(
    pool: ProcessPool, folder: Path, signum: int, seconds: float, draw: random.Random, over: threading.Event
) -> None:
    while len(list(folder.glob("ready-*"))) < pool.world:
        if over.wait(0.01):
            return
    if over.wait(seconds):
        return
    # SIGKILL hits all, as a machine that goes down; a scheduler may tell a single rank
    pids = pool.pids()
    for pid in pids if signum == signal.SIGKILL else draw.sample(pids, draw.randint(1, len(pids))):
        os.kill(pid, signum)
