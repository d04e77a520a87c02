"""The report of `calibrate`, and how it is saved."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import calib_lightning
from calib_lightning.metrics import OTHERS, means_of_families
from calib_lightning.metrics.spread import Spread, over_seeds
from calib_lightning.posthoc import Calibrator, FitReport, save_calibrator
from calib_lightning.predictions.inputs import Inputs
from calib_lightning.predictions.others import corrupted_sets, ood_grid, reference
from calib_lightning.predictions.reading import Predictions
from calib_lightning.predictions.results import MEAN_OF_OTHERS, OOD_TITLE, lines_of_corruptions
from calib_lightning.predictions.settings import Settings
from calib_lightning.predictions.tables import (
    Entry,
    Grid,
    Report,
    bins_title,
    cell,
    heading,
    intervals_remark,
    settings_content,
    show,
    value_grids,
    values_content,
)
from calib_lightning.predictions.values import Values
from calib_lightning.utils.files import file_sha256, numbered_folder, write_whole

UNCALIBRATED = "uncalibrated"
"""Row of the network without a calibrator."""

_LONGEST_NAME = 100


class Fitted(NamedTuple):
    """A fitted calibrator, and the warnings of its fit."""

    calibrator: Calibrator
    notes: list[str]

    @property
    def report(self) -> FitReport:
        """Report of the fit."""
        assert self.calibrator.report is not None
        return self.calibrator.report

    @property
    def temperature(self) -> float | None:
        """T, if the calibrator has one."""
        # With one class nothing is fitted.
        return getattr(self.calibrator, "temperature", None) if self.calibrator.num_classes != 1 else None


class Row(NamedTuple):
    """Values of one set with or without a calibrator; ``own_confidence``: not the largest probability."""

    values: Values
    own_confidence: bool


@dataclass(frozen=True, repr=False)
class CalibrationReport(Report):
    """Results of `calibrate`.

    Attributes:
        inputs: The sets.
        settings: The settings.
        fitted: The fitted calibrators by name, in the given order.
        rows: For each set, a row for `UNCALIBRATED` and one for each calibrator.
        failed: Reasons of failures, by calibrator.
        notes: Remarks on the values.
        groups: Names of fits that differ by their seed, by the name of the first.
        others: For `UNCALIBRATED` and each calibrator, how well images of other classes are told, by their set.
    """

    inputs: Inputs
    settings: Settings
    fitted: dict[str, Fitted]
    rows: dict[str, dict[str, Row]]
    failed: dict[str, str]
    notes: list[str]
    groups: dict[str, list[str]] = field(default_factory=dict)
    others: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def calibrators(self) -> dict[str, Calibrator]:
        """The fitted calibrators by name."""
        return {name: found.calibrator for name, found in self.fitted.items()}

    def save(self, folder: str | Path) -> Path:
        """Write the calibrators, ``report.json`` and ``report.md`` to a new folder.

        Args:
            folder: The folder; a number is appended if it exists.

        Returns:
            The new folder.

        Raises:
            OSError: The folder cannot be written.
        """
        made = numbered_folder(Path(folder))
        for name, file in self.files.items():
            save_calibrator(self.fitted[name].calibrator, made / file)
        for file, text in {"report.md": self.to_markdown(), "report.json": self.to_json()}.items():
            _write(made / file, text)
        return made

    def spreads(self, test: str) -> dict[str, dict[str, Spread]]:
        """Mean and sample standard deviation of every metric of a set, for calibrators fitted with several seeds."""
        found = {}
        for called, names in self.groups.items():
            each = [self.rows[test][name].values.values for name in names if name in self.rows[test]]
            if len(each) > 1:
                found[called] = {key: over_seeds(values[key] for values in each) for key in each[0]}
        return found

    @property
    def files(self) -> dict[str, str]:
        """File names by calibrator."""
        return _file_names(list(self.fitted))

    def grids(self) -> Iterator[Grid]:
        """One table for each set, and one of the fits."""
        corrupted = corrupted_sets(self.inputs.tests)
        for name, test in self.inputs.tests.items():
            if name in corrupted:
                continue
            rows, classes = test.scores.shape
            entries = [Entry(called, [], row.values) for called, row in self.rows[name].items()]
            title = f"{name}: {rows:,} rows, {classes:,} classes, {bins_title(self.settings)}"
            yield from value_grids(title, [""], entries, best=True)
            if spreads := self.spreads(name):
                keys = list(next(iter(spreads.values())))
                means = [[called, *(_mean_and_std(k, found[k]) for k in keys)] for called, found in spreads.items()]
                yield Grid(f"{name}: mean and standard deviation over seeds", ["", *map(heading, keys)], means)
        yield from self._shift_grids()
        for name in self.others.get(UNCALIBRATED, {}):
            of_each = [(called, values[name]) for called, values in self.others.items()]
            title = OOD_TITLE.format(reference(self.inputs.tests))
            yield ood_grid(f"{MEAN_OF_OTHERS if name == OTHERS else name}: {title}", "", of_each)
        if self.fitted:
            rows = len(self.inputs.calibration.labels)
            header = [
                "calibrator",
                "T",
                "converged",
                "passes",
                "gradient",
                "at bound",
                "NLL",
                "ECE %",
                "accuracy change %",
            ]
            fits = [[name, _temperature(fitted), *_fit_cells(fitted.report)] for name, fitted in self.fitted.items()]
            yield Grid(f"fits to the {rows:,} calibration rows, with values on these rows", header, fits)

    def _shift_grids(self) -> Iterator[Grid]:
        """A table for each benchmark of corruptions: some severities and the mean, each over all corruptions."""
        found = {called: lines_of_corruptions(self._values(called)) for called in (UNCALIBRATED, *self.fitted)}
        for place, line in enumerate(found[UNCALIBRATED]):
            entries = [Entry(called, [], Values(dict(lines[place].values), {}, {})) for called, lines in found.items()]
            yield from value_grids(f"{line.name}: {line.size}, {bins_title(self.settings)}", [""], entries, best=True)

    def _values(self, called: str) -> dict[str, dict[str, float]]:
        return {name: rows[called].values.values for name, rows in self.rows.items()}

    def _seeds_content(self, test: str) -> dict[str, Any]:
        return {
            called: {key: value._asdict() for key, value in found.items()}
            for called, found in self.spreads(test).items()
        }

    def remarks(self) -> Iterator[str]:
        """The method of the intervals, the notes and the failures."""
        yield from intervals_remark(self.settings)
        yield "Bold (plain text: between stars): the best value. Where intervals overlap, chance may decide it."
        for name, fitted in self.fitted.items():
            for note in fitted.notes:
                yield f"Note: {name}: {note}."
        for note in self.notes:
            yield f"Note: {note}."
        for name, reason in self.failed.items():
            yield f"Failed: {name}: {reason}"

    def content(self) -> dict[str, Any]:
        """The report as plain data."""
        inputs = self.inputs
        settings = settings_content(self.settings, inputs.calibration.input)
        settings["calibrators"] = [*self.fitted, *self.failed]
        if inputs.run is not None:
            settings["run"] = str(inputs.run)
        if inputs.checkpoint is not None:
            settings["checkpoint"] = {"file": str(inputs.checkpoint), "sha256": file_sha256(inputs.checkpoint)}
        return {
            "calib_lightning": calib_lightning.__version__,
            "settings": settings,
            "calibration": _set_content(inputs.calibration),
            "sets": {
                name: {
                    **_set_content(test),
                    "rows": {called: _row_content(called, row) for called, row in self.rows[name].items()},
                    **({"seeds": seeds} if (seeds := self._seeds_content(name)) else {}),
                }
                for name, test in inputs.tests.items()
            },
            "calibrators": {
                name: {"file": self.files[name], "spec": fitted.calibrator.spec, "fit": _fit_content(fitted)}
                for name, fitted in self.fitted.items()
            },
            "means": {called: means_of_families(self._values(called)) for called in (UNCALIBRATED, *self.fitted)},
            "ood": self.others if self.inputs.others else {},
            "failed": self.failed,
            "notes": self.notes,
        }


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def _file_names(names: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^\w.=+-]+", "_", name).strip("_")[:_LONGEST_NAME]
        file, number = f"{stem}.pt", 2
        # Names must also differ on file systems that ignore case.
        while file.lower() in {other.lower() for other in files.values()}:
            file, number = f"{stem}-{number}.pt", number + 1
        files[name] = file
    return files


def _set_content(predictions: Predictions) -> dict[str, Any]:
    return {
        "files": [{"file": str(path), "sha256": file_sha256(path)} for path in predictions.origin.files],
        "n": len(predictions.scores),
        "classes": predictions.scores.shape[1],
    }


def _row_content(name: str, row: Row) -> dict[str, Any]:
    own = "from the file" if name == UNCALIBRATED else "from the calibrator"
    return {"confidence": own if row.own_confidence else "largest probability", **values_content(row.values)}


def _fit_content(fitted: Fitted) -> dict[str, Any]:
    temperature = fitted.temperature
    found = {} if temperature is None else {"temperature": temperature}
    return {**fitted.report._asdict(), **found, **fitted.calibrator.details, "notes": fitted.notes}


def _temperature(fitted: Fitted) -> str:
    return "-" if fitted.temperature is None else f"{fitted.temperature:.4g}"


def _fit_cells(fit: FitReport) -> list[str]:
    gradient = "-" if math.isnan(fit.gradient_norm) else f"{fit.gradient_norm:.1e}"
    nll = f"{show(fit.nll_before, False)} → {show(fit.nll_after, False)}"
    ece = f"{show(fit.ece_before, True)} → {show(fit.ece_after, True)}"
    how = [_yes(fit.converged), f"{fit.passes:,}", gradient, _yes(fit.at_bound)]
    return [*how, nll, ece, f"{100 * fit.accuracy_change:+.2f}"]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _mean_and_std(key: str, value: Spread) -> str:
    return f"{cell(key, value.mean)} ± {cell(key, value.std)}"
