"""The rows that a state keeps, and views of many resamples or subsets of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.classwise import weighted_classwise_sums
from calib_lightning.metrics.functional.ordered import Ordered, group_ends, sums_of_groups
from calib_lightning.metrics.functional.ovo import class_log_odds, weighted_ovo_auroc
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.metrics.functional.variational import (
    VariationalSplit,
    VariationalTable,
    variational_from_table,
    variational_table,
)
from calib_lightning.metrics.state import EvaluationState
from calib_lightning.metrics.view import View


class RowTable:
    """The rows kept by a state with ``details=True``, and what all their subsets share.

    Args:
        columns: One value per row of each quantity ``(N,)``, by the name of the part.
        ranks: Log-odds of the confidence ``(N,)``.
        labels: Class labels ``(N,)``.
        scores: All scores ``(N, K)``, or ``None`` if no metric needs them.
        num_classes: Number of classes K.
        settings: Number of bins, and the kind of the scores.
    """

    def __init__(
        self,
        columns: dict[str, Tensor],
        ranks: Tensor,
        labels: Tensor,
        scores: Tensor | None,
        num_classes: int,
        settings: tuple[int, InputKind],
    ) -> None:
        self.columns = columns
        self.ranks = ranks
        self.labels = labels
        self.scores = scores
        self.num_classes = num_classes
        self.n_bins, self.input = settings

    @classmethod
    def of(cls, state: EvaluationState) -> RowTable:
        """The rows of a state made with ``details=True``, from all processes, on the CPU."""
        if not state.details:
            raise ValueError("details is False; it must be True. Create EvaluationState(..., details=True).")
        with state.sync_context(should_sync=state.sync_on_compute):
            columns = {
                name.removesuffix("_rows"): state.rows_of(name).cpu()
                for name in state.lists
                if name.endswith("_rows") and name != "label_rows"
            }
            scores = state.rows_of("scores").cpu() if "scores" in state.parts else None
            return cls(
                columns,
                state.rows_of("rank_scores").cpu(),
                state.rows_of("label_rows").cpu().long(),
                scores,
                int(state.num_classes),
                (state.n_bins, state.input),
            )

    @property
    def settings(self) -> tuple[int, InputKind]:
        """Number of bins, and the kind of the scores."""
        return self.n_bins, self.input

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def joined(self, other: RowTable) -> RowTable:
        """These rows with those of another table below; quantities that only one of them has are dropped."""
        scores = None
        if self.scores is not None and other.scores is not None:
            scores = torch.cat([self.scores, other.scores])
        return RowTable(
            {
                name: torch.cat([column, other.columns[name]])
                for name, column in self.columns.items()
                if name in other.columns
            },
            torch.cat([self.ranks, other.ranks]),
            torch.cat([self.labels, other.labels]),
            scores,
            self.num_classes,
            (self.n_bins, self.input),
        )

    def with_columns(self, names: Iterable[str]) -> RowTable:
        """These rows with some of the quantities, in this order."""
        columns = {name: self.columns[name] for name in names}
        return RowTable(columns, self.ranks, self.labels, self.scores, self.num_classes, self.settings)

    @cached_property
    def order(self) -> Tensor:
        """Positions of the rows in ascending order of confidence."""
        return self.ranks.argsort()

    @cached_property
    def ends(self) -> Tensor:
        """Where groups of equal confidence end in that order."""
        return group_ends(self.ranks[self.order])

    @cached_property
    def ordered_confidence(self) -> Tensor:
        """Confidences in that order, float64."""
        return torch.sigmoid(self.ranks[self.order].double())

    @cached_property
    def ordered_correct(self) -> Tensor:
        """Whether each row is correct, in that order, float64."""
        return self.columns["correct"][self.order].double()

    @cached_property
    def column_matrix(self) -> Tensor:
        """All columns side by side, ``(N, C)`` float64; infinite values are 0."""
        matrix = torch.stack([column.double() for column in self.columns.values()], dim=1)
        return matrix.masked_fill_(matrix.isinf(), 0.0)

    @cached_property
    def infinite(self) -> Tensor | None:
        """Ones where `column_matrix` has 0 instead of infinity, ``(N, C)`` float64; ``None`` if nowhere."""
        lost = torch.stack([column.isinf() for column in self.columns.values()], dim=1)
        return lost.double() if bool(lost.any()) else None

    @cached_property
    def bin_matrix(self) -> Tensor:
        """What each row adds to each sum of the bins, ``(N, 5 M)`` float64: count, c, a, c^2, c a (a: correctness)."""
        confidence, correct = self.columns["confidence"], self.columns["correct"].double()
        wide = confidence.double()
        values = torch.stack([torch.ones_like(wide), wide, correct, wide * wide, wide * correct], dim=1)
        place = self.columns["bin"].long().unsqueeze(1) * 5 + torch.arange(5)
        return torch.zeros(len(self), 5 * self.n_bins, dtype=torch.float64).scatter_(1, place, values)

    @cached_property
    def fine_groups(self) -> tuple[Tensor, Tensor]:
        """Positions of the rows by fine bin, and where the bins end in that order."""
        bins, order = self.columns["fine_bin"].sort()
        return order, group_ends(bins)

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities of all classes ``(N, K)``."""
        return Rows(self.all_scores, self.labels, None, self.input).probs

    @cached_property
    def class_ranks(self) -> Tensor:
        """Scores ``(N, K)`` that rank the rows for each class."""
        return self.all_scores if self.input == "probs" else class_log_odds(self.all_scores)

    @cached_property
    def variational(self) -> VariationalTable:
        """Losses of the rows at several temperatures."""
        return variational_table(self.all_scores, self.labels, input=self.input)

    @property
    def all_scores(self) -> Tensor:
        """Scores of all classes ``(N, K)``."""
        if self.scores is None:
            raise ValueError("The state keeps no scores of all classes. Ask for a metric that needs them.")
        return self.scores


