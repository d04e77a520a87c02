"""`compare`: tables of methods over seeds, with marks that are more than chance."""

from __future__ import annotations

import math
from typing import Any

from calib_lightning.comparison.items import Item, source_of
from calib_lightning.comparison.report import Comparison
from calib_lightning.comparison.tables import Key, Method, Runs, Table, evaluated, fingerprint, table_of
from calib_lightning.metrics.resampling import check_count
from calib_lightning.predictions.others import corrupted_sets, ood_values
from calib_lightning.predictions.settings import parted
from calib_lightning.predictions.values import selected_metrics
from calib_lightning.utils.names import did_you_mean
from calib_lightning.utils.published import PublishedTable, published_table, tables_about

DEFAULT_EXCHANGES = 1000


def compare(
    runs: Any,
    *,
    baseline: str | None = None,
    published: str | None = None,
    alpha: float = 0.05,
    exchanges: int = DEFAULT_EXCHANGES,
    **options: Any,
) -> Comparison:
    """Compare methods over seeds: which is better, and is the difference real?

    Methods are compared on the same test set and the same splits, never across them. Two questions are asked of each
    pair and metric. *These networks*: would they differ on other rows? Rows are exchanged at random between the two
    methods, all seeds together, and p-values are adjusted for all pairs of the table by the largest statistic
    (`metrics.step_down_max`). *The methods on new seeds*: would other seeds give the same? Welch's interval over seeds,
    from three on, adjusted by Holm's method: an approximation. Only what both tell apart is marked.

    Args:
        runs: Folders of runs, or of a benchmark; or, without any training, predictions by method: for each a pair
            (logits ``(N, K)``, labels ``(N,)``) or a file, a list of them for several seeds, or a dict by seed.
        baseline: Method that the others are measured by. Default: that of the benchmark.
        published: Table of a paper to show beside, ``paper/table`` or ``paper/table/column``. Default: what the papers
            have of the same data, network and set; ``"none"`` for nothing.
        alpha: Largest adjusted p-value of a mark.
        exchanges: Number of random exchanges of rows.
        **options: ``metrics`` (default: core), ``bins``, ``intervals`` over rows, ``level`` and ``seed``, see
            `Settings`; for files ``input`` and the names of arrays, see `Reading`.

    Returns:
        The comparison, with ``tables``, ``table()``, ``to_markdown()``, ``to_latex()``, ``to_csv()`` and ``to_json()``.

    Raises:
        ValueError: A folder is no run, predictions are missing, two runs are the same, or an option is not allowed.
        OSError: A file cannot be read.

    Example:
        >>> import torch
        >>> labels = torch.arange(60) % 3
        >>> good, bad = torch.eye(3)[labels] * 4, torch.eye(3)[labels.roll(1)] * 2
        >>> report = compare({"good": (good, labels), "bad": (bad, labels)}, metrics="accuracy")
        >>> report.tables[0].best("accuracy")
        Method(method='good', calibrator='')
    """
    settings, reading = parted(options, {"metrics": "core"})
    selected_metrics(settings.metrics, classes=2)
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha is {alpha!r}; it must be between 0 and 1, such as 0.05.")
    check_count("exchanges", exchanges, math.ceil(1.0 / alpha) - 1)  # with fewer no p-value is as small as alpha
    asked = None if published in (None, "none") else published_table(str(published))
    source = source_of(runs, reading)
    notes = list(source.notes)
    grouped, sizes, cells = _evaluated(source.items, settings, notes)
    tables = [table_of(key, sizes[key], methods, settings, exchanges) for key, methods in grouped.items()]
    notes += _why_apart(tables)
    methods = list(dict.fromkeys(method for table in tables for method in table.methods))
    baseline = baseline or source.baseline
    if baseline is not None and baseline not in map(str, methods):
        if source.baseline != baseline:
            names = list(map(str, methods))
            near = did_you_mean(baseline, names)
            raise ValueError(f"baseline is {baseline!r}; it must be one of {', '.join(names)}.{near}")
        notes.append(f"the baseline {baseline} has no finished run: nothing is measured by it")
        baseline = None
    beside = {} if published == "none" else _published(tables, asked)
    return Comparison(
        tables, cells, source.costs, settings, alpha, exchanges, baseline, list(dict.fromkeys(notes)), beside
    )


_Grouped = dict[Key, dict[Method, Runs]]


def _evaluated(items: list[Item], settings: Any, notes: list[str]) -> tuple[_Grouped, dict[Key, tuple[int, int]], Any]:
    """Evaluate every network: those to compare by table, and the values of all, also on other sets, by seed."""
    grouped: _Grouped = {}
    sizes: dict[Key, tuple[int, int]] = {}
    cells: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    corrupted = corrupted_sets({item.set for item in items})
    for item in items:
        found, labels, seed = item.read(), item.labels, str(item.labels.seed)
        method = Method(labels.method, item.calibrator)
        cell = (labels.data, labels.network, *method, item.set)
        if item.set in corrupted:
            runs = Runs()
            remarks = evaluated(item, found, settings, runs, details=False)
            cells.setdefault(cell, {})[seed] = runs.values[seed]
        else:
            key = Key(labels.data, labels.network, item.set, fingerprint(found))
            sizes[key] = found.scores.shape[0], found.scores.shape[1]
            runs = grouped.setdefault(key, {}).setdefault(method, Runs())
            remarks = evaluated(item, found, settings, runs, details=True)
            cells.setdefault(cell, {})[seed] = runs.values[seed]
        for name, read in item.others.items():
            told = ood_values(found, {name: read()}, remarks)[name]
            cells.setdefault((*cell[:4], name), {})[seed] = told
        notes += [f"{method}: {note}" for note in remarks]
    return grouped, sizes, cells


def _published(tables: list[Table], asked: PublishedTable | None) -> dict[Key, list[PublishedTable]]:
    """What the papers have to be shown beside each table."""
    if asked is not None:
        return {table.key: [asked] for table in tables if table.key.set == "test"}
    about = {table.key: tables_about(table.key.data_name, table.key.network, table.key.set) for table in tables}
    return {key: [published_table(choice) for choice in choices] for key, choices in about.items() if choices}


def _why_apart(tables: list[Table]) -> list[str]:
    """Say why there are several tables of the same data, network and set."""
    titles = [table.key.title for table in tables]
    return [
        f"{title}: the test rows differ, hence separate tables"
        for title in dict.fromkeys(titles)
        if titles.count(title) > 1
    ]
