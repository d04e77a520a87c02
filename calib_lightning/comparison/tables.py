"""The tables of a comparison: each of one test set, with its methods, their differences and marks."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from calib_lightning.comparison.items import Item
from calib_lightning.comparison.labels import SPLITS
from calib_lightning.metrics import (
    METRICS,
    Difference,
    EvaluationState,
    Interval,
    SeedDifference,
    Spread,
    bootstrap_intervals,
    holm,
    over_new_seeds,
    step_down_max,
)
from calib_lightning.metrics.exchange import differences, in_own_spread, standard_errors
from calib_lightning.metrics.resampling import difference_of
from calib_lightning.metrics.row_table import RowTable
from calib_lightning.metrics.spread import FEWEST_SEEDS
from calib_lightning.predictions.reading import Predictions
from calib_lightning.predictions.seeds import spreads_of
from calib_lightning.predictions.settings import Settings
from calib_lightning.predictions.values import merged, states_of, values_of

_RESAMPLES = 200
"""Of the rows, for standard errors of differences."""


class Key(NamedTuple):
    """What a table is about; methods are compared within it alone."""

    data: str
    network: str
    set: str
    rows: str = ""

    @property
    def title(self) -> str:
        """Data, network and set."""
        return ", ".join(name for name in (self.data, self.network, self.set) if name)

    @property
    def data_name(self) -> str:
        """The data, whatever their splits."""
        return self.data.partition(SPLITS)[0]


class Method(NamedTuple):
    """A row of a table: a method, perhaps with a calibrator."""

    method: str
    calibrator: str = ""

    def __str__(self) -> str:
        """Both, with a plus between them."""
        return f"{self.method} + {self.calibrator}" if self.calibrator else self.method


@dataclass
class Runs:
    """A method's networks on a set: values by seed, their spreads, and intervals over the rows of the set."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    states: list[dict[str, EvaluationState]] = field(default_factory=list)
    spreads: dict[str, Spread] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)


class Pair(NamedTuple):
    """How two methods differ in a metric; differences are the first's values minus the second's.

    Attributes:
        first: The first method.
        second: The second method.
        networks: These networks on other rows: their difference with the p-value of random exchanges of rows.
        networks_adjusted: That p-value, adjusted for all pairs of the table.
        methods: The methods on new seeds, an approximation.
        methods_adjusted: Its p-value, adjusted for all pairs of the table.
    """

    first: Method
    second: Method
    networks: Difference
    networks_adjusted: float
    methods: SeedDifference
    methods_adjusted: float

    def turned(self) -> Pair:
        """The same with the methods in the other order."""
        value, low, high, p_value, freedom = self.methods
        other = SeedDifference(0.0 - value, 0.0 - high, 0.0 - low, p_value, freedom)
        return Pair(
            self.second,
            self.first,
            self.networks._replace(value=0.0 - self.networks.value),
            self.networks_adjusted,
            other,
            self.methods_adjusted,
        )

    def is_marked(self, alpha: float) -> bool:
        """Whether both questions tell the methods apart, in the same direction."""
        agree = self.networks.value * self.methods.value > 0.0  # not of the same seeds if their numbers differ
        return agree and self.networks_adjusted <= alpha and self.methods_adjusted <= alpha


@dataclass(frozen=True)
class Table:
    """Methods on one set.

    Attributes:
        key: What it is about.
        rows: Number of rows N; 0 of a mean over sets.
        classes: Number of classes K.
        methods: The methods with their values.
        pairs: For each metric the pairs of methods; empty where methods were not tested.
        notes: Remarks.
    """

    key: Key
    rows: int
    classes: int
    methods: dict[Method, Runs]
    pairs: dict[str, list[Pair]]
    notes: list[str]

    def pair(self, metric: str, first: Method, second: Method) -> Pair | None:
        """Two methods in a metric, in this order."""
        for found in self.pairs.get(metric, []):
            if (found.first, found.second) == (first, second):
                return found
            if (found.first, found.second) == (second, first):
                return found.turned()
        return None

    def cost(self, metric: str, method: Method) -> float:
        """The mean over seeds so that a smaller number is better: of what is best at 0 the mean distance from it."""
        better = METRICS[metric.partition("@")[0]].better
        values = [found.get(metric, math.nan) for found in self.methods[method].values.values()]
        signed = [abs(value) if better == "zero" else -value if better == "higher" else value for value in values]
        return sum(signed) / len(signed)

    def best(self, metric: str) -> Method | None:
        """The method with the best mean over seeds; ``None`` where no direction is better, or nothing is defined."""
        if METRICS[metric.partition("@")[0]].better == "none":
            return None
        costs = {method: self.cost(metric, method) for method in self.methods}
        defined = {method: cost for method, cost in costs.items() if not math.isnan(cost)}
        return min(defined, key=defined.__getitem__) if defined else None

    def is_best(self, metric: str, method: Method) -> bool:
        """Whether no other method has a better mean."""
        best = self.best(metric)
        return best is not None and (method == best or self.cost(metric, method) == self.cost(metric, best))

    def is_worse(self, metric: str, method: Method, other: Method, alpha: float) -> bool:
        """Whether a method is significantly worse than another."""
        pair = self.pair(metric, method, other)
        return pair is not None and pair.is_marked(alpha) and self.cost(metric, method) > self.cost(metric, other)


def fingerprint(predictions: Predictions) -> str:
    """What tells test sets apart: their labels in their order."""
    classes = predictions.scores.shape[1]
    return hashlib.sha256(predictions.labels.numpy().tobytes() + str(classes).encode()).hexdigest()[:12]


