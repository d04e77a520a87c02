"""Every metric: its key, its class, its function, and its golden value."""

from functools import partial

from calib_lightning import metrics
from calib_lightning.metrics import functional as F

ACCURACY, MEAN_CONFIDENCE, GAP, AUROC, ECE = 0.764, 0.724993217869, -0.039006782131, 0.755213417340, 0.054325825305
BETA = 2 * AUROC * ACCURACY * (1 - ACCURACY)
GAMMA = (ACCURACY**2 + (1 - ACCURACY) ** 2) / 2


def term(function, name):
    return lambda *args, **options: getattr(function(*args, **options), name)


# key: (class, function, golden value, its precision)
METRICS = {
    "accuracy": (metrics.Accuracy, F.accuracy, ACCURACY, 1e-12),
    "top5_accuracy": (metrics.TopKAccuracy, F.top_k_accuracy, 1.0, 0),
    "nll": (metrics.NegativeLogLikelihood, F.nll, 0.670436471058, 1e-12),
    "brier": (metrics.BrierScore, F.brier, 0.352934082499, 1e-12),
    "entropy": (metrics.Entropy, F.entropy, 0.696983987644, 1e-12),
    "ece": (metrics.ExpectedCalibrationError, F.ece, ECE, 1e-12),
    "signed_gap": (metrics.SignedGap, F.signed_gap, GAP, 1e-12),
    "correctness_auroc": (metrics.CorrectnessAUROC, F.correctness_auroc, AUROC, 1e-12),
    "over_ece": (metrics.OverCalibrationError, F.over_ece, (ECE + GAP) / 2, 1e-11),
    "under_ece": (metrics.UnderCalibrationError, F.under_ece, (ECE - GAP) / 2, 1e-11),
    "mce": (metrics.MaximumCalibrationError, F.mce, 0.224808729360, 1e-12),
    "rmsce": (metrics.RootMeanSquaredCalibrationError, F.rmsce, 0.083423867, 1e-9),
    "overconfidence_error": (metrics.OverconfidenceError, F.overconfidence_error, 0.005615080083, 1e-12),
    "classwise_ece": (metrics.ClasswiseCalibrationError, F.classwise_ece, 0.038428928373, 1e-12),
    "aece_split": (metrics.AdaptiveCalibrationError, F.aece_split, 0.053568794839, 1e-12),
    "aece_official": (
        partial(metrics.AdaptiveCalibrationError, convention="official"),
        F.aece_official,
        0.052463887788,
        1e-12,
    ),
    "ks": (metrics.KolmogorovSmirnovError, F.ks, 0.048559045042, 1e-12),
    "debiased_l2": (metrics.DebiasedL2Error, F.debiased_l2, 0.049396426285, 1e-12),
    "smece": (metrics.SmoothCalibrationError, F.smece, 0.052749, 1e-4),
    "aupr_success": (metrics.AUPRSuccess, F.aupr_success, 0.900983402140, 1e-12),
    "aupr_error": (metrics.AUPRError, F.aupr_error, 0.513351413361, 1e-12),
    "fpr95": (metrics.FPR95, F.fpr95, 0.796610169492, 1e-12),
    "aurc": (metrics.AURC, F.aurc, 0.111777532010, 1e-12),
    "e_aurc": (metrics.ExcessAURC, F.e_aurc, 0.081436774229, 1e-12),
    "augrc": (metrics.AUGRC, F.augrc, 0.07222, 1e-12),
    "coverage_at_risk_0.05": (metrics.CoverageAtRisk, F.coverage_at_risk, None, 0),
    "risk_at_coverage_0.8": (metrics.RiskAtCoverage, F.risk_at_coverage, None, 0),
    "risk_at_coverage_0.9": (
        partial(metrics.RiskAtCoverage, coverage=0.9),
        partial(F.risk_at_coverage, coverage=0.9),
        None,
        0,
    ),
    "ovo_auroc": (metrics.OvOAUROC, F.ovo_auroc, 0.942120004884, 1e-12),
    "dark_side_assumption": (metrics.DarkSideAssumption, F.dark_side_assumption, None, 0),
}
# key: (class, function, golden value, its precision); the class gives all terms at once
TERMS = {
    "murphy_reliability": (metrics.MurphyDecomposition, term(F.murphy_decomposition, "reliability"), 0.0069595, 1e-7),
    "murphy_resolution": (metrics.MurphyDecomposition, term(F.murphy_decomposition, "resolution"), 0.0326998, 1e-7),
    "murphy_uncertainty": (metrics.MurphyDecomposition, term(F.murphy_decomposition, "uncertainty"), 0.180304, 1e-7),
    "corp_miscalibration": (metrics.CORPDecomposition, term(F.corp_decomposition, "miscalibration"), 0.0099709, 1e-7),
    "corp_discrimination": (metrics.CORPDecomposition, term(F.corp_decomposition, "discrimination"), 0.0349153, 1e-7),
    "corp_uncertainty": (metrics.CORPDecomposition, term(F.corp_decomposition, "uncertainty"), 0.180304, 1e-7),
    "dark_side_alpha": (metrics.DarkSideTerms, term(F.dark_side_terms, "alpha"), MEAN_CONFIDENCE, 1e-11),
    "dark_side_beta": (metrics.DarkSideTerms, term(F.dark_side_terms, "beta"), BETA, 1e-11),
    "dark_side_gamma": (metrics.DarkSideTerms, term(F.dark_side_terms, "gamma"), GAMMA, 1e-11),
    "dark_side_residual": (
        metrics.DarkSideTerms,
        term(F.dark_side_terms, "residual"),
        ECE - (MEAN_CONFIDENCE - BETA - GAMMA),
        1e-11,
    ),
    "calibration_nll": (metrics.VariationalSplit, term(F.variational_split, "calibration"), None, 0),
    "refinement_nll": (metrics.VariationalSplit, term(F.variational_split, "refinement"), None, 0),
}
ALL = METRICS | TERMS
OOD = {
    "ood_auroc": metrics.OODAUROC,
    "ood_aupr": metrics.OODAUPR,
    "ood_aupr_out": metrics.OODAUPROut,
    "ood_fpr95": metrics.OODFPR95,
}

