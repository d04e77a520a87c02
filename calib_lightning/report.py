"""Tables of results for people; figures come in as fractions and are shown in percent where that is usual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from calib_lightning.metrics import DIRECTION


class Column(NamedTuple):
    """How one metric is shown."""

    title: str
    percent: bool


COLUMNS: dict[str, Column] = {
    "accuracy": Column("accuracy %", True),
    "nll": Column("NLL", False),
    "brier": Column("Brier", False),
    "ece": Column("ECE %", True),
    "signed_gap": Column("signed gap %", True),
    "correctness_auroc": Column("correctness AUROC %", True),
}
"""The columns of a result table, in order; a key is the name of the metric's function."""

_ARROWS = {"higher": "↑", "lower": "↓", "zero": "→0"}


def results_by_set(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Sort logged values by the set they belong to: ``test/iid/ece`` is ``ece`` of ``iid``.

    Args:
        metrics: Logged values by key.

    Returns:
        For each set, its values by metric name; training values are left out.
    """
    sets: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        prefix, _, name = key.rpartition("/")
        if prefix and prefix != "train" and (name in COLUMNS or name == "n"):
            sets.setdefault(prefix.removeprefix("test/"), {})[name] = float(value)
    return sets


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """Make the table of a run: one row a set, one column a metric, an arrow in the better direction.

    Args:
        metrics: Logged values by key, fractions.
        title: What stands above the table.

    Returns:
        A table to print with rich.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    table.add_column("N", justify="right")
    for name, column in COLUMNS.items():
        table.add_column(f"{column.title} {_ARROWS[DIRECTION[name]]}", justify="right")
    for set_name, values in results_by_set(metrics).items():
        cells = [show(values.get(name, math.nan), column.percent) for name, column in COLUMNS.items()]
        table.add_row(set_name, f"{values.get('n', math.nan):,.0f}", *cells)
    return table


def show(value: float, percent: bool) -> str:
    """Show one figure: two decimals in percent, four otherwise, a dash where it is undefined."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if percent else f"{value:.4f}"


def print_table(metrics: Mapping[str, float], title: str) -> None:
    """Print the table of a run, as wide as it needs to be where the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(result_table(metrics, title))
