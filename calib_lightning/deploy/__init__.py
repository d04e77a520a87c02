"""Deploy a network and its calibrator as one classifier: label, confidence, and whether to abstain."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib_lightning.deploy.classifier import CalibratedClassifier
    from calib_lightning.deploy.decision import Decision, OperatingPoint, decide, operating_point
    from calib_lightning.deploy.export import ParityError, export_onnx, export_torch
    from calib_lightning.deploy.exported import ExportedClassifier, load_exported
    from calib_lightning.deploy.metadata import Metadata
    from calib_lightning.deploy.of_run import classifier_of_run
    from calib_lightning.deploy.preprocessing import Preprocessing
    from calib_lightning.deploy.saving import load_classifier, save_classifier

__all__ = [
    "CalibratedClassifier",
    "Decision",
    "ExportedClassifier",
    "Metadata",
    "OperatingPoint",
    "ParityError",
    "Preprocessing",
    "classifier_of_run",
    "decide",
    "export_onnx",
    "export_torch",
    "load_classifier",
    "load_exported",
    "operating_point",
    "save_classifier",
]

_MODULES = ("classifier", "decision", "export", "exported", "metadata", "of_run", "preprocessing", "saving")


def __getattr__(name: str) -> Any:
    # On first use: `calib classify --help` imports this package too, and torch takes seconds.
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
