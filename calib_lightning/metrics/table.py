"""The table of metrics: one row says everything about a metric, from its value to its title in a report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional import adaptive, calibration, refinement, selective, smooth
from calib_lightning.metrics.functional.classwise import classwise_ece_from_sums
from calib_lightning.metrics.functional.dark_side import assumption_from_bins
from calib_lightning.metrics.functional.ordered import Ordered
from calib_lightning.metrics.view import View

Direction = Literal["higher", "lower", "zero", "none"]
"""Which values are better; ``"zero"`` means nearest to zero, ``"none"`` that the metric only describes."""

IntervalKind = Literal["percentile", "basic", "hull"]
"""How a bootstrap interval corrects the bias of resampling, see `resampling.bootstrap_intervals`."""


class MetricRow(NamedTuple):
    """One metric.

    Attributes:
        title: Its name in reports; a ``%`` in it means that reports show the value, a fraction, in percent.
        better: Which values are better.
        parts: The parts of the state that it reads, besides the count, which is always there.
        value: Reads the value from a view, ``(...)`` float64; nan where it is undefined.
        interval: Kind of its bootstrap interval.
        low: The smallest possible value.
        high: The largest possible value.
        binned: Whether it depends on the number of bins.
        section: Its section in reports; the table fills it in.
    """

    title: str
    better: Direction
    parts: tuple[str, ...]
    value: Callable[[View], Tensor]
    interval: IntervalKind = "percentile"
    low: float = 0.0
    high: float = 1.0
    binned: bool = False
    section: str = ""

    @property
    def percent(self) -> bool:
        """Whether reports show the value in percent."""
        return "%" in self.title


def mean_of(title: str, part: str, better: Direction, high: float = 1.0) -> MetricRow:
    """A metric that is the mean of one value per row."""
    return MetricRow(title, better, (part,), lambda view: view.mean(part), high=high)


def top_k_of(k: int) -> MetricRow:
    """`functional.top_k_accuracy` for one k."""
    return mean_of(f"top-{k} accuracy %", f"top{k}", "higher")


def from_bins(title: str, function: Callable[[Tensor], Tensor]) -> MetricRow:
    """A calibration error over equal-width bins ``(..., M, 3)``."""
    return MetricRow(title, "lower", ("bins",), lambda view: function(view.bins), "hull", binned=True)


def equal_mass(title: str, function: Callable[[Ordered, int], Tensor]) -> MetricRow:
    """A calibration error over bins of equally many rows."""
    return MetricRow(title, "lower", ("ranks",), lambda view: function(view.ordered, view.n_bins), "hull", binned=True)


def from_ordered(
    title: str, function: Callable[[Ordered], Tensor], better: Direction, interval: IntervalKind = "percentile"
) -> MetricRow:
    """A metric of the rows in order of confidence."""
    return MetricRow(title, better, ("ranks",), lambda view: function(view.ordered), interval)


def coverage_at_risk_of(risk: float) -> MetricRow:
    """`functional.coverage_at_risk` at one risk."""
    function = partial(selective.coverage_at_risk_from_ordered, risk=risk)
    return from_ordered(f"coverage at {100 * risk:g} % risk %", function, "higher")


def risk_at_coverage_of(coverage: float) -> MetricRow:
    """`functional.risk_at_coverage` at one coverage."""
    function = partial(selective.risk_at_coverage_from_ordered, coverage=coverage)
    return from_ordered(f"risk at {100 * coverage:g} % coverage %", function, "lower")


def excess_aurc_of(exact: bool) -> MetricRow:
    """`functional.e_aurc` with one of its two optima."""
    return from_ordered("E-AURC %", partial(selective.e_aurc_from_ordered, exact=exact), "lower")._replace(low=-1.0)


def _signed_gap(view: View) -> Tensor:
    return view.mean("confidence") - view.mean("correct")


def _classwise_ece(view: View) -> Tensor:
    return classwise_ece_from_sums(view.classwise, view.count)


def _rows(sections: dict[str, dict[str, MetricRow]]) -> dict[str, MetricRow]:
    """All rows, each with the name of its section."""
    return {key: row._replace(section=section) for section, rows in sections.items() for key, row in rows.items()}


_MURPHY = ("bins", "moments")
_DARK_SIDE = ("correct", "confidence", "ranks", "bins")

_SECTIONS: dict[str, dict[str, MetricRow]] = {
    "accuracy and proper scores": {
        "accuracy": mean_of("accuracy %", "correct", "higher"),
        "top5_accuracy": top_k_of(5),
        "nll": mean_of("NLL", "nll", "lower", high=torch.inf),
        "brier": mean_of("Brier", "brier", "lower", high=2.0),
        "entropy": mean_of("entropy", "entropy", "none", high=torch.inf),
    },
    "calibration": {
        "ece": from_bins("ECE %", calibration.ece_from_bins),
        "signed_gap": MetricRow("signed gap %", "zero", ("correct", "confidence"), _signed_gap, low=-1.0),
        "over_ece": from_bins("over-confident part of ECE %", calibration.over_ece_from_bins),
        "under_ece": from_bins("under-confident part of ECE %", calibration.under_ece_from_bins),
        "mce": from_bins("MCE %", calibration.mce_from_bins),
        "rmsce": from_bins("RMSCE %", calibration.rmsce_from_bins),
        "overconfidence_error": from_bins("overconfidence error %", calibration.overconfidence_error_from_bins),
        "classwise_ece": MetricRow("class-wise ECE %", "lower", ("classwise",), _classwise_ece, "hull", binned=True),
        "aece_split": equal_mass("equal-mass ECE % (even split)", adaptive.aece_split_from_ordered),
        "aece_official": equal_mass("equal-mass ECE % (quantile edges)", adaptive.aece_official_from_ordered),
        "ks": from_ordered("KS error %", adaptive.ks_from_ordered, "lower", "hull"),
        "debiased_l2": equal_mass("debiased L2 error %", adaptive.debiased_l2_from_ordered),
        "smece": from_ordered("smooth ECE %", smooth.smece_from_ordered, "lower", "hull"),
    },
    "ranking of right over wrong answers": {
        "correctness_auroc": MetricRow("correctness AUROC %", "higher", ("ranks",), lambda view: view.auroc),
        "aupr_success": from_ordered("AUPR success %", refinement.average_precision_from_ordered, "higher"),
        "aupr_error": from_ordered("AUPR error %", refinement.aupr_error_from_ordered, "higher"),
        "fpr95": from_ordered("FPR at 95 % TPR %", refinement.fpr_at_tpr_from_ordered, "lower"),
        "aurc": from_ordered("AURC %", selective.aurc_from_ordered, "lower"),
        "e_aurc": excess_aurc_of(exact=False),
        "augrc": from_ordered("AUGRC %", selective.augrc_from_ordered, "lower"),
        "coverage_at_risk_0.05": coverage_at_risk_of(0.05),
        "risk_at_coverage_0.8": risk_at_coverage_of(0.8),
        "risk_at_coverage_0.9": risk_at_coverage_of(0.9),
        "ovo_auroc": MetricRow("one-vs-one AUROC %", "higher", ("scores",), lambda view: view.ovo_auroc),
    },
    "decompositions": {
        "calibration_nll": MetricRow(
            "calibration part of NLL",
            "lower",
            ("scores",),
            lambda view: view.variational.calibration,
            "hull",
            high=torch.inf,
        ),
        "refinement_nll": MetricRow(
            "refinement part of NLL", "lower", ("scores",), lambda view: view.variational.refinement, high=torch.inf
        ),
        "murphy_reliability": MetricRow(
            "Murphy reliability", "lower", _MURPHY, lambda view: view.murphy.reliability, "basic", binned=True
        ),
        "murphy_resolution": MetricRow(
            "Murphy resolution", "higher", _MURPHY, lambda view: view.murphy.resolution, "basic", binned=True
        ),
        "murphy_uncertainty": MetricRow("Murphy uncertainty", "none", _MURPHY, lambda view: view.murphy.uncertainty),
        "corp_miscalibration": MetricRow(
            "CORP miscalibration", "lower", ("ranks",), lambda view: view.corp.miscalibration, "basic"
        ),
        "corp_discrimination": MetricRow(
            "CORP discrimination", "higher", ("ranks",), lambda view: view.corp.discrimination, "basic"
        ),
        "corp_uncertainty": MetricRow("CORP uncertainty", "none", ("ranks",), lambda view: view.corp.uncertainty),
        "dark_side_alpha": MetricRow(
            "dark side alpha", "none", _DARK_SIDE, lambda view: view.dark_side.alpha, low=-1.0
        ),
        "dark_side_beta": MetricRow("dark side beta", "none", _DARK_SIDE, lambda view: view.dark_side.beta, low=-1.0),
        "dark_side_gamma": MetricRow(
            "dark side gamma", "none", _DARK_SIDE, lambda view: view.dark_side.gamma, low=-1.0
        ),
        "dark_side_residual": MetricRow(
            "dark side residual",
            "none",
            _DARK_SIDE,
            lambda view: view.dark_side.residual,
            "hull",
            low=-1.0,
            binned=True,
        ),
        "dark_side_assumption": MetricRow(
            "dark side assumption %", "none", ("fine_bins",), lambda view: assumption_from_bins(view.fine_bins)
        ),
    },
}

METRICS = _rows(_SECTIONS)
"""Every metric by the key that logs and reports use, in the order of a report."""

SOFT = _rows(
    {
        "distributions of labels": {
            "soft_nll": mean_of("soft NLL", "nll", "lower", high=torch.inf),
            "soft_brier": mean_of("soft Brier", "brier", "lower", high=2.0),
            "label_entropy": mean_of("label entropy", "label_entropy", "none", high=torch.inf),
        }
    }
)
"""The metrics of `SoftLabelScores`, which compare with distributions of labels."""

OOD = _rows(
    {
        "images of other classes": {
            "ood_auroc": MetricRow("OOD AUROC %", "higher", ("ranks",), lambda view: view.auroc),
            "ood_aupr": from_ordered("OOD AUPR in %", refinement.average_precision_from_ordered, "higher"),
            "ood_aupr_out": from_ordered("OOD AUPR out %", refinement.aupr_error_from_ordered, "higher"),
            "ood_fpr95": from_ordered("OOD FPR95 %", refinement.fpr_at_tpr_from_ordered, "lower"),
        }
    }
)
"""The metrics of `OODDetection`, which compare the confidences of a set with those of images of other classes."""

CORE = ("accuracy", "nll", "brier", "ece", "signed_gap", "correctness_auroc")
"""What a run logs while it trains, and the columns of result tables."""

REPORT = tuple(key for key, row in METRICS.items() if "scores" not in row.parts)
"""Everything that works without the scores of all classes; `trainer.test` logs it, and up to 200 classes also
`ovo_auroc`."""

FULL = tuple(METRICS)
"""Everything."""
