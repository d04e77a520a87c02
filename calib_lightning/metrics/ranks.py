"""Average ranks of methods over data sets, and which of them are told apart (Demšar, 2006)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, f, rankdata, studentized_range

from calib_lightning.metrics.table import Direction

FEWEST_DATA_SETS = 5
"""Fewer give no critical difference."""


class Friedman(NamedTuple):
    """Tests of the hypothesis that all methods are equally good.

    Attributes:
        chi2: Friedman's chi-square, corrected for ties; 0 if all values of every data set are equal.
        chi2_p_value: Its p-value from the chi-square distribution with M - 1 degrees of freedom.
        f: The statistic of Iman and Davenport, which is less conservative; infinite if all data sets agree.
        f_p_value: Its p-value from the F distribution with M - 1 and (M - 1)(D - 1) degrees of freedom.
    """

    chi2: float
    chi2_p_value: float
    f: float
    f_p_value: float


class RankComparison(NamedTuple):
    """What a critical-difference diagram shows; methods are in the order of their ranks.

    Attributes:
        names: The methods, the best first.
        ranks: Their average ranks, 1 is best.
        critical_difference: Methods whose ranks differ by at least this are told apart.
        groups: The largest groups of methods that are not told apart, of two or more each, in the order of their ranks;
            a method may be in several.
        friedman: The test of all methods together; the groups mean little unless it is significant.
        data_sets: Number of data sets.
        level: Level of confidence.
    """

    names: tuple[str, ...]
    ranks: tuple[float, ...]
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]
    friedman: Friedman
    data_sets: int
    level: float


def average_ranks(
    values: ArrayLike,
    better: Direction,
    *,
    methods: Sequence[str] | None = None,
    data_sets: Sequence[str] | None = None,
) -> NDArray[np.float64]:
    """Rank the methods on each data set, 1 is best, and average the ranks over the data sets.

    Equal values share the mean of their ranks.

    Args:
        values: One value for each data set and method, ``(D, M)``.
        better: Which values are better: ``"higher"``, ``"lower"`` or ``"zero"``.
        methods: Names for messages.
        data_sets: Names for messages.

    Returns:
        Average ranks, ``(M,)``; their sum is M (M + 1) / 2.

    Raises:
        ValueError: ``better`` is ``"none"``, a value is nan, or the shape is wrong.

    Example:
        >>> average_ranks([[0.9, 0.8, 0.8], [0.7, 0.6, 0.5]], "higher").tolist()
        [1.0, 2.25, 2.75]
    """
    averages: NDArray[np.float64] = _ranks(values, better, methods, data_sets).mean(axis=0)
    return averages


def friedman(values: ArrayLike, better: Direction = "lower") -> Friedman:
    """Test whether all methods are equally good, from their ranks on each data set (Friedman, 1937).

    With average ranks R_j of M methods on D data sets, ``chi2 = 12 D / (M (M + 1)) sum_j (R_j - (M + 1) / 2)^2``,
    divided by the share of the ranks' variance that ties leave; ``F = (D - 1) chi2 / (D (M - 1) - chi2)``. The
    chi-square distribution is an approximation for many data sets (Demšar: D > 10, M > 5).

    Args:
        values: One value for each data set and method, ``(D, M)``.
        better: Which values are better; ``"higher"`` and ``"lower"`` give the same result.

    Returns:
        Both statistics with their p-values.

    Raises:
        ValueError: As for `average_ranks`, or there is only one data set.

    Example:
        >>> result = friedman([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4], [0.3, 0.5]], "higher")
        >>> result.chi2, result.f
        (1.0, 1.0)
    """
    ranks = _ranks(values, better, None, None)
    data_sets, methods = ranks.shape
    if data_sets < 2:
        raise ValueError("data_sets is 1; Friedman's test needs at least 2. Add data sets.")
    middle = (methods + 1) / 2
    spread = float(np.square(ranks - middle).sum()) / (data_sets * (methods - 1))  # M (M + 1) / 12 without ties
    between = float(np.square(ranks.mean(axis=0) - middle).sum())
    statistic = data_sets * between / spread if spread else 0.0
    free, rest = methods - 1, data_sets * (methods - 1) - statistic
    ratio = math.inf if rest <= 1e-9 * statistic else (data_sets - 1) * statistic / rest
    p_values = float(chi2.sf(statistic, free)), float(f.sf(ratio, free, free * (data_sets - 1)))
    return Friedman(statistic, p_values[0], ratio, p_values[1])


def critical_difference(methods: int, data_sets: int, level: float = 0.95) -> float:
    """The least difference of two average ranks that Nemenyi's test takes for real, all pairs considered.

    ``q sqrt(M (M + 1) / (6 D))``, with q the quantile of the studentized range of M methods, divided by sqrt(2)
    (Demšar, 2006, section 3.2.2). García and Herrera (2008) describe tests of more power.

    Args:
        methods: Number of methods, M.
        data_sets: Number of data sets, D.
        level: Level of confidence, a fraction.

    Returns:
        The critical difference.

    Raises:
        ValueError: Fewer than two methods or five data sets, or ``level`` is not in (0, 1).

    Example:
        >>> round(critical_difference(methods=4, data_sets=14, level=0.9), 3)
        1.118
    """
    if methods < 2:
        raise ValueError(f"methods is {methods}; it must be at least 2.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; it must be between 0 and 1.")
    if data_sets < FEWEST_DATA_SETS:
        raise ValueError(
            f"data_sets is {data_sets}; a critical difference needs at least {FEWEST_DATA_SETS}. With fewer, ranks can "
            "hardly differ by enough to tell methods apart, and Nemenyi's approximation does not hold. Add data sets, "
            "or compare the methods on each data set."
        )
    quantile = float(studentized_range.ppf(level, methods, np.inf))
    return quantile / math.sqrt(2) * math.sqrt(methods * (methods + 1) / (6 * data_sets))


def compare_ranks(
    values: ArrayLike,
    better: Direction,
    methods: Sequence[str],
    data_sets: Sequence[str] | None = None,
    level: float = 0.95,
) -> RankComparison:
    """Compare methods over data sets: average ranks, critical difference, and the groups that are not told apart.

    Args:
        values: One value for each data set and method, ``(D, M)``.
        better: Which values are better: ``"higher"``, ``"lower"`` or ``"zero"``.
        methods: Names of the methods.
        data_sets: Names of the data sets, for messages.
        level: Level of confidence, a fraction.

    Returns:
        What a critical-difference diagram shows.

    Raises:
        ValueError: As for `average_ranks` and `critical_difference`.

    Example:
        >>> found = compare_ranks([[3, 1, 2]] * 6, "higher", ["a", "b", "c"])
        >>> found.names, found.ranks, found.groups
        (('a', 'c', 'b'), (1.0, 2.0, 3.0), (('a', 'c'), ('c', 'b')))
    """
    ranks = average_ranks(values, better, methods=methods, data_sets=data_sets)
    rows = np.shape(values)[0]
    least = critical_difference(len(methods), rows, level)
    order = np.argsort(ranks, kind="stable")
    names, in_order = tuple(methods[place] for place in order), tuple(float(ranks[place]) for place in order)
    groups = tuple(names[start:end] for start, end in _cliques(in_order, least))
    return RankComparison(names, in_order, least, groups, friedman(values, better), rows, level)


def _cliques(ranks: Sequence[float], least: float) -> list[tuple[int, int]]:
    """Maximal runs of ascending ranks that differ by less than ``least``, as slices."""
    found: list[tuple[int, int]] = []
    for start, rank in enumerate(ranks):
        end = sum(other - rank < least for other in ranks)
        if end - start > 1 and (not found or end > found[-1][1]):
            found.append((start, end))
    return found


def _ranks(
    values: ArrayLike, better: Direction, methods: Sequence[str] | None, data_sets: Sequence[str] | None
) -> NDArray[np.float64]:
    """Ranks of the methods on each data set, ``(D, M)``."""
    table: NDArray[Any] = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise ValueError(f"values has shape {table.shape}; it must be (data sets, methods) with at least two methods.")
    for what, names, size in (("methods", methods, table.shape[1]), ("data_sets", data_sets, table.shape[0])):
        if names is not None and len(names) != size:
            raise ValueError(f"{what} has {len(names)} names; it must have {size}, as values has.")
    if better not in ("higher", "lower", "zero"):
        raise ValueError(
            f"better is {better!r}; it must be 'higher', 'lower' or 'zero'. Other values have no best one."
        )
    if np.isnan(table).any():
        row, column = np.argwhere(np.isnan(table))[0]
        where = data_sets[row] if data_sets is not None else f"data set {row}"
        which = methods[column] if methods is not None else f"method {column}"
        raise ValueError(f"the value of {which} on {where} is nan; it must be a number. Leave out one of the two.")
    signed = {"higher": -table, "lower": table, "zero": np.abs(table)}[better]
    ranks: NDArray[np.float64] = rankdata(signed, axis=1)
    return ranks
