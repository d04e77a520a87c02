"""The CSV logger of a run, which appends to ``metrics.csv`` when the run is resumed."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger

from calib_lightning.utils.disk import naming
from calib_lightning.utils.files import write_text


class _AppendingWriter(_ExperimentWriter):
    """Lightning's writer, which appends to an older file (a resumed run keeps its history) and loses no row if killed.

    Lightning deletes the older file, and rewrites it in place where a new column appears.
    """

    def _check_log_dir_exists(self) -> None:
        pass

    def take_over(self, before_step: int) -> None:
        """Keep the rows of earlier steps in the older file; later ones are written again."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        fieldnames, rows = _rows_of(path)
        self.metrics_keys = fieldnames
        self._write(row for row in rows if int(row["step"]) < before_step)

    def save(self) -> None:
        """Append what was logged."""
        with naming(self.metrics_file_path):
            super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(_rows_of(Path(self.metrics_file_path))[1])

    def _write(self, rows: Iterable[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_text(Path(self.metrics_file_path), text.getvalue())


def _rows_of(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; a process that was killed, or a full disk, may have left part of a row at the end."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    reader = csv.DictReader(io.StringIO(whole.decode(), newline=""))
    return list(reader.fieldnames or []), list(reader)


class RunLogger(CSVLogger):
    """Writes ``metrics.csv`` directly to the run folder, flushed at every entry.

    Hyper-parameters are not written: the run's ``config.yaml`` has them.

    Args:
        folder: The run folder.
        before_step: Rows of earlier steps in an older file are kept; a resumed run rewrites the others.
    """

    def __init__(self, folder: str | Path, before_step: int = 0) -> None:
        self._before_step = before_step
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, created on first use."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
            self._experiment.take_over(self._before_step)
        return self._experiment

    def finalize(self, status: str) -> None:
        """Write what is left; where the run has failed, that is what will be told."""
        try:
            super().finalize(status)
        except OSError:
            if status == "success":
                raise

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Do nothing: the run's ``config.yaml`` has more."""
