"""The report of `compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import calib_lightning
from calib_lightning.comparison import text
from calib_lightning.comparison.averages import Averages, averages
from calib_lightning.comparison.beside import published_grids, published_remarks
from calib_lightning.comparison.items import Cost
from calib_lightning.comparison.tables import Key, Method, Pair, Table
from calib_lightning.metrics import RankComparison, average_ranks, compare_ranks
from calib_lightning.metrics.table import METRICS
from calib_lightning.predictions.long_table import to_csv
from calib_lightning.predictions.settings import Settings
from calib_lightning.predictions.tables import Grid, Report, settings_content
from calib_lightning.utils.published import PublishedTable

Cells = Mapping[tuple[str, ...], Mapping[str, Mapping[str, float]]]
"""Values by (data, network, method, calibrator, set), then seed, then metric."""


@dataclass(frozen=True, repr=False)
class Comparison(Report):
    """Results of `compare`.

    Attributes:
        tables: A table for each test set, with the methods, all pairs and marks; what figures need is in them.
        cells: The values of every network, by (data, network, method, calibrator, set) and seed, also of corruptions
            and of sets of other classes.
        costs: What the runs have cost.
        settings: Metrics, bins, intervals, level and seed.
        alpha: Largest adjusted p-value of a mark.
        exchanges: Number of random exchanges of rows.
        baseline: The method that the others are measured by.
        notes: Remarks.
        published: What the papers have, by the table beside which it is shown.
    """

    tables: list[Table]
    cells: Cells
    costs: list[Cost]
    settings: Settings
    alpha: float
    exchanges: int
    baseline: str | None
    notes: list[str]
    published: dict[Key, list[PublishedTable]] = field(default_factory=dict)

    def baseline_of(self, table: Table) -> Method | None:
        """The baseline in a table."""
        return next((method for method in table.methods if str(method) == self.baseline), None)

    def averages(self, over: list[str]) -> Averages:
        """Means of the values over ``"network"``, ``"set"`` or both, each first over seeds."""
        means = {
            key: {
                metric: sum(values[metric] for values in seeds.values()) / len(seeds)
                for metric in next(iter(seeds.values()))
                if all(metric in values for values in seeds.values())
            }
            for key, seeds in self.cells.items()
        }
        return averages(means, over)

    def ranks(self, metric: str) -> dict[Method, float]:
        """Average ranks, 1 is best, over the test sets; of methods that all of them have.

        Empty with fewer than two test sets or methods, or where no direction is better or a value is undefined.
        """
        methods, values = self._by_data(metric)
        if len(values) < 2 or len(methods) < 2:
            return {}
        return dict(zip(methods, average_ranks(values, "lower").tolist(), strict=True))

    def rank_comparison(self, metric: str) -> RankComparison:
        """The same with Friedman's test and the critical difference.

        Raises:
            ValueError: Fewer than five data sets, or several networks on one, whose ranks are not independent.
        """
        methods, values = self._by_data(metric)
        data = [table.key.data_name for table in self._tests()]
        if len(set(data)) < len(data):
            raise ValueError(
                "several tables are of the same data; a critical difference needs one for each data set. Compare the "
                "runs of one network."
            )
        return compare_ranks(values, "lower", list(map(str, methods)), data, self.settings.level)

    def _tests(self) -> list[Table]:
        return [table for table in self.tables if table.key.set == "test"]

    def _by_data(self, metric: str) -> tuple[list[Method], list[list[float]]]:
        tests = self._tests()
        shared = [one for one in (tests[0].methods if tests else ()) if all(one in table.methods for table in tests)]
        values = [[table.cost(metric, method) for method in shared] for table in tests]
        known = METRICS[metric.partition("@")[0]].better != "none" and not any(
            math.isnan(v) for row in values for v in row
        )
        return (shared, values) if known else ([], [])

    def grids(self) -> Iterator[Grid]:
        """The tables: methods by metric, differences, averages, ranks, cost."""
        for table in self.tables:
            yield text.values_grid(table, self.baseline_of(table), self.alpha)
            for beside in self.published.get(table.key, []):
                yield from published_grids(table, beside)
            if self.settings.intervals is not None:
                yield text.intervals_grid(table, self.settings.level)
            if table.pairs:
                baseline = self.baseline_of(table)
                if baseline is None or text.tells_of_seeds(table):
                    yield text.differences_grid(table, None, self.alpha)
                if baseline is not None:
                    yield text.differences_grid(table, baseline, self.alpha)
        yield from text.average_grids(self)
        yield from text.rank_grids(self)
        if self.costs:
            yield text.costs_grid(self.costs)

    def remarks(self) -> Iterator[str]:
        """What the marks mean, how it was computed, and the notes."""
        yield from text.legend(self)
        for table in self.tables:
            for note in table.notes:
                yield f"Note: {table.key.title or 'test'}: {note}."
        for note in self.notes:
            yield f"Note: {note}."
        yield from (f"Note: {note}" for note in text.left_out(self))
        for table in self.tables:
            for beside in self.published.get(table.key, []):
                yield from published_remarks(table, beside)

    def to_csv(self) -> str:
        """Return a line for each method and metric of each table, with the value of each seed."""
        return to_csv(self._records())

    def _records(self) -> Iterator[dict[str, object]]:
        for table in self.tables:
            baseline = self.baseline_of(table)
            for method, runs in table.methods.items():
                for metric, spread in runs.spreads.items():
                    best, interval = table.best(metric), runs.intervals.get(metric)
                    yield {
                        **dict(zip(("data", "network", "set"), table.key[:3], strict=True)),
                        "method": method.method,
                        "calibrator": method.calibrator,
                        "metric": metric,
                        "rows": table.rows,
                        "seeds": spread.runs,
                        "mean": spread.mean,
                        "std": spread.std,
                        "low": None if interval is None else interval.low,
                        "high": None if interval is None else interval.high,
                        "best": table.is_best(metric, method),
                        "worse_than_best": best is not None and table.is_worse(metric, method, best, self.alpha),
                        "worse_than_baseline": baseline is not None
                        and table.is_worse(metric, method, baseline, self.alpha),
                        **{f"seed {seed}": values.get(metric) for seed, values in runs.values.items()},
                    }

    def content(self) -> dict[str, Any]:
        """The report as plain data."""
        settings = settings_content(self.settings, "logits") | {
            "alpha": self.alpha,
            "exchanges": self.exchanges,
            "these_networks": "exchange of rows, all seeds together; adjusted by the largest statistic, step-down",
            "new_seeds": "Welch's t interval over seeds, an approximation; adjusted by Holm's method",
        }
        return {
            "calib_lightning": calib_lightning.__version__,
            "settings": settings,
            "baseline": self.baseline,
            "tables": [self._table_content(table) for table in self.tables],
            "values": [
                dict(zip(("data", "network", "method", "calibrator", "set"), key, strict=True)) | {"seeds": dict(seeds)}
                for key, seeds in self.cells.items()
            ],
            "averages": [self._averages_content(over) for over in text.averaged_over(self)],
            "ranks": {
                metric: {str(method): rank for method, rank in found.items()}
                for metric, found in text.ranks_of(self).items()
            },
            "costs": [
                cost.labels._asdict() | {name: value for name, value in cost._asdict().items() if name != "labels"}
                for cost in self.costs
            ],
            "notes": self.notes,
        }

    def _averages_content(self, over: list[str]) -> dict[str, Any]:
        found = self.averages(over)
        rows = [
            dict(zip(found.fields, key, strict=True)) | {"means": means, "counts": found.counts[key]}
            for key, means in found.rows.items()
        ]
        return {"over": over, "rows": rows, "left_out": [str(one) for one in found.left_out]}

    def _table_content(self, table: Table) -> dict[str, Any]:
        metrics = dict.fromkeys(key for runs in table.methods.values() for key in runs.spreads)
        best = {metric: table.best(metric) for metric in metrics}
        return table.key._asdict() | {
            "n": table.rows,
            "classes": table.classes,
            "methods": [
                method._asdict()
                | {
                    "seeds": runs.values,
                    "spreads": {key: spread._asdict() for key, spread in runs.spreads.items()},
                    "intervals": {key: [found.low, found.high] for key, found in runs.intervals.items()},
                }
                for method, runs in table.methods.items()
            ],
            "best": {metric: None if found is None else str(found) for metric, found in best.items()},
            "pairs": {
                metric: [_pair_content(pair, self.alpha) for pair in pairs] for metric, pairs in table.pairs.items()
            },
            "published": {
                beside.choice: {name: row._asdict() for name, row in beside.rows.items()}
                for beside in self.published.get(table.key, [])
            },
            "notes": table.notes,
        }


def _pair_content(pair: Pair, alpha: float) -> dict[str, Any]:
    return {
        "first": str(pair.first),
        "second": str(pair.second),
        "difference": pair.networks.value,
        "these_networks": {"p_value": pair.networks.p_value, "adjusted": pair.networks_adjusted},
        "new_seeds": pair.methods._asdict() | {"adjusted": pair.methods_adjusted},
        "marked": pair.is_marked(alpha),
    }
