"""Shifted sets and images of other classes, evaluated on one process or on all ranks of a pool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import seed_everything

from calib_lightning.callbacks import SavePredictions
from calib_lightning.core import ClassificationModule
from calib_lightning.data import BenchmarkDataModule, DigitsDataModule, FolderDataModule
from tests.ddp.cases import trainer


class Stored(DigitsDataModule):
    """Digits whose corrupted images are stored, as those of data that is downloaded."""

    root: Path

    @property
    def file_options(self) -> dict[str, Any]:
        return {"root": self.root}


def evaluate(rank: int, world: int, folder: str, others: list[Any], images: str | None) -> dict[str, Any]:
    """Figures and saved predictions of a network over the digits, or image files, and the sets beside them."""
    seed_everything(3)
    shift = [{"name": "generated", "corruptions": ["contrast", "gaussian_noise"], "severities": [2, 5]}]
    options: dict[str, Any] = {"shift": shift, "ood": others, "shift_rows": 101, "batch_size": 16}
    data: BenchmarkDataModule = Stored(**options)
    data.root = Path(folder)
    data.root.mkdir(parents=True, exist_ok=True)
    if images is not None:
        data = FolderDataModule(images, num_workers=0, **options)
    run = trainer(folder, world, [SavePredictions(folder)])
    run.test(ClassificationModule(data.num_classes, encoder="digits_cnn"), datamodule=data, verbose=False)
    os.environ.pop("PL_GLOBAL_SEED", None)
    files = {}
    if rank == 0:
        for path in sorted(Path(folder).rglob("*.npz")):
            with np.load(path) as saved:
                files[path.relative_to(folder).as_posix()] = {key: saved[key] for key in saved.files}
    metrics = {key: float(value) for key, value in run.callback_metrics.items()}
    return {"metrics": metrics, "values": run.lightning_module.test_values, "files": files}
