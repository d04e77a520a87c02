"""Metrics as pure functions, under the names that logs and tables use."""

from calib_lightning.metrics.functional.adaptive import aece_official, aece_split, debiased_l2, ks
from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.calibration import (
    ece,
    ece_from_bins,
    mce,
    over_ece,
    overconfidence_error,
    rmsce,
    signed_gap,
    under_ece,
)
from calib_lightning.metrics.functional.classwise import classwise_ece
from calib_lightning.metrics.functional.dark_side import dark_side_assumption, dark_side_terms
from calib_lightning.metrics.functional.decomposition import corp_decomposition, murphy_decomposition
from calib_lightning.metrics.functional.kernel import kernel_calibration_test, skce
from calib_lightning.metrics.functional.ood import max_prob_log_odds, ood_aupr, ood_aupr_out, ood_auroc, ood_fpr95
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.ovo import ovo_auroc
from calib_lightning.metrics.functional.proper import accuracy, brier, entropy, nll, top_k_accuracy
from calib_lightning.metrics.functional.refinement import aupr_error, aupr_success, auroc, correctness_auroc, fpr95
from calib_lightning.metrics.functional.selective import augrc, aurc, coverage_at_risk, e_aurc, risk_at_coverage
from calib_lightning.metrics.functional.smooth import smece
from calib_lightning.metrics.functional.soft import label_entropy, soft_brier, soft_nll
from calib_lightning.metrics.functional.temperature import optimal_inverse_temperature
from calib_lightning.metrics.functional.variational import variational_split

__all__ = [
    "Ordered",
    "accuracy",
    "aece_official",
    "aece_split",
    "augrc",
    "aupr_error",
    "aupr_success",
    "aurc",
    "auroc",
    "bin_sums",
    "brier",
    "classwise_ece",
    "corp_decomposition",
    "correctness_auroc",
    "coverage_at_risk",
    "dark_side_assumption",
    "dark_side_terms",
    "debiased_l2",
    "e_aurc",
    "ece",
    "ece_from_bins",
    "entropy",
    "fpr95",
    "kernel_calibration_test",
    "ks",
    "label_entropy",
    "max_prob_log_odds",
    "mce",
    "murphy_decomposition",
    "nll",
    "ood_aupr",
    "ood_aupr_out",
    "ood_auroc",
    "ood_fpr95",
    "optimal_inverse_temperature",
    "order_rows",
    "over_ece",
    "overconfidence_error",
    "ovo_auroc",
    "risk_at_coverage",
    "rmsce",
    "signed_gap",
    "skce",
    "smece",
    "soft_brier",
    "soft_nll",
    "top_k_accuracy",
    "under_ece",
    "variational_split",
]
