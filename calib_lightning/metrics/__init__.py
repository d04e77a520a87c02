"""Metrics of accuracy, calibration and refinement: `EvaluationState` for all in one pass, and one class for each."""

from calib_lightning.metrics.calibration import ExpectedCalibrationError, SignedGap
from calib_lightning.metrics.proper import Accuracy, BrierScore, NegativeLogLikelihood
from calib_lightning.metrics.refinement import CorrectnessAUROC
from calib_lightning.metrics.state import READ_OUTS, Direction, EvaluationState

DIRECTION: dict[str, Direction] = {key: read_out.better for key, read_out in READ_OUTS.items()}
"""For every metric key whether ``"higher"`` or ``"lower"`` is better, or what is nearest to ``"zero"``."""

__all__ = [
    "DIRECTION",
    "Accuracy",
    "BrierScore",
    "CorrectnessAUROC",
    "EvaluationState",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "SignedGap",
]
