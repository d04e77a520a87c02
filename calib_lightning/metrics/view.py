"""What a metric reads: means, binned sums and ordered groups of a set, or of many resamples or subsets at once."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from calib_lightning.metrics.functional import calibration, refinement
from calib_lightning.metrics.functional.dark_side import DarkSideTerms, dark_side_from
from calib_lightning.metrics.functional.decomposition import (
    CORPDecomposition,
    MurphyDecomposition,
    corp_from_ordered,
    murphy_from_bins,
)
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.ovo import ovo_auroc
from calib_lightning.metrics.functional.variational import VariationalSplit, variational_split

_COARSE = 2e-3


class View(ABC):
    """What metrics read; every tensor may have leading dimensions ``(...)``, one entry per subset.

    Attributes:
        n_bins: Number of bins M.
        count: Number of rows ``(...)``, float64.
        bins: Equal-width bins ``(..., M, 3)``: count, sum of the confidences, number of correct rows.
        fine_bins: As ``bins``, 100 of them or the non-empty ones.
        moments: Equal-width bins ``(..., M, 2)``: sum of the squared confidences, sum of those of correct rows.
        classwise: Equal-width bins of every class ``(..., 2, K, M)``: sum of the probabilities, rows with that label.
        ordered: Groups of equal confidence, ascending.
        ovo_auroc: One-versus-one AUROC ``(...)``; needs the scores of all classes.
        variational: Calibration and refinement parts of the NLL ``(...)``; needs the scores of all classes.
    """

    n_bins: int
    count: Tensor
    bins: Tensor
    fine_bins: Tensor
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


class StateView(View):
    """The view of a whole set.

    Args:
        state: A metric that holds the needed parts.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self.n_bins = state.n_bins
        self.count = state.count.double()

    def __getattr__(self, name: str) -> Any:
        # The state holds sums under the same names.
        if name not in ("bins", "fine_bins", "moments", "classwise"):
            raise AttributeError(name)
        return getattr(self._state, name)

    def mean(self, name: str) -> Tensor:
        """The mean, 0-d float64, of a part with one value per row."""
        total: Tensor = getattr(self._state, f"{name}_sum").double()
        return total / self.count

    @cached_property
    def ordered(self) -> Ordered:  # type: ignore[override]
        """Groups of equal confidence, or the non-empty bins of the histogram."""
        if self._state.rank_bins is None:
            return order_rows(self._state.rows_of("rank_scores"), self._state.rows_of("rank_correct"))
        sums = self._state.rank_sums
        ordered = Ordered(*sums[:, sums[0] > 0])
        correct, wrong = ordered.correct, ordered.wrong
        pairs = float(correct.sum() * wrong.sum())
        bound = float((correct * wrong).sum()) / (2.0 * pairs) if pairs else 0.0
        if bound > _COARSE:
            warnings.warn(
                f"{type(self._state).__name__}: the scores are so close together that the histogram of "
                f"{self._state.rank_bins} bins leaves many of them tied; its AUROC may be off by up to {bound:.1g}. "
                "Use rank_bins=None for exact ranks.",
                stacklevel=5,
            )
        return ordered

    @cached_property
    def ovo_auroc(self) -> Tensor:  # type: ignore[override]
        """One-versus-one AUROC."""
        scores, labels = self._scores
        if bool((labels == labels[0]).all()):  # the metric itself warns
            return torch.full((), torch.nan, dtype=torch.float64, device=labels.device)
        return ovo_auroc(scores, labels, input=self._state.input)

    @cached_property
    def variational(self) -> VariationalSplit:  # type: ignore[override]
        """Calibration and refinement parts of the negative log-likelihood."""
        return variational_split(*self._scores, input=self._state.input)

    @property
    def _scores(self) -> tuple[Tensor, Tensor]:
        return self._state.rows_of("scores"), self._state.rows_of("score_labels").long()
