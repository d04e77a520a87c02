"""Metrics of accuracy, calibration and refinement: `EvaluationState` for all in one pass, and one class for each."""

from calib_lightning.metrics.calibration import (
    AdaptiveCalibrationError,
    ClasswiseCalibrationError,
    DebiasedL2Error,
    ExpectedCalibrationError,
    KolmogorovSmirnovError,
    MaximumCalibrationError,
    OverCalibrationError,
    OverconfidenceError,
    RootMeanSquaredCalibrationError,
    SignedGap,
    SmoothCalibrationError,
    UnderCalibrationError,
)
from calib_lightning.metrics.decomposition import (
    CORPDecomposition,
    DarkSideTerms,
    MurphyDecomposition,
    VariationalSplit,
)
from calib_lightning.metrics.ood import OODAUPR, OODAUROC, OODFPR95
from calib_lightning.metrics.proper import Accuracy, BrierScore, Entropy, NegativeLogLikelihood, TopKAccuracy
from calib_lightning.metrics.read_outs import CORE, FULL, READ_OUTS, REPORT, Direction
from calib_lightning.metrics.refinement import (
    AUGRC,
    AURC,
    FPR95,
    AUPRError,
    AUPRSuccess,
    CorrectnessAUROC,
    CoverageAtRisk,
    ExcessAURC,
    OvOAUROC,
    RiskAtCoverage,
)
from calib_lightning.metrics.resampling import (
    Difference,
    GroupTable,
    Interval,
    bootstrap_intervals,
    by_class,
    by_frequency,
    permutation_test,
)
from calib_lightning.metrics.soft import SOFT, SoftLabelScores
from calib_lightning.metrics.spread import Spread, over_seeds
from calib_lightning.metrics.state import EvaluationState

DIRECTION: dict[str, Direction] = {key: read_out.better for key, read_out in READ_OUTS.items()} | SOFT
"""For every metric key whether ``"higher"`` or ``"lower"`` is better, what is nearest to ``"zero"``, or ``"none"``."""

__all__ = [
    "AUGRC",
    "AURC",
    "CORE",
    "DIRECTION",
    "FPR95",
    "FULL",
    "OODAUPR",
    "OODAUROC",
    "OODFPR95",
    "REPORT",
    "SOFT",
    "AUPRError",
    "AUPRSuccess",
    "Accuracy",
    "AdaptiveCalibrationError",
    "BrierScore",
    "CORPDecomposition",
    "ClasswiseCalibrationError",
    "CorrectnessAUROC",
    "CoverageAtRisk",
    "DarkSideTerms",
    "DebiasedL2Error",
    "Difference",
    "Entropy",
    "EvaluationState",
    "ExcessAURC",
    "ExpectedCalibrationError",
    "GroupTable",
    "Interval",
    "KolmogorovSmirnovError",
    "MaximumCalibrationError",
    "MurphyDecomposition",
    "NegativeLogLikelihood",
    "OvOAUROC",
    "OverCalibrationError",
    "OverconfidenceError",
    "RiskAtCoverage",
    "RootMeanSquaredCalibrationError",
    "SignedGap",
    "SmoothCalibrationError",
    "SoftLabelScores",
    "Spread",
    "TopKAccuracy",
    "UnderCalibrationError",
    "VariationalSplit",
    "bootstrap_intervals",
    "by_class",
    "by_frequency",
    "over_seeds",
    "permutation_test",
]
