"""Calibrators: maps from logits to calibrated log-probabilities, fitted on held-out rows."""

from calib_lightning.posthoc.base import Calibrator, FitReport, Optimum, as_logits
from calib_lightning.posthoc.saving import calibrator_of, calibrator_record, load_calibrator, save_calibrator
from calib_lightning.posthoc.spec import build, parse
from calib_lightning.posthoc.temperature import FixedTemperature

__all__ = [
    "Calibrator",
    "FitReport",
    "FixedTemperature",
    "Optimum",
    "as_logits",
    "build",
    "calibrator_of",
    "calibrator_record",
    "load_calibrator",
    "parse",
    "save_calibrator",
]
