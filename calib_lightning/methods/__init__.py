"""Training-time methods: one file each, from the equation to the LightningModule."""

from calib_lightning.methods.brier import Brier, BrierLoss, brier_loss
from calib_lightning.methods.cross_entropy import CrossEntropy, CrossEntropyLoss, cross_entropy_loss
from calib_lightning.methods.entropy_regularization import (
    EntropyRegularization,
    EntropyRegularizationLoss,
    entropy_regularization_loss,
)
from calib_lightning.methods.focal import Focal, FocalLoss, focal_loss
from calib_lightning.methods.label_smoothing import LabelSmoothing, LabelSmoothingLoss, label_smoothing_loss

__all__ = [
    "Brier",
    "BrierLoss",
    "CrossEntropy",
    "CrossEntropyLoss",
    "EntropyRegularization",
    "EntropyRegularizationLoss",
    "Focal",
    "FocalLoss",
    "LabelSmoothing",
    "LabelSmoothingLoss",
    "brier_loss",
    "cross_entropy_loss",
    "entropy_regularization_loss",
    "focal_loss",
    "label_smoothing_loss",
]