def evaluated(item: Item, predictions: Predictions, settings: Settings, runs: Runs, *, details: bool) -> list[str]:
    """Evaluate a network into the runs of its method; return notes."""
    states = states_of(settings, predictions, details)
    values, notes = values_of(replace(settings, intervals=None), states, predictions)
    seed = str(item.labels.seed)
    if seed in runs.values:
        raise ValueError(f"{item.where} is a second run of {item.labels.method} with seed {seed}. Give one of them.")
    runs.values[seed] = values.values
    if details:
        runs.states.append(states)
    return notes


def table_of(key: Key, size: tuple[int, int], methods: dict[Method, Runs], settings: Settings, exchanges: int) -> Table:
    """Summarise methods over seeds, and compare each with each.

    Args:
        key: What the table is about.
        size: Number of rows and of classes.
        methods: The evaluated methods; those without states are only summarised.
        settings: Level, seed and intervals.
        exchanges: Number of random exchanges.

    Returns:
        The table.
    """
    notes: list[str] = []
    for method, runs in methods.items():
        runs.spreads = spreads_of(runs.values, settings.level)
        if len(runs.values) > 1 and all(spread.std == 0.0 for spread in runs.spreads.values()):
            notes.append(f"{method}: all seeds have equal values; are they the same predictions?")
        if settings.intervals is not None and runs.states:
            draw = (settings.intervals, settings.level, settings.seed)
            ends = runs.states[0]
            runs.intervals = merged(
                {end: bootstrap_intervals([one[end] for one in runs.states], *draw) for end in ends}
            )
    tested = {method: runs for method, runs in methods.items() if runs.states}
    enough = {method: runs for method, runs in tested.items() if len(runs.values) >= FEWEST_SEEDS}
    if 1 < len(enough) < len(tested):
        left_out = ", ".join(str(method) for method in tested if method not in enough)
        notes.append(f"{left_out}: fewer than {FEWEST_SEEDS} seeds, so not compared with the others")
        tested = enough
    pairs = _pairs(tested, settings, exchanges, notes) if len(tested) > 1 else {}
    for runs in methods.values():
        runs.states.clear()  # the rows of every network
    return Table(key, *size, methods, pairs, notes)


def _pairs(
    methods: Mapping[Method, Runs], settings: Settings, exchanges: int, notes: list[str]
) -> dict[str, list[Pair]]:
    seeds = _seeds_in_common(methods, notes)
    names = list(methods)
    drawn: dict[str, torch.Tensor] = {}
    errors: dict[str, torch.Tensor] = {}
    for end in next(iter(methods.values())).states[0]:
        blocks = []
        for method, runs in methods.items():
            by_seed = dict(zip(runs.values, runs.states, strict=True))
            blocks.append([RowTable.of(by_seed[seed][end]) for seed in seeds[method]])
        metrics = [key for key in next(iter(methods.values())).states[0][end].metrics if METRICS[key].better != "none"]
        found = differences(blocks, metrics, exchanges, settings.seed, distance=True)
        drawn |= {key + end: values for key, values in found.items()}
        spreads = standard_errors(blocks, metrics, _RESAMPLES, settings.seed, distance=True)
        errors |= {key + end: values for key, values in spreads.items()}
    pairs: dict[str, list[Pair]] = {}
    for key, values in drawn.items():
        adjusted = step_down_max(in_own_spread(values, errors[key])).tolist()
        raw = [difference_of(one) for one in values]
        zero = METRICS[key.partition("@")[0]].better == "zero"
        by_method = {
            method: [abs(found[key]) if zero else found[key] for found in runs.values.values()]
            for method, runs in methods.items()
        }
        both = list(itertools.combinations(names, 2))
        over = [_on_new_seeds(one, other, by_method, methods, settings.level) for one, other in both]
        of_methods = holm([found.p_value for found in over])
        results = zip(both, raw, adjusted, over, of_methods, strict=True)
        pairs[key] = [Pair(*two, drawn_p, its, new, its_new) for two, drawn_p, its, new, its_new in results]
    return pairs


def _on_new_seeds(
    one: Method, other: Method, values: Mapping[Method, list[float]], runs: Mapping[Method, Runs], level: float
) -> SeedDifference:
    """Paired if both are of the same networks, one with a calibrator."""
    same = one.method == other.method and list(runs[one].values) == list(runs[other].values)
    return over_new_seeds(values[one], values[other], level, paired=same)


def _seeds_in_common(methods: Mapping[Method, Runs], notes: list[str]) -> dict[Method, Sequence[str]]:
    """As many seeds of each method: those that all have, else the first ones."""
    every = {method: list(runs.values) for method, runs in methods.items()}
    fewest = min(map(len, every.values()))
    shared = [seed for seed in next(iter(every.values())) if all(seed in seeds for seeds in every.values())]
    chosen: dict[Method, Sequence[str]] = {
        method: shared if len(shared) >= fewest else seeds[:fewest] for method, seeds in every.items()
    }
    if any(len(seeds) != fewest for seeds in every.values()):
        counts = ", ".join(f"{method} {len(seeds)}" for method, seeds in every.items())
        notes.append(
            f"the methods have different numbers of seeds ({counts}): rows are exchanged between {fewest} of each; "
            "means, spreads and new seeds use all"
        )
    if fewest < FEWEST_SEEDS:
        notes.append(
            f"≈ and ‡ need {FEWEST_SEEDS} seeds of each method: with {fewest} there is no telling what other seeds "
            "would give; p-values of these networks are in the table of differences"
        )
    return chosen
