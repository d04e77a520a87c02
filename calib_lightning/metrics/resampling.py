"""Resamples and subsets of the rows of a set: intervals, groups and paired tests for every metric.

A resample or a subset is a row of weights over the rows of the set, so the metrics read many of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.classwise import weighted_classwise_sums
from calib_lightning.metrics.functional.ordered import Ordered, group_ends, sums_of_groups
from calib_lightning.metrics.functional.ovo import class_log_odds, weighted_ovo_auroc
from calib_lightning.metrics.functional.rows import InputKind, Rows
from calib_lightning.metrics.functional.variational import (
    VariationalSplit,
    VariationalTable,
    variational_from_table,
    variational_table,
)
from calib_lightning.metrics.state import EvaluationState
from calib_lightning.metrics.table import METRICS
from calib_lightning.metrics.view import View

_AT_ONCE = 2**19
"""How many weights are processed together: enough for vector code, few enough for the cache."""

_AT_ONCE_WITH_SCORES = 2**24

_CLASS_BINS_AT_ONCE = 2**22


class Interval(NamedTuple):
    """A value and the interval around it.

    Attributes:
        value: The value on the whole set.
        low: Lower end; nan if the value is undefined or infinite.
        high: Upper end.
    """

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How two runs differ on the same rows.

    Attributes:
        value: Value of the first run minus that of the second.
        p_value: Share of random exchanges of rows between the runs that give a difference at least as large.
    """

    value: float
    p_value: float


class GroupTable(NamedTuple):
    """Metrics of groups of rows.

    Attributes:
        names: Names of the groups.
        rows: Number of rows per group.
        values: Per metric one value per group, ``(G,)`` float64; nan where it is undefined.
    """

    names: tuple[str, ...]
    rows: Tensor
    values: dict[str, Tensor]

    def worst(self, metric: str) -> tuple[str, float]:
        """Find the group with the worst value of a metric.

        Args:
            metric: Key of a metric that has a better direction.

        Returns:
            Name and value; ``("", nan)`` if the metric is undefined for every group.

        Raises:
            ValueError: The metric has no better direction, or was not computed.
        """
        better = METRICS[metric].better if metric in METRICS else "none"
        if metric not in self.values or better == "none":
            allowed = [key for key in self.values if METRICS[key].better != "none"]
            raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(allowed)}.")
        values = self.values[metric]
        badness = {"higher": -values, "lower": values, "zero": values.abs()}[better]
        if bool(badness.isnan().all()):
            return "", torch.nan
        index = int(badness.nan_to_num(nan=-torch.inf).argmax())
        return self.names[index], float(values[index])


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


class WeightedView(View):
    """Many subsets or resamples of a table at once.

    Args:
        table: The rows.
        weights: How often each row counts in each subset, ``(B, N)`` float64.
    """

    def __init__(self, table: RowTable, weights: Tensor) -> None:
        self._table = table
        self._weights = weights
        self.n_bins = table.n_bins
        self.count = weights.sum(dim=-1)

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        sums = self._weights @ self._table.column_matrix
        if self._table.infinite is not None:
            # 0 * inf would be nan if a row with an infinite loss was not drawn.
            sums.masked_fill_(self._weights @ self._table.infinite > 0, torch.inf)
        means = sums / self.count.unsqueeze(-1)
        return dict(zip(self._table.columns, means.unbind(dim=-1), strict=True))

    def mean(self, name: str) -> Tensor:
        """The mean ``(B,)`` float64 of a part in each subset."""
        return self._means[name]

    @cached_property
    def _bins_and_moments(self) -> Tensor:
        sums = self._weights @ self._table.bin_matrix
        return sums.reshape(-1, self.n_bins, 5)

    @cached_property
    def bins(self) -> Tensor:  # type: ignore[override]
        """Equal-width bins ``(B, M, 3)``."""
        return self._bins_and_moments[..., :3]

    @cached_property
    def moments(self) -> Tensor:  # type: ignore[override]
        """Equal-width bins ``(B, M, 2)``."""
        return self._bins_and_moments[..., 3:]

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


