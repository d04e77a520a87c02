"""Read, score and calibrate saved predictions; independent of the command line."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib_lightning.predictions.applying import apply_calibrator, apply_to_file
    from calib_lightning.predictions.calibrating import calibrate
    from calib_lightning.predictions.calibration_report import CalibrationReport
    from calib_lightning.predictions.reading import Predictions, read_predictions
    from calib_lightning.predictions.score_report import ScoreReport
    from calib_lightning.predictions.scoring import apply, score
    from calib_lightning.predictions.settings import Reading, Settings

__all__ = [
    "CalibrationReport",
    "Predictions",
    "Reading",
    "ScoreReport",
    "Settings",
    "apply",
    "apply_calibrator",
    "apply_to_file",
    "calibrate",
    "read_predictions",
    "score",
]

_HOMES = {
    "applying": ("apply_calibrator", "apply_to_file"),
    "calibrating": ("calibrate",),
    "calibration_report": ("CalibrationReport",),
    "reading": ("Predictions", "read_predictions"),
    "score_report": ("ScoreReport",),
    "scoring": ("apply", "score"),
    "settings": ("Reading", "Settings"),
}


def __getattr__(name: str) -> Any:
    # On first use: the commands import `settings` from here for their help, and torch takes seconds.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
