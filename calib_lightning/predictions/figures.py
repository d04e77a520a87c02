"""The figures of ``calib score --figures``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from calib_lightning.metrics import families, values_by_severity
from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.ordered import order_rows
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.plots import (
    confidence_histogram,
    reliability_diagram,
    risk_coverage_curve,
    robustness_curves,
    save_figure,
)
from calib_lightning.plots.robustness import SHOWN
from calib_lightning.predictions.others import corrupted_sets
from calib_lightning.predictions.reading import Predictions
from calib_lightning.utils.run_folder import run_of

_KINDS = ("reliability_diagram", "confidence_histogram", "risk_coverage_curve")


def every_figure(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files of all figures of these sets."""
    every = list(names)
    figures = [path for name in shown_sets(every) for path in figure_files(folder, name)]
    return figures + [path for name in curve_names(every) for path in _files(folder, name, ("robustness",))]


def shown_sets(names: Iterable[str]) -> list[str]:
    """The sets that have figures of their own: not the single corruptions of a benchmark."""
    every = list(names)
    corrupted = corrupted_sets(every)
    return [name for name in every if name not in corrupted]


def curve_names(names: Iterable[str]) -> list[str]:
    """The benchmarks of corruptions in several severities, which have a curve over them."""
    return [family.name for family in families(names) if len(family.severities) > 1]


def figure_files(folder: Path, name: str) -> list[Path]:
    """The files of `write_figures`."""
    return _files(folder, name, _KINDS)


def _files(folder: Path, name: str, kinds: Iterable[str]) -> list[Path]:
    return [folder / name / f"{kind}{suffix}" for kind in kinds for suffix in (".png", ".svg")]


def write_figures(folder: Path, name: str, predictions: Predictions, n_bins: int) -> list[Path]:
    """Save a reliability diagram, confidence histogram and risk-coverage curve as PNG and SVG in ``folder/name``."""
    rows = Rows(predictions.scores, predictions.labels, predictions.confidence, predictions.input)
    ordered = order_rows(rows.log_odds, rows.correct)
    title = _title(name, predictions)
    figures = {
        "reliability_diagram": reliability_diagram(bin_sums(rows.confidence, rows.correct, n_bins), title=title),
        "confidence_histogram": confidence_histogram(ordered, title=title),
        "risk_coverage_curve": risk_coverage_curve(ordered, title=title),
    }
    return [save_figure(figures[path.stem], path) for path in figure_files(folder, name)]


def _title(name: str, predictions: Predictions) -> str:
    """The run, whose folder is named after data and method, or else the file; set and calibrator."""
    origin = predictions.origin
    run = None if origin.file is None else run_of(origin.file)
    if run is not None and run.name == "test":  # the folder of `calib test` in that of the fit
        run = run.parent
    parts = [run.name if run else "", name, origin.calibrator]
    return ", ".join(filter(None, parts))


def write_curves(
    folder: Path, name: str, values: Mapping[str, Mapping[str, float]], sets: Mapping[str, Predictions]
) -> list[Path]:
    """Save the curves over severity of a benchmark of corruptions; ``values`` are those of all sets by name."""
    family = next(family for family in families(values) if family.name == name)
    by_severity = values_by_severity(family, values)
    first = next(iter(by_severity.values()))[0]
    shown = sets[next(iter(family.members))]
    title, rows = _title(name, shown), len(shown.labels)
    figure = robustness_curves(by_severity, metrics=[key for key in SHOWN if key in first], title=title, rows=rows)
    return [save_figure(figure, path) for path in _files(folder, name, ("robustness",))]
