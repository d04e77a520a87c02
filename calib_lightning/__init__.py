"""Accurate, calibrated and refined deep classifiers with PyTorch Lightning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib_lightning.comparison import compare
    from calib_lightning.core import ClassificationModule, load_module
    from calib_lightning.deploy import CalibratedClassifier, load_classifier, save_classifier
    from calib_lightning.metrics import EvaluationState
    from calib_lightning.posthoc import Temperature, load_calibrator, save_calibrator
    from calib_lightning.predictions import Predictions, apply_calibrator, calibrate, read_predictions, score

    __version__: str

__all__ = [
    "CalibratedClassifier",
    "ClassificationModule",
    "EvaluationState",
    "Predictions",
    "Temperature",
    "__version__",
    "apply_calibrator",
    "calibrate",
    "compare",
    "load_calibrator",
    "load_classifier",
    "load_module",
    "read_predictions",
    "save_calibrator",
    "save_classifier",
    "score",
]

_HOMES = {
    "comparison": ("compare",),
    "core": ("ClassificationModule", "load_module"),
    "deploy": ("CalibratedClassifier", "load_classifier", "save_classifier"),
    "metrics": ("EvaluationState",),
    "posthoc": ("Temperature", "load_calibrator", "save_calibrator"),
    "predictions": ("Predictions", "apply_calibrator", "calibrate", "read_predictions", "score"),
}


def __getattr__(name: str) -> Any:
    # On first use: `import calib_lightning` must not cost the seconds of torch and a trainer.
    if name == "__version__":
        from importlib.metadata import version

        return version("calib-lightning")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
