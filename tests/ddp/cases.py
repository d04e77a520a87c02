"""What the tests run on one process or on all ranks of a pool; top-level functions, plain results."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from calib_lightning.callbacks import RunRecord, SavePredictions
from calib_lightning.callbacks.checkpoints import RunCheckpoint
from calib_lightning.core import AtomicCheckpointIO, ClassificationModule, CorrectnessHistory, Preemption, StepSeed
from calib_lightning.core.distributed import own_rows, rows_by_rank
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import (
    BenchmarkDataModule,
    FolderDataModule,
    InMemorySet,
    ResumableLoader,
    SplitSpec,
    ToyDataModule,
)
from tests.methods.table import ROWS


def trainer(folder: str | Path, world: int = 1, callbacks: list[Callback] | None = None, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks or []),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def digest(module: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)


# --- a run that is stopped and resumed -------------------------------------------------------------------------------


class Dropped(ClassificationModule):
    """Dropout on top of BatchNorm: needs the random numbers of the step."""

    def features(self, image):
        return torch.nn.functional.dropout(super().features(image), 0.3, self.training)


class Watch(Callback):
    """Notes the rows of every step, and asks for a stop after one of them, as a signal would."""

    def __init__(self, preemption: Preemption | None, stop_after: int | None) -> None:
        self.preemption, self.stop_after = preemption, stop_after
        self.rows: dict[int, list[int]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.setdefault(trainer.current_epoch, []).extend(batch.index.tolist())
        if trainer.global_step == self.stop_after:
            self.preemption._leave_wanted = 143


def fit(
    rank: int,
    world: int,
    folder: str,
    stop_after: int | None = None,
    resume: bool = False,
    workers: int = 0,
    number: int | None = None,
    images: str | None = None,
) -> dict[str, Any]:
    """Three epochs of augmented toy images; stopped after a step, resumed from ``last.ckpt``, or neither.

    The module is that of a row of the table of methods, or one with dropout; the images may be files of a folder.
    """
    seed_everything(11, workers=True)
    data: BenchmarkDataModule
    if images is None:
        data = ToyDataModule(SplitSpec(val=31, calibration=30), batch_size=16, num_workers=workers, train_size=160)
    else:
        data = FolderDataModule(images, SplitSpec(val=31, calibration=30), batch_size=16, num_workers=workers)
    data.augment = True
    build = Dropped if number is None else ROWS[number].new
    module = build(3, encoder="digits_cnn", optimizer=sgd, scheduler=cosine)
    preemption = Preemption(folder)
    # Callbacks run in this order: the wish must be there when Preemption looks.
    watch = Watch(preemption, stop_after)
    keep = RunCheckpoint(folder, "last")
    run = trainer(folder, world, [StepSeed(), watch, preemption, keep], max_epochs=3)
    stopped = None
    try:
        run.fit(module, datamodule=data, ckpt_path=str(Path(folder) / "last.ckpt") if resume else None)
    except Preempted as leaving:
        stopped = leaving.code
    os.environ.pop("PL_GLOBAL_SEED", None)
    return {
        "stopped": stopped,
        "steps": run.global_step,
        "digest": digest(module),
        "rows": watch.rows,
        "metrics": {key: float(value) for key, value in run.callback_metrics.items()},
    }


# --- every method ----------------------------------------------------------------------------------------------------


def fit_method(rank: int, world: int, folder: str, number: int) -> dict[str, Any]:
    """Two epochs of a method: weights, state and validation figures."""
    seed_everything(3, workers=True)
    row = ROWS[number]
    data = ToyDataModule(SplitSpec(val=31, calibration=30), batch_size=16, train_size=131)
    module = row.new(3, encoder="digits_cnn", optimizer=sgd)
    before = digest(module)
    run = trainer(folder, world, [StepSeed()], max_epochs=2)
    run.fit(module, datamodule=data)
    os.environ.pop("PL_GLOBAL_SEED", None)
    return {
        "before": before,
        "digest": digest(module),
        "metrics": {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("val/")},
    }


def count_and_save(rank: int, world: int) -> dict[str, Any]:
    """A history that two processes settle once and then go on with; what a checkpoint would hold."""
    history = CorrectnessHistory(4)
    index, right = ([1, 2, 0], [1, 1, 0]) if rank == 0 else ([1, 3], [1, 1])
    history.update(torch.tensor(index), torch.tensor(right))
    history.settle()
    settled = history.count.tolist()
    for number in [0] if rank == 0 else [3, 3]:
        history.update(torch.tensor([number]), torch.tensor([True]))
    parts = rows_by_rank(history.rows())
    resumed = CorrectnessHistory(4)
    resumed.load_state_dict(history.state_dict())
    resumed.restore(own_rows(parts, rank))
    saved = (history.count.tolist(), [part.tolist() for part in parts])
    return {"settled": settled, "begun": history.counts.tolist(), "own": resumed.counts.tolist(), "saved": saved}


def restore_alone(saved: tuple[list[int], list[list[list[int]]]]) -> list[int]:
    """The history of `count_and_save` on one process."""
    history = CorrectnessHistory(4)
    history.count.copy_(torch.tensor(saved[0]))
    history.restore(own_rows([torch.tensor(part) for part in saved[1]], 0))
    history.settle()
    return history.count.tolist()


def fit_recorded(rank: int, world: int, folder: str) -> list[str]:
    """One epoch where only the first rank knows the run's folder: the other believes in one of an older run."""
    mine = Path(folder) / f"rank-{rank}"
    if rank > 0:
        mine.mkdir(parents=True)
        (mine / "run.json").write_text(json.dumps({"data": "ToyDataModule", "splits": "older", "stages": []}))
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    run = trainer(folder, world, [RunRecord(mine)], max_epochs=1)
    run.fit(module, datamodule=ToyDataModule(SplitSpec(val=30), train_size=90))
    return sorted(path.name for path in mine.iterdir())