TAKES_NO_CONFIDENCE = {
    *("accuracy", "top5_accuracy", "nll", "brier", "entropy", "classwise_ece", "ovo_auroc"),
    *("calibration_nll", "refinement_nll"),
}
TAKES_NO_LABELS = {"entropy"}

# What metrics do on degenerate sets; a metric that is nan or 0 there has its key here.
ONE_SIDED = {"correctness_auroc", "fpr95", "dark_side_beta", "dark_side_residual"}
"""nan unless there are correct and wrong rows."""
ONE_LABEL = {"ovo_auroc"}
"""nan if all rows have the same label."""
NO_SPREAD = {"murphy_resolution", "murphy_uncertainty", "corp_discrimination", "corp_uncertainty"}
"""0 if all rows are correct, or all wrong."""
NO_ERRORS = {
    *("over_ece", "overconfidence_error", "aurc", "e_aurc", "augrc", "risk_at_coverage_0.8", "risk_at_coverage_0.9"),
    "dark_side_assumption",
}
"""0 if all rows are correct."""
NEVER_RIGHT = {"accuracy", "under_ece", "e_aurc"}
"""0 if all rows are wrong."""
ONE_ROW = {"aece_official", "debiased_l2"}
"""0 on a single row, or with a single confidence: the first has no bins then, the second is all noise."""
ALL_ZERO = {
    *("nll", "brier", "entropy", "ece", "signed_gap", "under_ece", "mce", "rmsce", "classwise_ece", "aece_split", "ks"),
    *("smece", "murphy_reliability", "corp_miscalibration"),
}
"""0 with a single class."""

SINGLE = [row[0] for row in METRICS.values()] + list(dict.fromkeys(row[0] for row in TERMS.values()))
"""Makers of every class of `update(logits, labels)`."""


def name_of(maker):
    return type(maker()).__name__


def value_of(key, logits, labels, confidence=None, **options):
    """The function's value."""
    if key not in TAKES_NO_CONFIDENCE and confidence is not None:
        options["confidence"] = confidence
    given = (logits,) if key in TAKES_NO_LABELS else (logits, labels)
    return ALL[key][1](*given, **options)
