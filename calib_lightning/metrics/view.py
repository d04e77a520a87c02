"""What a metric reads: means, binned sums and ordered groups of a set, or of many resamples or subsets at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

from torch import Tensor

from calib_lightning.metrics.functional import calibration, refinement
from calib_lightning.metrics.functional.dark_side import DarkSideTerms, dark_side_from
from calib_lightning.metrics.functional.decomposition import (
    CORPDecomposition,
    MurphyDecomposition,
    corp_from_ordered,
    murphy_from_bins,
)
from calib_lightning.metrics.functional.ordered import Ordered
from calib_lightning.metrics.functional.variational import VariationalSplit


class View(ABC):
    """What metrics read; every tensor may have leading dimensions ``(...)``, one entry per subset.

    Attributes:
        n_bins: Number of bins M.
        count: Number of rows ``(...)``, float64.
        bins: Equal-width bins ``(..., M, 3)``: count, sum of the confidences, number of correct rows.
        moments: Equal-width bins ``(..., M, 2)``: sum of the squared confidences, sum of those of correct rows.
        classwise: Equal-width bins of every class ``(..., 2, K, M)``: sum of the probabilities, rows with that label.
        ordered: Groups of equal confidence, ascending.
        ovo_auroc: One-versus-one AUROC ``(...)``; needs the scores of all classes.
        variational: Calibration and refinement parts of the NLL ``(...)``; needs the scores of all classes.
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
        """The mean ``(...)`` float64 of a part with one value per row; nan without rows."""

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
        """Terms of eq. 9 of "On the Dark Side of Calibration"."""
        ece = calibration.ece_from_bins(self.bins)
        return dark_side_from(self.mean("confidence"), self.mean("correct"), self.auroc, ece)
