"""The report of ``calib calibrate`` as text, as Markdown and as JSON, and the folder of files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import calib_lightning
from calib_lightning.calibrate.arguments import Options
from calib_lightning.calibrate.calibrating import UNCALIBRATED, Fitted, Report, Row
from calib_lightning.calibrate.reading import Source, sha256_of
from calib_lightning.files import write_whole
from calib_lightning.posthoc import FitReport, save_calibrator
from calib_lightning.report import show
from calib_lightning.score.writing import (
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
    folder = _new_folder(wanted)
    files = _file_names(list(report.fitted))
    for name, fitted in report.fitted.items():
        save_calibrator(fitted.calibrator, folder / files[name])
    markdown = grids_as_markdown(_grids(report, options), _remarks(report, options))
    write_whole(folder / "report.md", lambda file: file.write(markdown.encode()))
    text = json_text(_content(report, options, files))
    write_whole(folder / "report.json", lambda file: file.write(text.encode()))
    return folder


def _new_folder(wanted: Path) -> Path:
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 2
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
        else:
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
    return {**_report_of(fitted)._asdict(), "notes": fitted.notes}


def _report_of(fitted: Fitted) -> FitReport:
    assert fitted.calibrator.report is not None
    return fitted.calibrator.report


def _grids(report: Report, options: Options) -> Iterator[Grid]:
    for source in report.inputs.tests:
        rows, classes = source.predictions.scores.shape
        entries = [Entry(name, [], row.figures) for name, row in report.rows[source.name].items()]
        yield from figure_grids(
            f"{source.name}: {rows:,} rows, {classes:,} classes, {bins_title(options)}", [""], entries
        )
    if report.fitted:
        rows = len(report.inputs.calibration.predictions.labels)
        header = ["calibrator", "converged", "passes", "gradient", "at bound", "NLL", "ECE %", "accuracy change %"]
        fits = [[name, *_fit_cells(_report_of(fitted))] for name, fitted in report.fitted.items()]
        yield Grid(f"fits to the {rows:,} calibration rows, with the figures of these rows", header, fits)


def _fit_cells(fit: FitReport) -> list[str]:
    gradient = "-" if fit.gradient_norm != fit.gradient_norm else f"{fit.gradient_norm:.1e}"
    return [
        "yes" if fit.converged else "no",
        f"{fit.passes:,}",
        gradient,
        "yes" if fit.at_bound else "no",
        f"{show(fit.nll_before, percent=False)} → {show(fit.nll_after, percent=False)}",
        f"{show(fit.ece_before, percent=True)} → {show(fit.ece_after, percent=True)}",
        f"{100 * fit.accuracy_change:+.2f}",
    ]


def _remarks(report: Report, options: Options) -> Iterator[str]:
    yield from intervals_remark(options)
    for name, fitted in report.fitted.items():
        for note in fitted.notes:
            yield f"Note: {name}: {note}."
    for note in report.notes:
        yield f"Note: {note}."
    for name, reason in report.failed.items():
        yield f"Failed: {name}: {reason}"
