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