# --- exact evaluation ------------------------------------------------------------------------------------------------


class Table(ClassificationModule):
    """A network that says what the image says: a fixed table of logits."""

    def forward(self, image):
        return image.flatten(1)


def test_table(rank: int, world: int, size: int, batch_size: int) -> dict[str, float]:
    """Figures of ``trainer.test`` over a fixed table of float64 logits; K = 5."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(size, 5, 1, 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (size,), generator=generator)
    loader = ResumableLoader(InMemorySet(logits, labels, torch.arange(size)), batch_size, shuffle=False, seed=0)
    run = trainer(".", world)
    run.test(Table(5, encoder="digits_cnn"), dataloaders=[loader], verbose=False)
    # Lightning keeps what is logged in float32; the state itself says it exactly.
    values = run.lightning_module.test_states[0].compute()
    return {key: float(value) for key, value in values.items()} | {"n": int(run.callback_metrics["test/n"])}


def test_network(rank: int, world: int, folder: str, images: str | None) -> dict[str, Any]:
    """Figures and saved predictions of a small network over 151 test images, made or in the files of a folder."""
    seed_everything(3)
    data: BenchmarkDataModule = ToyDataModule(SplitSpec(calibration=33), batch_size=16, test_size=151)
    if images is not None:
        data = FolderDataModule(images, SplitSpec(calibration=33, test=151), batch_size=16, num_workers=0)
    module = ClassificationModule(3, encoder="digits_cnn")
    run = trainer(folder, world, [SavePredictions(folder)])
    run.test(module, datamodule=data, verbose=False)
    os.environ.pop("PL_GLOBAL_SEED", None)
    files = {}
    if rank == 0:
        for name in ("test", "calibration"):
            with np.load(Path(folder) / f"{name}.npz") as saved:
                files[name] = {key: saved[key] for key in saved.files}
    return {"metrics": {key: float(value) for key, value in run.callback_metrics.items()}, "files": files}


test_table.__test__ = test_network.__test__ = False  # type: ignore[attr-defined]
