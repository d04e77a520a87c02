"""The tables of a comparison as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from calib_lightning.comparison.items import Cost
from calib_lightning.comparison.tables import Method, Pair, Table
from calib_lightning.metrics import METRICS, over_seeds
from calib_lightning.metrics.ranks import FEWEST_DATA_SETS
from calib_lightning.predictions.latex import bold
from calib_lightning.predictions.others import corrupted_sets
from calib_lightning.predictions.tables import Grid, bins_title, cell, heading

if TYPE_CHECKING:
    from calib_lightning.comparison.report import Comparison

NOT_WORSE = "≈"
WORSE_MEAN = "†"
WORSE = "‡"


def metrics_of(table: Table) -> list[str]:
    """The metrics of a table, in the order of reports."""
    return list(dict.fromkeys(key for runs in table.methods.values() for key in runs.spreads))


def values_grid(table: Table, baseline: Method | None, alpha: float) -> Grid:
    """Mean and spread over seeds with marks: a row for each method, a column for each metric."""
    metrics = metrics_of(table)
    rows = []
    for method, runs in table.methods.items():
        cells = [_marked(table, metric, method, baseline, alpha) for metric in metrics]
        rows.append([method.method, method.calibrator or "-", str(len(runs.values)), *cells])
    title = f"{table.key.title or 'test'}: mean ± std over seeds, N = {table.rows:,}, K = {table.classes:,}"
    return Grid(title, ["method", "calibrator", "seeds", *map(heading, metrics)], rows)


def _marked(table: Table, metric: str, method: Method, baseline: Method | None, alpha: float) -> str:
    spread = table.methods[method].spreads[metric]
    text = cell(metric, spread.mean) + ("" if math.isnan(spread.std) else f" ± {cell(metric, spread.std)}")
    best = table.best(metric)
    if best is None or math.isnan(spread.mean):
        return text
    is_best = table.is_best(metric, method)
    worse = baseline is not None and table.is_worse(metric, method, baseline, alpha)
    # worse than the baseline is worse than the best, even if so few seeds cannot tell
    if not is_best and not worse and _can_be_marked(table, metric, method, best):
        text += "" if table.is_worse(metric, method, best, alpha) else f" {NOT_WORSE}"
    if baseline is not None and table.cost(metric, method) > table.cost(metric, baseline):
        text += f" {WORSE if worse else WORSE_MEAN}"
    return bold(text) if is_best else text


def _can_be_marked(table: Table, metric: str, method: Method, other: Method) -> bool:
    pair = table.pair(metric, method, other)
    return pair is not None and not math.isnan(pair.methods_adjusted)


def intervals_grid(table: Table, level: float) -> Grid:
    """Bootstrap intervals of the means over rows of the set."""
    metrics = metrics_of(table)
    rows = []
    for method, runs in table.methods.items():
        found = [runs.intervals.get(metric) for metric in metrics]
        cells = [
            "-" if one is None or math.isnan(one.low) else f"[{cell(metric, one.low)}, {cell(metric, one.high)}]"
            for metric, one in zip(metrics, found, strict=True)
        ]
        rows.append([method.method, method.calibrator or "-", *cells])
    title = f"{table.key.title or 'test'}: {100 * level:g} % bootstrap intervals of the means, over {table.rows:,} rows"
    return Grid(title, ["method", "calibrator", *map(heading, metrics)], rows)


def tells_of_seeds(table: Table) -> bool:
    """Whether there are seeds enough for the question about new seeds, of any two methods."""
    return any(not math.isnan(pair.methods_adjusted) for pairs in table.pairs.values() for pair in pairs)


def differences_grid(table: Table, baseline: Method | None, alpha: float) -> Grid:
    """Both questions, for each metric and method against the baseline, or else the best; one where seeds are few."""
    rows: list[list[str]] = []
    questions = None if tells_of_seeds(table) else 4
    for metric in table.pairs:
        other = baseline or table.best(metric)
        if other is None:
            continue
        rows.append([f"{heading(metric)}, from {other}" if baseline is None else heading(metric)])
        for method in table.methods:
            pair = None if method == other else table.pair(metric, method, other)
            if pair is not None:
                rows.append([str(method), *_pair_cells(metric, pair), _apart(pair, alpha)][:questions])
    what = f"from {baseline}" if baseline is not None else "from the best"
    header = ["method", "difference", "p networks", "p networks adj.", "new seeds", "p seeds", "p seeds adj.", "apart"]
    return Grid(f"{table.key.title or 'test'}: differences {what}", header[:questions], rows)


def _apart(pair: Pair, alpha: float) -> str:
    if math.isnan(pair.methods_adjusted):
        return "?"  # too few seeds
    return "yes" if pair.is_marked(alpha) else "no"


def _pair_cells(metric: str, pair: Pair) -> list[str]:
    networks, seeds = pair.networks, pair.methods
    interval = "-" if math.isnan(seeds.low) else f"[{cell(metric, seeds.low)}, {cell(metric, seeds.high)}]"
    return [
        _signed(metric, seeds.value),
        _p(networks.p_value),
        _p(pair.networks_adjusted),
        interval,
        _p(seeds.p_value),
        _p(pair.methods_adjusted),
    ]


def _signed(metric: str, value: float) -> str:
    return f"+{cell(metric, value)}" if value > 0 else cell(metric, value)


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def averaged_over(comparison: Comparison) -> list[list[str]]:
    """Over what values are averaged: sets and, where there are several, networks and both."""
    networks = {(key[0], key[1]) for key in comparison.cells}
    several = len(networks) > len({data for data, _ in networks})
    return [["set"], *([["network"], ["network", "set"]] if several else [])]


def average_grids(comparison: Comparison) -> Iterator[Grid]:
    """Means over sets of one family, over networks, and over both, where there are several."""
    corrupted = corrupted_sets(key[-1] for key in comparison.cells)
    for over in averaged_over(comparison):
        found = comparison.averages(over)
        by_metrics: dict[tuple[str, ...], list[list[str]]] = {}
        for key, values in found.rows.items():
            if key[-1] in corrupted:  # in the averages over sets
                continue
            counts = {count for count in found.counts[key].values() if count}
            cells = [cell(metric, value) for metric, value in values.items()]
            by_metrics.setdefault(tuple(values), []).append(
                [*(name or "-" for name in key), "/".join(map(str, sorted(counts))) or "0", *cells]
            )
        for metrics, rows in by_metrics.items():
            title = f"averages over {' and '.join(f'{name}s' for name in over)}, of means over seeds"
            yield Grid(title, [*found.fields, "averaged", *map(heading, metrics)], rows)


def left_out(comparison: Comparison) -> list[str]:
    """What the averages in the tables leave out."""
    corrupted = corrupted_sets(key[-1] for key in comparison.cells)
    every = [one for over in averaged_over(comparison) for one in comparison.averages(over).left_out]
    return list(dict.fromkeys(str(one) for one in every if one.table[-1] not in corrupted))


def ranks_of(comparison: Comparison) -> dict[str, dict[Method, float]]:
    """Average ranks by metric, where there are any."""
    tests = [table for table in comparison.tables if table.key.set == "test"]
    metrics = metrics_of(tests[0]) if tests else []
    return {metric: found for metric in metrics if (found := comparison.ranks(metric))}


def rank_grids(comparison: Comparison) -> Iterator[Grid]:
    """Average ranks over data sets."""
    tests = [table for table in comparison.tables if table.key.set == "test"]
    ranks = ranks_of(comparison)
    if not ranks:
        return
    methods = list(next(iter(ranks.values())))
    rows = [[str(method), *(f"{found[method]:.2f}" for found in ranks.values())] for method in methods]
    title = f"average ranks over {len(tests)} tables, 1 is best"
    try:
        limits = [comparison.rank_comparison(metric).critical_difference for metric in ranks]
        rows.append(["critical difference", *(f"{limit:.2f}" for limit in limits)])
    except ValueError:
        title += f"; no critical difference: it needs {FEWEST_DATA_SETS} data sets, each with one network"
    yield Grid(title, ["method", *map(heading, ranks)], rows)


def costs_grid(costs: Sequence[Cost]) -> Grid:
    """What the runs have cost, on average over seeds."""
    grouped: dict[tuple[str, ...], list[Cost]] = {}
    for cost in costs:
        grouped.setdefault((cost.labels.data, cost.labels.network, cost.labels.method), []).append(cost)
    stages = list(dict.fromkeys(stage for cost in costs for stage in cost.seconds))
    kinds = list(dict.fromkeys(kind for cost in costs for kind in cost.memory))
    rows = []
    for key, found in grouped.items():
        cells = [_mean([cost.seconds[stage] for cost in found if stage in cost.seconds]) for stage in stages]
        speeds = [cost.images_per_second for cost in found if cost.images_per_second is not None]
        memory = [_mean([cost.memory[kind] for cost in found if kind in cost.memory], 0) for kind in kinds]
        devices = ", ".join(dict.fromkeys(cost.device for cost in found))
        rows.append([*(name or "-" for name in key), *cells, _mean(speeds, 0), *memory, devices])
    header = ["data", "network", "method", *(f"{stage} s" for stage in stages), "images/s in training"]
    return Grid("cost, mean ± std over seeds", [*header, *(f"{kind} MiB" for kind in kinds), "device"], rows)


def _mean(values: Sequence[float], decimals: int = 1) -> str:
    if not values:
        return "-"
    spread = over_seeds(values)
    return f"{spread.mean:,.{decimals}f}" + ("" if math.isnan(spread.std) else f" ± {spread.std:,.{decimals}f}")


def legend(comparison: Comparison) -> Iterator[str]:
    """What the marks mean and how it was computed."""
    shown = [grid for table in comparison.tables for grid in table.pairs.values()]
    yield f"Bold (plain text: between stars): the best mean. {bins_title(comparison.settings)}."
    if shown:
        yield (
            f"{NOT_WORSE} not significantly worse than the best (alpha {comparison.alpha:g}). A difference is "
            "significant if both questions say so. These networks: rows exchanged between the two methods, all seeds "
            f"together, {comparison.exchanges:,} exchanges, adjusted for all pairs of table and metric by the largest "
            "statistic. The methods on new seeds: Welch's t over seeds (before and after a calibrator by seed), an "
            "approximation, adjusted by Holm's method."
        )
        for metric in next(iter(comparison.tables)).pairs:
            if METRICS[metric.partition("@")[0]].better == "zero":
                yield f"{heading(metric)}: compared by the mean over seeds of its distance from 0."
    if comparison.baseline is not None:
        yield f"{WORSE_MEAN} mean worse than that of {comparison.baseline}; {WORSE} significantly worse."
    if comparison.settings.intervals is not None:
        yield f"Intervals: {comparison.settings.intervals} resamples of the rows, the same ones for all networks."
