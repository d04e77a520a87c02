"""Mean, standard deviation and interval of a value over runs with different seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

FEWEST_SEEDS = 3
"""With fewer, the spread over seeds says next to nothing."""


class Spread(NamedTuple):
    """A value over several runs.

    Attributes:
        mean: Mean over the runs.
        std: Sample standard deviation (ddof = 1); nan for a single run.
        low: Lower end of the interval of the mean.
        high: Upper end.
        runs: Number of runs.
    """

    mean: float
    std: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        """Show mean and standard deviation."""
        return f"{self.mean:.4f} ± {self.std:.4f} ({self.runs} runs)"


def over_seeds(
    values: Iterable[float], level: float = 0.95, *, low: float = -math.inf, high: float = math.inf
) -> Spread:
    """Summarise one value of several runs: mean, sample standard deviation and Student's interval of the mean.

    ``mean ± t_{(1 + level) / 2, n - 1} std / sqrt(n)``. It describes the variation of training; `bootstrap_intervals`
    describes how a value would vary on another test set. The interval is cut to the possible values: the mean lies
    among them, so that the cut loses no coverage; where it is unbounded it is Student's.

    Args:
        values: The value of each run; if one is nan, all results are nan, so that no run is left out silently.
        level: Coverage of the interval, a fraction.
        low: The smallest possible value, 0 for an accuracy.
        high: The largest possible value, 1 for an accuracy.

    Returns:
        The summary; standard deviation and interval are nan for a single run.

    Raises:
        ValueError: No values, a value below ``low`` or above ``high``, or ``level`` is not in (0, 1).

    Example:
        >>> over_seeds([0.25, 0.5, 0.75])[:2]
        (0.5, 0.25)
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level!r}; it must be between 0 and 1, such as 0.95.")
    numbers = np.asarray([float(value) for value in values], dtype=np.float64)
    runs = len(numbers)
    if runs == 0:
        raise ValueError("values is empty; it must hold the value of at least one run.")
    outside = numbers[(numbers < low) | (numbers > high)]
    if len(outside):
        raise ValueError(f"values has {outside[0]}; it must be from {low} to {high}. Check low and high.")
    mean = float(numbers.mean())
    if runs == 1:
        return Spread(mean, math.nan, math.nan, math.nan, 1)
    # The mean of equal numbers may differ from them in the last bit; their spread is 0 all the same.
    std = 0.0 if bool((numbers == numbers[0]).all()) else float(numbers.std(ddof=1))
    reach = float(stdtrit(runs - 1, (1.0 + level) / 2.0)) * std / math.sqrt(runs)
    return Spread(mean, std, max(mean - reach, low), min(mean + reach, high), runs)


class SeedDifference(NamedTuple):
    """How two methods differ over new seeds, an approximation from few.

    Attributes:
        value: Mean of the first method's runs minus that of the second's.
        low: Lower end of the interval.
        high: Upper end.
        p_value: Two-sided p-value of no difference.
        freedom: Degrees of freedom.
    """

    value: float
    low: float
    high: float
    p_value: float
    freedom: float


def over_new_seeds(
    first: Iterable[float], second: Iterable[float], level: float = 0.95, *, paired: bool = False
) -> SeedDifference:
    """Estimate how two methods would differ on new seeds, by the interval of Welch (1947).

    ``d ± t_{(1 + level) / 2, nu} sqrt(s_1^2 / n_1 + s_2^2 / n_2)`` with the degrees of freedom nu of Welch and
    Satterthwaite. Two trainings with the same seed share little, and unpaired runs leave twice the degrees of freedom.
    Before and after a calibrator the networks are the same: ``paired`` takes the differences of each seed instead,
    ``d ± t_{(1 + level) / 2, n - 1} s / sqrt(n)``. It takes the values for normally distributed, which few runs cannot
    show: an approximation.

    Args:
        first: Values of the first method, one for each seed.
        second: Values of the second method.
        level: Coverage of the interval, a fraction.
        paired: Whether the runs with the same place belong together.

    Returns:
        The difference; interval and p-value are nan with fewer than three runs of a method, where a value is nan, and
        where the runs of both methods do not differ at all, which new seeds would.

    Raises:
        ValueError: No values, ``level`` is not in (0, 1), or pairs are incomplete.

    Example:
        >>> round(over_new_seeds([0.9, 0.92, 0.91], [0.8, 0.83, 0.83]).p_value, 4)
        0.0035
    """
    if paired:
        differences = [a - b for a, b in zip(first, second, strict=True)]
        spread = over_seeds(differences, level)
        if spread.runs >= FEWEST_SEEDS and not any(differences):
            return SeedDifference(0.0, 0.0, 0.0, 1.0, spread.runs - 1.0)  # a calibrator that changes nothing
        return _of_t(spread.mean, spread.std**2 / spread.runs, spread.runs - 1.0, level, spread.runs)
    one, other = over_seeds(first, level), over_seeds(second, level)
    parts = [found.std**2 / found.runs for found in (one, other)]
    below = sum(part**2 / max(found.runs - 1, 1) for part, found in zip(parts, (one, other), strict=True))
    freedom = sum(parts) ** 2 / below if below > 0.0 else math.nan
    return _of_t(one.mean - other.mean, sum(parts), freedom, level, min(one.runs, other.runs))


def _of_t(value: float, variance: float, freedom: float, level: float, runs: int) -> SeedDifference:
    """Student's interval of a mean difference with the variance of that mean."""
    if runs < FEWEST_SEEDS or not variance > 0.0:
        return SeedDifference(value, math.nan, math.nan, math.nan, math.nan)
    error = math.sqrt(variance)
    reach = float(stdtrit(freedom, (1.0 + level) / 2.0)) * error
    return SeedDifference(
        value, value - reach, value + reach, float(2.0 * stdtr(freedom, -abs(value / error))), freedom
    )
