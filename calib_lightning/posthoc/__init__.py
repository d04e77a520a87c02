"""Calibrators: maps from logits to calibrated log-probabilities, fitted on held-out rows."""

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.bbq import BBQ
from calib_lightning.posthoc.beta import Beta
from calib_lightning.posthoc.binary import BinaryCalibrator
from calib_lightning.posthoc.clamping_descent import (
    ClampDescent,
    FixedWeight,
    PenaltyWeight,
    RelativeWeight,
    TermWeight,
)
from calib_lightning.posthoc.clamping_optimum import ClampOptimum
from calib_lightning.posthoc.clamping_report import ClampReport
from calib_lightning.posthoc.clamping_start import ClampStart, DataDrivenStart, RandomStart
from calib_lightning.posthoc.density_ratio import DensityRatio
from calib_lightning.posthoc.dirichlet import Dirichlet
from calib_lightning.posthoc.ece_grid import ECETemperature
from calib_lightning.posthoc.ensemble_temperature import EnsembleTemperature
from calib_lightning.posthoc.evidence import Evidence, as_logits
from calib_lightning.posthoc.fit_report import FitReport, Optimum
from calib_lightning.posthoc.histogram_binning import HistogramBinning
from calib_lightning.posthoc.irm import IRM
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.matrix import MatrixScaling, MatrixScalingODIR
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.posthoc.platt import Platt
from calib_lightning.posthoc.saving import (
    calibrator_of,
    calibrator_record,
    load_calibrator,
    save_calibrator,
)
from calib_lightning.posthoc.scaling_binning import ScalingBinning
from calib_lightning.posthoc.sequential import Sequential
from calib_lightning.posthoc.solver import AdamDescent, GradientDescent, PlainLBFGS, Solver
from calib_lightning.posthoc.spline import Spline
from calib_lightning.posthoc.structured import StructuredMatrixScaling, StructuredVectorScaling
from calib_lightning.posthoc.temperature import FixedTemperature, FocalTemperature, Temperature
from calib_lightning.posthoc.trust_score import TrustScore
from calib_lightning.posthoc.vector import VectorScaling
from calib_lightning.posthoc.wrappers import OneVsRest, TopLabel
from calib_lightning.utils.described import build, parse

__all__ = [
    "BBQ",
    "IRM",
    "AdamDescent",
    "Beta",
    "BinaryCalibrator",
    "Calibrator",
    "ClampDescent",
    "ClampOptimum",
    "ClampReport",
    "ClampStart",
    "DataDrivenStart",
    "DensityRatio",
    "Dirichlet",
    "ECETemperature",
    "EnsembleTemperature",
    "Evidence",
    "FitReport",
    "FixedTemperature",
    "FixedWeight",
    "FocalTemperature",
    "GradientDescent",
    "HistogramBinning",
    "Isotonic",
    "MatrixScaling",
    "MatrixScalingODIR",
    "NeuralClamping",
    "OneVsRest",
    "Optimum",
    "PenaltyWeight",
    "PlainLBFGS",
    "Platt",
    "RandomStart",
    "RelativeWeight",
    "ScalingBinning",
    "Sequential",
    "Solver",
    "Spline",
    "StructuredMatrixScaling",
    "StructuredVectorScaling",
    "Temperature",
    "TermWeight",
    "TopLabel",
    "TrustScore",
    "VectorScaling",
    "as_logits",
    "build",
    "calibrator_of",
    "calibrator_record",
    "load_calibrator",
    "parse",
    "save_calibrator",
]
