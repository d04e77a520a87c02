"""Metrics of accuracy, calibration and ranking: `EvaluationState` for all in one pass, and a class for each."""

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
    DarkSideAssumption,
    DarkSideTerms,
    MurphyDecomposition,
    VariationalSplit,
)
from calib_lightning.metrics.groups import GroupTable, by_class, by_frequency
from calib_lightning.metrics.kernel import SquaredKernelCalibrationError
from calib_lightning.metrics.ood import OODAUPR, OODAUROC, OODFPR95
from calib_lightning.metrics.proper import Accuracy, BrierScore, Entropy, NegativeLogLikelihood, TopKAccuracy
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
from calib_lightning.metrics.resampling import Difference, Interval, bootstrap_intervals, permutation_test
from calib_lightning.metrics.soft import SoftLabelScores
from calib_lightning.metrics.spread import Spread, over_seeds
from calib_lightning.metrics.state import EvaluationState
from calib_lightning.metrics.table import CORE, FULL, METRICS, REPORT, SOFT, MetricRow

__all__ = [
    "AUGRC",
    "AURC",
    "CORE",
    "FPR95",
    "FULL",
    "METRICS",
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
    "DarkSideAssumption",
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
    "MetricRow",
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
    "SquaredKernelCalibrationError",
    "TopKAccuracy",
    "UnderCalibrationError",
    "VariationalSplit",
    "bootstrap_intervals",
    "by_class",
    "by_frequency",
    "over_seeds",
    "permutation_test",
]