Weights = Callable[[int], Iterator[Tensor]]
"""Yields the weights of all subsets in pieces ``(b, N)`` of at most the given size, the same ones each time."""


def read_weighted(table: RowTable, metrics: Sequence[str], weights: Weights) -> dict[str, Tensor]:
    """Values ``(B,)`` float64 of each metric on many subsets; nan where it is undefined."""
    # Metrics of all scores have a cost per piece, so their pieces are larger.
    from_scores = [key for key in metrics if "scores" in METRICS[key].parts]
    others = [key for key in metrics if key not in from_scores]
    parts: dict[str, list[Tensor]] = {key: [] for key in metrics}
    for keys, limit in ((others, _AT_ONCE), (from_scores, _AT_ONCE_WITH_SCORES)):
        at_once = limit // max(1, len(table))
        if any("classwise" in METRICS[key].parts for key in keys):
            at_once = min(at_once, _CLASS_BINS_AT_ONCE // (2 * table.num_classes * table.n_bins))
        for piece in weights(max(1, at_once)) if keys else ():
            view = WeightedView(table, piece)
            for key in keys:
                parts[key].append(METRICS[key].value(view))
    return {key: torch.cat(values) for key, values in parts.items()}


def resamples(rows: int, total: int, seed: int) -> Weights:
    """Draw rows with replacement; the weights count how often each row was drawn."""

    def pieces(at_once: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        one = torch.ones(1, dtype=torch.float64).expand(rows)
        for start in range(0, total, at_once):
            piece = torch.zeros(min(at_once, total - start), rows, dtype=torch.float64)
            for weights in piece:
                weights.scatter_add_(0, torch.randint(rows, (rows,), generator=generator), one)
            yield piece

    return pieces


def subsets(member: Tensor) -> Weights:
    """Weights 1 and 0 of the rows inside and outside of subsets ``(B, N)``."""

    def pieces(at_once: int) -> Iterator[Tensor]:
        for piece in torch.split(member, at_once):
            yield piece.double()

    return pieces


def exchanges(rows: int, total: int, seed: int) -> Weights:
    """Weights of random exchanges between two runs, for a table with the rows of the second below the first.

    Each exchange has two weightings, of the first and of the second run; the first exchange changes nothing.
    """

    def pieces(at_once: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        half = max(1, at_once // 2)
        for start in range(0, total + 1, half):
            stays = torch.empty(min(half, total + 1 - start), rows, dtype=torch.float64)
            for exchange, row in enumerate(stays, start):
                if exchange == 0:
                    row.fill_(1.0)
                else:
                    row.copy_(torch.rand(rows, generator=generator) < 0.5)
            kept = torch.cat([stays, 1.0 - stays], dim=1)
            yield torch.stack([kept, 1.0 - kept], dim=1).flatten(0, 1)

    return pieces


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= {least}.")


def bootstrap_intervals(
    state: EvaluationState, n_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval]:
    """Estimate how each value would vary on another test set of the same size, by the bootstrap (Efron, 1979).

    Rows are drawn with replacement, and every metric is computed again from them. With ``v`` the value, ``q`` and
    ``m`` the quantiles and the mean of the resampled values, the kind of interval (``MetricRow.interval``) is:

    - ``"percentile"``, ``[q_low, q_high]``: means and rank statistics, which resampling does not bias.
    - ``"basic"``, ``[2 v - q_high, 2 v - q_low]``: terms of the Brier score. Chance alone makes them too large, and a
      resample adds the same bias again; this interval subtracts it, ``m - v``.
    - ``"hull"``: calibration errors. It spans the basic interval and ``[q_low - m + v, q_high - m + v]``, which
      subtracts nothing. Large gaps have little bias and small ones much, so ``m - v`` may be far from the bias of
      this set, and either interval alone is too narrow.

    All are cut to the possible values.

    On 500 simulated sets (five classes, 1000 rows, a network over-confident by a temperature of 1.25 or 1.6) the 95 %
    intervals of nearly all metrics contained the true value in 92 to 97 % of the sets; for ECE in 95 %, the basic
    interval alone in 89 %, the percentile interval in 74 and 91 %; see ``tests/metrics/test_coverage.py``. Exceptions:

    - ``mce``, 47 to 49 %: the largest gap is mostly that of a bin with few rows, which resampling cannot correct.
    - ``classwise_ece``, 75 % at a temperature of 1.25 and 94 % at 1.6 (4000 rows: 93 % of 300 and 98 % of 150 sets).
      With few rows per class and bin the interval is too high.
    - ``under_ece`` of these over-confident networks, whose true value is 0: 99 %.
    - A calibrated network (200 sets): its true errors are 0, and many intervals lie above 0 (ECE: about 40 %,
      ``smece`` and ``classwise_ece``: most). So an interval above 0 does not prove that a network is miscalibrated.

    Args:
        state: A state made with ``details=True``; the rows of all processes count.
        n_resamples: Number of resamples; 1000 is usual for 95 %.
        level: Coverage of the intervals, a fraction.
        seed: Seed of the draws; the same seed gives the same intervals.

    Returns:
        Value and interval of each metric of the state; nan where it is undefined. Resamples in which a metric is
        undefined (without wrong rows, say) are left out.

    Raises:
        ValueError: The state keeps no rows, or an argument is invalid.

    Example:
        >>> state = EvaluationState(["accuracy"], details=True)
        >>> state.update(torch.eye(2).repeat(50, 1), torch.arange(100) % 2 * (torch.arange(100) < 80))
        >>> bootstrap_intervals(state)["accuracy"].value
        0.9
    """
    _check_count("n_resamples", n_resamples, 2)
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level!r}; it must be between 0 and 1, such as 0.95.")
    table = RowTable.of(state)
    values = state.compute()
    if len(table) == 0:
        return {key: Interval(torch.nan, torch.nan, torch.nan) for key in values}
    drawn = read_weighted(table, state.metrics, resamples(len(table), n_resamples, seed))
    return {key: _interval(key, float(values[key]), drawn[key], level) for key in state.metrics}


def _interval(key: str, value: float, drawn: Tensor, level: float) -> Interval:
    if not math.isfinite(value) or bool(drawn.isnan().all()):
        return Interval(value, torch.nan, torch.nan)
    tails = torch.tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0], dtype=torch.float64)
    low, high = torch.nanquantile(drawn, tails).tolist()
    row = METRICS[key]
    basic = 2.0 * value - high, 2.0 * value - low
    if row.interval == "basic":
        low, high = basic
    elif row.interval == "hull":
        shift = value - float(drawn.nanmean())
        low, high = min(basic[0], low + shift), max(basic[1], high + shift)
    return Interval(value, max(low, row.low), min(max(high, row.low), row.high))


def by_class(state: EvaluationState) -> GroupTable:
    """Compute every metric on the rows of each class.

    Args:
        state: A state made with ``details=True``.

    Returns:
        One group per class, named by its number.

    Raises:
        ValueError: The state keeps no rows.
    """
    table = RowTable.of(state)
    names = tuple(str(label) for label in range(table.num_classes))
    return _groups(table, state.metrics, names, table.labels == torch.arange(table.num_classes).unsqueeze(1))


def by_frequency(state: EvaluationState, train_counts: Tensor, many: int = 100, few: int = 20) -> GroupTable:
    """Compute every metric on the rows whose class has many, a medium number of, or few training images.

    Args:
        state: A state made with ``details=True``.
        train_counts: Number of training images of each class, ``(K,)`` integer.
        many: A class with more training images than this belongs to ``"many"`` (Liu et al., 2019).
        few: A class with fewer than this belongs to ``"few"``.

    Returns:
        The groups ``"many"``, ``"medium"`` and ``"few"``.

    Raises:
        ValueError: The state keeps no rows, or ``train_counts`` does not fit.
    """
    table = RowTable.of(state)
    counts = torch.as_tensor(train_counts)
    if counts.shape != (table.num_classes,) or counts.is_floating_point() or bool((counts < 0).any()):
        raise ValueError(
            f"train_counts is {counts.dtype} of shape {tuple(counts.shape)}; it must be {table.num_classes} integers "
            ">= 0, one per class."
        )
    if not 0 <= few <= many:
        raise ValueError(f"few is {few!r} and many is {many!r}; they must satisfy 0 <= few <= many.")
    of_row = counts.cpu()[table.labels]
    member = torch.stack([of_row > many, (of_row <= many) & (of_row >= few), of_row < few])
    return _groups(table, state.metrics, ("many", "medium", "few"), member)


def _groups(table: RowTable, metrics: Sequence[str], names: tuple[str, ...], member: Tensor) -> GroupTable:
    if len(table) == 0:
        empty = torch.full((len(names),), torch.nan, dtype=torch.float64)
        return GroupTable(names, member.sum(dim=1), dict.fromkeys(metrics, empty))
    values = read_weighted(table, metrics, subsets(member))
    return GroupTable(names, member.sum(dim=1), values)


def permutation_test(
    first: EvaluationState, second: EvaluationState, n_permutations: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """Test whether two runs differ on the same samples, by exchanging their rows at random (Fisher, 1935).

    If the runs do not differ, the two predictions of a row can be exchanged. The two-sided p-value is
    ``(1 + #{|d*| >= |d|}) / (1 + n)`` over those of n random exchanges after which the metric is defined for both.

    Args:
        first: State of a run, made with ``details=True``.
        second: State of another run over the same samples in the same order.
        n_permutations: Number of random exchanges.
        seed: Seed of the exchanges.

    Returns:
        For each metric of both states the difference and its p-value; nan where it is undefined.

    Raises:
        ValueError: The samples, numbers of classes or settings differ, or a state keeps no rows.
    """
    _check_count("n_permutations", n_permutations, 1)
    one, other = RowTable.of(first), RowTable.of(second)
    if len(one) != len(other) or not torch.equal(one.labels, other.labels):
        raise ValueError(
            f"The runs have {len(one)} and {len(other)} rows, or different labels; they must be evaluated on the same "
            "samples in the same order."
        )
    if one.num_classes != other.num_classes:
        raise ValueError(
            f"The runs have {one.num_classes} and {other.num_classes} classes; the number must be the same."
        )
    if one.settings != other.settings:
        raise ValueError(
            f"n_bins and input are {one.settings} and {other.settings}; they must be the same for both runs."
        )
    metrics = [key for key in first.metrics if key in second.metrics]
    rows = len(one)
    if rows == 0:
        return {key: Difference(torch.nan, torch.nan) for key in metrics}
    both = one.joined(other)
    found = {}
    for key, values in read_weighted(both, metrics, exchanges(rows, n_permutations, seed)).items():
        of_first, of_second = values.view(-1, 2).unbind(dim=1)
        drawn = of_first - of_second
        value = float(drawn[0])
        # Rounding must not make equal runs or equal differences unequal.
        if abs(value) <= 1e-15 * max(1.0, abs(float(of_first[0]))):
            value = 0.0
        defined = drawn[1:][~drawn[1:].isnan()]
        at_least = (defined.abs() >= abs(value) * (1 - 1e-12) - 1e-15).sum()
        p_value = float(1 + at_least) / (1 + len(defined)) if value == value else torch.nan
        found[key] = Difference(value, p_value)
    return found
