"""Figures of an evaluated set, without pyplot and Lightning, and how files and loggers get them."""

from calib_lightning.plots.evaluated import figures
from calib_lightning.plots.histogram import confidence_histogram
from calib_lightning.plots.reliability import reliability_diagram, wilson_interval
from calib_lightning.plots.risk_coverage import risk_coverage_curve
from calib_lightning.plots.robustness import robustness_curves
from calib_lightning.plots.saving import log_figure, save_figure

__all__ = [
    "confidence_histogram",
    "figures",
    "log_figure",
    "reliability_diagram",
    "risk_coverage_curve",
    "robustness_curves",
    "save_figure",
    "wilson_interval",
]