class SumsView(View):
    """Means and equal-width bins of many subsets, from their sums.

    Args:
        names: Names of the columns.
        n_bins: Number of bins M.
        count: Number of rows ``(B,)`` float64.
    """

    column_sums: Tensor
    """Sums of the columns ``(B, C)`` float64, without infinite values."""
    infinite_sums: Tensor | None
    """How many infinite values each sum leaves out ``(B, C)`` float64; ``None`` if there are none."""
    bin_sums: Tensor
    """Sums of the bins ``(B, 5 M)`` float64, as in `RowTable.bin_matrix`."""

    def __init__(self, names: Iterable[str], n_bins: int, count: Tensor) -> None:
        self._names = list(names)
        self.n_bins = n_bins
        self.count = count

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        means = self.column_sums / self.count.unsqueeze(-1)
        if self.infinite_sums is not None:
            # 0 * inf would be nan if a row with an infinite loss was not drawn.
            means.masked_fill_(self.infinite_sums > 0, torch.inf)
        return dict(zip(self._names, means.unbind(dim=-1), strict=True))

    def mean(self, name: str) -> Tensor:
        """The mean ``(B,)`` float64 of a part in each subset."""
        return self._means[name]

    @cached_property
    def _bins_and_moments(self) -> Tensor:
        return self.bin_sums.reshape(-1, self.n_bins, 5)

    @cached_property
    def bins(self) -> Tensor:  # type: ignore[override]
        """Equal-width bins ``(B, M, 3)``."""
        return self._bins_and_moments[..., :3]

    @cached_property
    def moments(self) -> Tensor:  # type: ignore[override]
        """Equal-width bins ``(B, M, 2)``."""
        return self._bins_and_moments[..., 3:]


class WeightedView(SumsView):
    """Many subsets or resamples of a table at once.

    Args:
        table: The rows.
        weights: How often each row counts in each subset, ``(B, N)`` float64.
    """

    def __init__(self, table: RowTable, weights: Tensor) -> None:
        super().__init__(table.columns, table.n_bins, weights.sum(dim=-1))
        self._table = table
        self._weights = weights

    @cached_property
    def column_sums(self) -> Tensor:  # type: ignore[override]
        """Sums of the columns ``(B, C)``."""
        return self._weights @ self._table.column_matrix

    @cached_property
    def infinite_sums(self) -> Tensor | None:  # type: ignore[override]
        """How many infinite values they leave out ``(B, C)``."""
        return None if self._table.infinite is None else self._weights @ self._table.infinite

    @cached_property
    def bin_sums(self) -> Tensor:  # type: ignore[override]
        """Sums of the bins ``(B, 5 M)``."""
        return self._weights @ self._table.bin_matrix

    @cached_property
    def fine_bins(self) -> Tensor:  # type: ignore[override]
        """Non-empty fine bins ``(B, G, 3)``."""
        table = self._table
        order, ends = table.fine_groups
        confidence, correct = (table.columns[name][order].double() for name in ("confidence", "correct"))
        weights = self._weights[:, order]
        sums = [sums_of_groups(values, ends) for values in (weights, weights * confidence, weights * correct)]
        return torch.stack(sums, dim=-1)

    @cached_property
    def classwise(self) -> Tensor:  # type: ignore[override]
        """Equal-width bins of every class ``(B, 2, K, M)``."""
        return weighted_classwise_sums(self._table.probs, self._table.labels, self._weights, self.n_bins)

    @cached_property
    def ordered(self) -> Ordered:  # type: ignore[override]
        """Groups of equal confidence ``(B, G)``."""
        table = self._table
        weights = self._weights[:, table.order]
        return Ordered(
            sums_of_groups(weights, table.ends),
            sums_of_groups(weights * table.ordered_correct, table.ends),
            sums_of_groups(weights * table.ordered_confidence, table.ends),
        )

    @cached_property
    def ovo_auroc(self) -> Tensor:  # type: ignore[override]
        """One-versus-one AUROC ``(B,)``."""
        return weighted_ovo_auroc(self._table.class_ranks, self._table.labels, self._weights)

    @cached_property
    def variational(self) -> VariationalSplit:  # type: ignore[override]
        """Calibration and refinement parts of the negative log-likelihood ``(B,)``."""
        return variational_from_table(self._table.variational, self._weights)
