"""Every metric as a function of what is known about a set, and which parts of the state it needs for that.

A `View` is what a metric reads: means, binned sums, ordered groups. The same functions read a whole set, and many
resamples or subsets of it at once, which are views with leading dimensions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional import adaptive, calibration, refinement, selective, smooth
from calib_lightning.metrics.functional.classwise import classwise_ece_from_sums
from calib_lightning.metrics.functional.dark_side import DarkSideTerms, dark_side_from
from calib_lightning.metrics.functional.decomposition import (
    CORPDecomposition,
    MurphyDecomposition,
    corp_from_ordered,
    murphy_from_bins,
)
from calib_lightning.metrics.functional.ordered import Ordered
from calib_lightning.metrics.functional.variational import VariationalSplit

Direction = Literal["higher", "lower", "zero", "none"]
"""Which values of a metric are better; ``"zero"`` means nearest to zero, ``"none"`` that it only describes."""


IntervalKind = Literal["percentile", "basic", "hull"]
"""How the bias of a metric under resampling is dealt with."""


class View(ABC):
    """What metrics are read from; every tensor may have leading dimensions ``(...)``, one entry for each subset.

    Attributes:
        n_bins: Number of bins M.
        count: Number of rows ``(...)``, float64.
        bins: Equal-width bins ``(..., M, 3)``: count, sum of confidences, sum of hits.
        moments: Equal-width bins ``(..., M, 2)``: sums of squared confidences and of confidence times hit.
        classwise: Equal-width bins of every class ``(..., 2, K, M)``: sums of probabilities and of hits.
        ordered: Groups of equal confidence, ascending.
        ovo_auroc: One-versus-one AUROC ``(...)``; it needs the scores of all classes.
        variational: Negative log-likelihood split in calibration and refinement; it needs the scores of all classes.
    """

    n_bins: int
    count: Tensor
    bins: Tensor
    moments: Tensor
    classwise: Tensor
    ordered: Ordered
    ovo_auroc: Tensor
    variational: VariationalSplit

    @abstractmethod
    def mean(self, name: str) -> Tensor:
        """Read the mean of one of the quantities that have one value a row.

        Args:
            name: Name of its part.

        Returns:
            ``(...)`` float64; nan without rows.
        """

    @cached_property
    def auroc(self) -> Tensor:
        """Area under the ROC curve of "the prediction is correct"."""
        return refinement.auroc_from_ordered(self.ordered)

    @cached_property
    def murphy(self) -> MurphyDecomposition:
        """Terms of the binned Brier score."""
        return murphy_from_bins(self.bins, self.moments)

    @cached_property
    def corp(self) -> CORPDecomposition:
        """Terms of the Brier score by isotonic regression."""
        return corp_from_ordered(self.ordered)

    @cached_property
    def dark_side(self) -> DarkSideTerms:
        """Terms of eq. 9."""
        ece = calibration.ece_from_bins(self.bins)
        return dark_side_from(self.mean("confidence"), self.mean("correct"), self.auroc, ece)


class ReadOut(NamedTuple):
    """A metric: a function of a view.

    Attributes:
        parts: Names of the parts of the state that it reads, besides the count, which is always there.
        value: Maps a view to ``(...)`` float64; nan where the metric is undefined.
        better: Which values are better.
        interval: How a bootstrap interval is made, see `resampling.bootstrap_intervals`.
        low: The smallest possible value.
        high: The largest possible value.
    """

    parts: tuple[str, ...]
    value: Callable[[View], Tensor]
    better: Direction
    interval: IntervalKind = "percentile"
    low: float = 0.0
    high: float = 1.0


def mean_of(name: str, better: Direction, high: float = 1.0) -> ReadOut:
    """Make a metric that is the mean of one value a row.

    Args:
        name: Name of the part that holds the values.
        better: Which values are better.
        high: The largest possible value.

    Returns:
        The read-out.
    """
    return ReadOut((name,), lambda view: view.mean(name), better, high=high)


def from_bins(function: Callable[[Tensor], Tensor], better: Direction = "lower") -> ReadOut:
    """Make a metric of the equal-width bins.

    Args:
        function: Maps ``(..., M, 3)`` to ``(...)``.
        better: Which values are better.

    Returns:
        The read-out.
    """
    return ReadOut(("bins",), lambda view: function(view.bins), better, interval="hull")


def from_ordered(
    function: Callable[[Ordered], Tensor], better: Direction, interval: IntervalKind = "percentile"
) -> ReadOut:
    """Make a metric of the ordered rows.

    Args:
        function: Maps `Ordered` to ``(...)``.
        better: Which values are better.
        interval: As in `ReadOut`.

    Returns:
        The read-out.
    """
    return ReadOut(("ranks",), lambda view: function(view.ordered), better, interval)


def equal_mass(function: Callable[[Ordered, int], Tensor]) -> ReadOut:
    """Make a calibration error over bins of equally many rows.

    Args:
        function: Maps `Ordered` and the number of bins to ``(...)``.

    Returns:
        The read-out.
    """
    return ReadOut(("ranks",), lambda view: function(view.ordered, view.n_bins), "lower", interval="hull")


def coverage_at_risk_of(risk: float) -> ReadOut:
    """Make the metric `functional.coverage_at_risk` at one risk.

    Args:
        risk: The error rate that is allowed, in [0, 1].

    Returns:
        The read-out.
    """
    return from_ordered(partial(selective.coverage_at_risk_from_ordered, risk=risk), "higher")


def risk_at_coverage_of(coverage: float) -> ReadOut:
    """Make the metric `functional.risk_at_coverage` at one coverage.

    Args:
        coverage: Share of the rows that are answered, in (0, 1].

    Returns:
        The read-out.
    """
    return from_ordered(partial(selective.risk_at_coverage_from_ordered, coverage=coverage), "lower")


def excess_aurc_of(exact: bool) -> ReadOut:
    """Make the metric `functional.e_aurc` with one of its two optima.

    Args:
        exact: Whether to subtract the optimum of this many rows in place of its limit.

    Returns:
        The read-out.
    """
    return from_ordered(partial(selective.e_aurc_from_ordered, exact=exact), "lower")._replace(low=-1.0)


def _classwise_ece(view: View) -> Tensor:
    return classwise_ece_from_sums(view.classwise, view.count)


def _signed_gap(view: View) -> Tensor:
    return view.mean("confidence") - view.mean("correct")


_DARK_SIDE = ("correct", "confidence", "ranks", "bins")

READ_OUTS: dict[str, ReadOut] = {
    "accuracy": mean_of("correct", "higher"),
    "top5_accuracy": mean_of("top5", "higher"),
    "nll": mean_of("nll", "lower", high=torch.inf),
    "brier": mean_of("brier", "lower", high=2.0),
    "entropy": mean_of("entropy", "none", high=torch.inf),
    "ece": from_bins(calibration.ece_from_bins),
    "signed_gap": ReadOut(("correct", "confidence"), _signed_gap, "zero", low=-1.0),
    "correctness_auroc": ReadOut(("ranks",), lambda view: view.auroc, "higher"),
    "over_ece": from_bins(calibration.over_ece_from_bins),
    "under_ece": from_bins(calibration.under_ece_from_bins),
    "mce": from_bins(calibration.mce_from_bins),
    "rmsce": from_bins(calibration.rmsce_from_bins),
    "overconfidence_error": from_bins(calibration.overconfidence_error_from_bins),
    "classwise_ece": ReadOut(("classwise",), _classwise_ece, "lower", interval="hull"),
    "aece_split": equal_mass(adaptive.aece_split_from_ordered),
    "aece_official": equal_mass(adaptive.aece_official_from_ordered),
    "ks": from_ordered(adaptive.ks_from_ordered, "lower", interval="hull"),
    "debiased_l2": equal_mass(adaptive.debiased_l2_from_ordered),
    "smece": from_ordered(smooth.smece_from_ordered, "lower", interval="hull"),
    "aupr_success": from_ordered(refinement.average_precision_from_ordered, "higher"),
    "aupr_error": from_ordered(refinement.aupr_error_from_ordered, "higher"),
    "fpr95": from_ordered(refinement.fpr_at_tpr_from_ordered, "lower"),
    "aurc": from_ordered(selective.aurc_from_ordered, "lower"),
    "e_aurc": excess_aurc_of(exact=False),
    "augrc": from_ordered(selective.augrc_from_ordered, "lower"),
    "coverage_at_risk_0.05": coverage_at_risk_of(0.05),
    "risk_at_coverage_0.8": risk_at_coverage_of(0.8),
    "risk_at_coverage_0.9": risk_at_coverage_of(0.9),
    "murphy_reliability": ReadOut(("bins", "moments"), lambda view: view.murphy.reliability, "lower", interval="basic"),
    "murphy_resolution": ReadOut(("bins", "moments"), lambda view: view.murphy.resolution, "higher", interval="basic"),
    "murphy_uncertainty": ReadOut(("bins", "moments"), lambda view: view.murphy.uncertainty, "none"),
    "corp_miscalibration": ReadOut(("ranks",), lambda view: view.corp.miscalibration, "lower", interval="basic"),
    "corp_discrimination": ReadOut(("ranks",), lambda view: view.corp.discrimination, "higher", interval="basic"),
    "corp_uncertainty": ReadOut(("ranks",), lambda view: view.corp.uncertainty, "none"),
    "dark_side_alpha": ReadOut(_DARK_SIDE, lambda view: view.dark_side.alpha, "none", low=-1.0),
    "dark_side_beta": ReadOut(_DARK_SIDE, lambda view: view.dark_side.beta, "none", low=-1.0),
    "dark_side_gamma": ReadOut(_DARK_SIDE, lambda view: view.dark_side.gamma, "none", low=-1.0),
    "dark_side_residual": ReadOut(_DARK_SIDE, lambda view: view.dark_side.residual, "none", "hull", low=-1.0),
    "ovo_auroc": ReadOut(("scores",), lambda view: view.ovo_auroc, "higher"),
    "calibration_nll": ReadOut(("scores",), lambda view: view.variational.calibration, "lower", "hull", high=torch.inf),
    "refinement_nll": ReadOut(("scores",), lambda view: view.variational.refinement, "lower", high=torch.inf),
}
"""The metrics, by the key that logs and tables use."""

CORE = ("accuracy", "nll", "brier", "ece", "signed_gap", "correctness_auroc")
"""What a run logs while it trains, and the columns of result tables."""

REPORT = tuple(key for key, read_out in READ_OUTS.items() if "scores" not in read_out.parts)
"""Everything that needs no scores of all classes after the batch; `trainer.test` logs it, and up to 200 classes also
`ovo_auroc`."""

FULL = tuple(READ_OUTS)
"""Everything."""


def undefined_keys(values: dict[str, Tensor]) -> list[str]:
    """Find the metrics that are not defined on a set.

    Args:
        values: 0-d tensors by key.

    Returns:
        Keys of those that are nan.
    """
    return [key for key, value in values.items() if math.isnan(float(value))]
