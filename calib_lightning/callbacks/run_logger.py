"""The CSV logger of a run, which appends to ``metrics.csv`` when the run is resumed."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from calib_lightning.utils.disk import naming
from calib_lightning.utils.files import write_text


class _EpochWriter(_ExperimentWriter):
    """Lightning's writer with one row for each epoch, which also goes on in the file of a run that is resumed.

    What is logged later in an epoch joins its row: the last value of a step stands for the epoch. A file is written
    again as a whole or not at all, so a process that is killed leaves every row of before.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._rows: list[dict[str, Any]] = []

    def _check_log_dir_exists(self) -> None:
        """Leave the older file, which Lightning deletes."""

    def take_over(self, before_step: int) -> None:
        """Keep the rows of earlier steps in the older file; later ones are written again."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            columns, rows = _rows_of(path)
            self._write(columns, [row for row in rows if int(row["step"]) < before_step])

    def save(self) -> None:
        """Write what was logged."""
        if not self.metrics:
            return
        rows, first = list(self._rows), len(self._rows)
        for row in self.metrics:
            if rows and "epoch" in row and str(rows[-1].get("epoch")) == str(row["epoch"]):
                rows[-1] = {**rows[-1], **row}
                first = min(first, len(rows) - 1)
            else:
                rows.append(row)
        new = {key for row in self.metrics for key in row} - set(self.metrics_keys)
        with naming(self.metrics_file_path):
            if new or first < len(self._rows) or not Path(self.metrics_file_path).is_file():
                columns = {*self.metrics_keys, *new}
                leading = [name for name in ("epoch", "step") if name in columns]
                self._write([*leading, *sorted(columns.difference(leading))], rows)
            else:
                with Path(self.metrics_file_path).open("a", newline="") as file:
                    csv.DictWriter(file, fieldnames=self.metrics_keys).writerows(rows[first:])
        self._rows, self.metrics = rows, []

    def _write(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(Path(self.metrics_file_path), text.getvalue())
        self._rows, self.metrics_keys = rows, columns


def _rows_of(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; a process that was killed, or a full disk, may have left part of a row at the end."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    reader = csv.DictReader(io.StringIO(whole.decode(), newline=""))
    return list(reader.fieldnames or []), list(reader)


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` directly to the run folder: one row for each epoch, up to date after every entry.

    Hyper-parameters and the results of test sets are not written: the run's ``config.yaml`` and ``run.json`` have them.

    Args:
        folder: The run folder.
        before_step: Rows of earlier steps in an older file are kept; a resumed run rewrites the others.

    Attributes:
        of_epochs: Whether what is logged belongs to an epoch of training; else it is left out. `LogRun` sets it.
    """

    def __init__(self, folder: str | Path, before_step: int = 0) -> None:
        self._before_step, self.of_epochs = before_step, True
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, created on first use."""
        if self._experiment is None:
            self._experiment = _EpochWriter(log_dir=self.log_dir)
            self._experiment.take_over(self._before_step)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to the row of their epoch."""
        if self.of_epochs:
            super().log_metrics(dict(metrics), step)

    def finalize(self, status: str) -> None:
        """Write what is left; where the run has failed, that is what will be told."""
        try:
            super().finalize(status)
        except OSError:
            if status == "success":
                raise

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Do nothing: the run's ``config.yaml`` has more."""
