"""The report of ``calib calibrate`` as text, as Markdown and as JSON, and the folder of files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import calib_lightning
from calib_lightning.commands.calibrate_arguments import Options
from calib_lightning.posthoc import FitReport, save_calibrator
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.predictions.calibrating import UNCALIBRATED, AnyCalibrator, Fitted, Report, Row
from calib_lightning.predictions.calibration_sets import Source, sha256_of
from calib_lightning.predictions.report import show
from calib_lightning.predictions.writing import (
    Entry,
    Grid,
    bins_title,
    figure_content,
    figure_grids,
    figure_settings,
    grids_as_markdown,
    grids_as_text,
    intervals_remark,
    json_text,
)
from calib_lightning.utils.files import numbered_folder, write_whole

_LONGEST_NAME = 100


def as_text(report: Report, options: Options, console: Console | None = None) -> str:
    """Write a report for people.

    Args:
        report: The report.
        options: The command line.
        console: A terminal to print to; without one the text is as wide as it needs to be.

    Returns:
        The text, empty if it went to a terminal.
    """
    return grids_as_text(_grids(report, options), _remarks(report, options), console)


def write_folder(report: Report, options: Options, wanted: Path) -> Path:
    """Write the calibrators, ``report.json`` and ``report.md`` to a new folder.

    Args:
        report: The report.
        options: The command line.
        wanted: The folder; a number is added where it exists.

    Returns:
        The folder that was made.

    Raises:
        OSError: It cannot be written.
    """
    folder = numbered_folder(wanted)
    files = _file_names(list(report.fitted))
    for name, fitted in report.fitted.items():
        save_calibrator(fitted.calibrator, folder / files[name])
    markdown = grids_as_markdown(_grids(report, options), _remarks(report, options))
    write_whole(folder / "report.md", lambda file: file.write(markdown.encode()))
    text = json_text(_content(report, options, files))
    write_whole(folder / "report.json", lambda file: file.write(text.encode()))
    return folder


def _file_names(names: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^\w.=+-]+", "_", name).strip("_")[:_LONGEST_NAME]
        file, number = f"{stem}.pt", 2
        # Where the file system does not tell capital letters from small ones, neither must we.
        while file.lower() in {other.lower() for other in files.values()}:
            file, number = f"{stem}-{number}.pt", number + 1
        files[name] = file
    return files


def _content(report: Report, options: Options, files: dict[str, str]) -> dict[str, Any]:
    settings = figure_settings(options) | {"calibrators": [*report.fitted, *report.failed]}
    if options.run is not None:
        settings["run"] = str(options.run)
    if report.checkpoint is not None:
        settings["checkpoint"] = {"file": str(report.checkpoint), "sha256": sha256_of(report.checkpoint)}
    return {
        "calib_lightning": calib_lightning.__version__,
        "settings": settings,
        "calibration": _source_content(report.inputs.calibration),
        "sets": {
            source.name: {
                **_source_content(source),
                "rows": {name: _row_content(name, row) for name, row in report.rows[source.name].items()},
            }
            for source in report.inputs.tests
        },
        "calibrators": {
            name: {
                "file": files[name],
                "spec": fitted.calibrator.spec,
                "fit": _fit_content(fitted),
            }
            for name, fitted in report.fitted.items()
        },
        "failed": report.failed,
        "notes": report.notes,
    }


def _source_content(source: Source) -> dict[str, Any]:
    scores = source.predictions.scores
    return {
        "files": [{"file": str(path), "sha256": sha256_of(path)} for path in source.files],
        "n": len(scores),
        "classes": scores.shape[1],
    }


def _row_content(name: str, row: Row) -> dict[str, Any]:
    own = "from the file" if name == UNCALIBRATED else "from the calibrator"
    return {"confidence": own if row.own_confidence else "largest probability", **figure_content(row.figures)}


def _fit_content(fitted: Fitted) -> dict[str, Any]:
    calibrator = fitted.calibrator
    if isinstance(calibrator, NeuralClamping):
        assert calibrator.report is not None
        runs = {
            "chosen": calibrator.report.chosen._asdict(),
            "candidates": [run._asdict() for run in calibrator.report.candidates],
        }
        return {**calibrator.report._asdict(), **runs, "notes": fitted.notes}
    assert calibrator.report is not None
    return {**calibrator.report._asdict(), "notes": fitted.notes}


def _grids(report: Report, options: Options) -> Iterator[Grid]:
    for source in report.inputs.tests:
        rows, classes = source.predictions.scores.shape
        entries = [Entry(name, [], row.figures) for name, row in report.rows[source.name].items()]
        title = f"{source.name}: {rows:,} rows, {classes:,} classes, {bins_title(options)}"
        yield from figure_grids(title, [""], entries)
    if report.fitted:
        rows = len(report.inputs.calibration.predictions.labels)
        header = ["calibrator", "converged", "passes", "gradient", "at bound", "NLL", "ECE %", "accuracy change %"]
        fits = [[name, *_fit_cells(fitted.calibrator)] for name, fitted in report.fitted.items()]
        yield Grid(f"fits to the {rows:,} calibration rows, with the figures of these rows", header, fits)


def _fit_cells(calibrator: AnyCalibrator) -> list[str]:
    if isinstance(calibrator, NeuralClamping):
        assert calibrator.report is not None
        chosen = calibrator.report.chosen
        how = ["-"] * 4  # it is stopped after a number of epochs, and notes say if that was too early
        before, after = (calibrator.report.nll_before, calibrator.report.ece_before), (chosen.nll, chosen.ece)
        change = chosen.accuracy_change
    else:
        assert calibrator.report is not None
        fit = calibrator.report
        how = [_yes(fit.converged), f"{fit.passes:,}", _gradient(fit), _yes(fit.at_bound)]
        before, after, change = (fit.nll_before, fit.ece_before), (fit.nll_after, fit.ece_after), fit.accuracy_change
    nll, ece = (
        f"{show(one, percent)} → {show(other, percent)}"
        for one, other, percent in zip(before, after, (False, True), strict=True)
    )
    return [*how, nll, ece, f"{100 * change:+.2f}"]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _gradient(fit: FitReport) -> str:
    return "-" if math.isnan(fit.gradient_norm) else f"{fit.gradient_norm:.1e}"


def _remarks(report: Report, options: Options) -> Iterator[str]:
    yield from intervals_remark(options)
    for name, fitted in report.fitted.items():
        for note in fitted.notes:
            yield f"Note: {name}: {note}."
    for note in report.notes:
        yield f"Note: {note}."
    for name, reason in report.failed.items():
        yield f"Failed: {name}: {reason}"
