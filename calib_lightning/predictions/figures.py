"""The figures of ``calib score --figures``."""

from __future__ import annotations

from pathlib import Path

from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.ordered import order_rows
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.plots import confidence_histogram, reliability_diagram, risk_coverage_curve, save_figure
from calib_lightning.predictions.reading import Predictions

_KINDS = ("reliability_diagram", "confidence_histogram", "risk_coverage_curve")


def figure_files(folder: Path, name: str) -> list[Path]:
    """The files of `write_figures`."""
    return [folder / name / f"{kind}{suffix}" for kind in _KINDS for suffix in (".png", ".svg")]


def write_figures(folder: Path, name: str, predictions: Predictions, n_bins: int) -> list[Path]:
    """Save a reliability diagram, confidence histogram and risk-coverage curve as PNG and SVG in ``folder/name``."""
    rows = Rows(predictions.scores, predictions.labels, predictions.confidence, predictions.input)
    ordered = order_rows(rows.log_odds, rows.correct)
    figures = {
        "reliability_diagram": reliability_diagram(bin_sums(rows.confidence, rows.correct, n_bins), title=name),
        "confidence_histogram": confidence_histogram(ordered, title=name),
        "risk_coverage_curve": risk_coverage_curve(ordered, title=name),
    }
    return [save_figure(figures[path.stem], path) for path in figure_files(folder, name)]
