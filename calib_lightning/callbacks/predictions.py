"""Save the network's predictions for every evaluated set, so that every metric can be recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from calib_lightning.core.data_facts import class_names_of
from calib_lightning.core.data_in_use import datamodule_in_use, label_distributions_of
from calib_lightning.core.own_data import as_batch, has_index
from calib_lightning.types import Prediction
from calib_lightning.utils.files import write_whole

Columns = dict[str, npt.NDArray[Any]]


class SavePredictions(Callback):
    """Writes ``<folder>/<set>.npz`` after ``validate``, ``test`` and ``predict``, in the order of the source file.

    Arrays: ``logits`` (N, K) float32, ``labels`` (N,) int64 (-1 if unlabelled), ``index`` (N,) int64 (the row in the
    source file; for data from outside this package, the position in its set, or a running number if that is unknown)
    and, if available, ``confidence`` (N,) float32 (of a method that defines its own), ``label_distribution`` (N, K)
    float32 and ``class_names`` (K,). The rows of all ranks are gathered; rank zero writes atomically.

    Args:
        folder: Folder of the files; created with the first one.

    Example:
        ``Trainer(callbacks=[SavePredictions("predictions")]).test(module, datamodule)``
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._rows: dict[str, list[Columns]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the rows of an interrupted evaluation."""
        self._rows.clear()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the rows of an interrupted evaluation."""
        self._rows.clear()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the rows of an interrupted evaluation."""
        self._rows.clear()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep one batch of ``validate``; validation within a fit is not kept."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._keep(trainer, "val", outputs, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep one batch of ``test`` under the name of its set."""
        name: str = pl_module.test_sets[dataloader_idx]  # type: ignore[index, assignment]
        self._keep(trainer, name, outputs, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep one batch of ``predict`` under the name of its set."""
        names = getattr(datamodule_in_use(trainer), "predict_names", None)
        name = names[dataloader_idx] if names else f"predict-{dataloader_idx}"
        self._keep(trainer, name, outputs, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation set."""
        self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the test sets and the calibration split."""
        self._write(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the predicted set."""
        self._write(trainer)

    def _keep(self, trainer: Trainer, name: str, outputs: Prediction, batch: Any) -> None:
        image, label, index = as_batch(batch, type(self).__name__, labelled=False)
        rows = self._rows.setdefault(name, [])
        if not has_index(batch):  # numbered consecutively, separately per process
            begun = sum(len(columns["index"]) for columns in rows)
            index = (begun + torch.arange(len(image))) * trainer.world_size + trainer.global_rank
        columns: Columns = {
            "logits": outputs.logits.detach().float().cpu().numpy(),
            "labels": label.detach().cpu().numpy(),
            "index": index.detach().cpu().numpy(),
        }
        if outputs.confidence is not None:
            columns["confidence"] = outputs.confidence.detach().float().cpu().numpy()
        rows.append(columns)

    def _write(self, trainer: Trainer) -> None:
        rows, self._rows = self._rows, {}
        # Every rank has seen every set (perhaps as an empty batch), so the names and their order agree.
        for name, batches in rows.items():
            gathered = _gather(trainer, _concatenate(batches))
            if gathered is not None:
                self._save(trainer, name, _concatenate(gathered))

    def _save(self, trainer: Trainer, name: str, columns: Columns) -> None:
        order = np.argsort(columns["index"], kind="stable")
        columns = {key: value[order] for key, value in columns.items()}
        if trainer.world_size > 1:
            kept = ~_repeated(columns)
            columns = {key: value[kept] for key, value in columns.items()}
        data = datamodule_in_use(trainer)
        distributions = label_distributions_of(data, name)
        if distributions is not None:
            columns["label_distribution"] = distributions[torch.from_numpy(columns["index"])].cpu().numpy()
        # from the data, whose labels they name
        names = class_names_of(data) or getattr(trainer.lightning_module, "class_names", None)
        if names is not None:
            columns["class_names"] = np.array(names, dtype=np.str_)
        source_rows = getattr(data, "source_rows", None)
        if source_rows is not None:
            columns["index"] = source_rows(name)[columns["index"]]
        # the stub takes any name for allow_pickle
        write_whole(self.folder / f"{name}.npz", lambda file: np.savez(file, **columns))  # type: ignore[arg-type]


def _concatenate(batches: list[Columns]) -> Columns:
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def _repeated(columns: Columns) -> npt.NDArray[np.bool_]:
    """Rows that repeat the previous row: Lightning's sampler pads, so that all processes have equally many."""
    same = [columns[key][1:] == columns[key][:-1] for key in ("index", "labels")]
    close = np.isclose(columns["logits"][1:], columns["logits"][:-1], rtol=1e-3, atol=1e-3).all(axis=1)
    return np.concatenate([np.zeros(min(1, len(columns["index"])), dtype=bool), same[0] & same[1] & close])


def _gather(trainer: Trainer, columns: Columns) -> list[Columns] | None:
    """All ranks' rows on rank zero, ``None`` elsewhere."""
    if trainer.world_size == 1:
        return [columns]
    gathered: list[Columns] | None = [columns] * trainer.world_size if trainer.is_global_zero else None
    torch.distributed.gather_object(columns, gathered)
    return gathered
