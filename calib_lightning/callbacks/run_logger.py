"""The CSV logger of a run: appends to ``metrics.csv``, also when the run is resumed."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger


class _AppendingWriter(_ExperimentWriter):
    """Lightning's writer without its deletion of an older file: a resumed run keeps its history."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` straight into the run folder, flushed at every entry.

    Hyper-parameters are not written: ``config.yaml`` of the run holds them.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made at its first use."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Write nothing: the run's ``config.yaml`` says more."""
