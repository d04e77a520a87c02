"""Metrics as pure functions, under the names that logs and tables use."""

from calib_lightning.metrics.functional.calibration import bin_sums, ece, ece_from_bins, signed_gap
from calib_lightning.metrics.functional.proper import accuracy, brier, nll
from calib_lightning.metrics.functional.refinement import auroc, correctness_auroc

__all__ = [
    "accuracy",
    "auroc",
    "bin_sums",
    "brier",
    "correctness_auroc",
    "ece",
    "ece_from_bins",
    "nll",
    "signed_gap",
]
