"""A network and its calibrator as one classifier to keep, export and use: label, confidence, abstain."""

from calib_lightning.deploy.classifier import CalibratedClassifier, Metadata
from calib_lightning.deploy.decision import Decision, OperatingPoint, decide, operating_point
from calib_lightning.deploy.export import ExportedClassifier, ParityError, export_onnx, export_torch, load_exported
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
    "decide",
    "export_onnx",
    "export_torch",
    "load_classifier",
    "load_exported",
    "operating_point",
    "save_classifier",
]
