"""The table of a run; values are fractions, shown in percent where that is usual."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from calib_lightning.metrics import CORE, SOFT
from calib_lightning.predictions.tables import cell, heading

SHARED = "validation and calibration are the same images"
"""Remark in the title of a table of a run whose split has ``share``."""


def results_by_set(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Group logged values by set, without training values: ``shift/c/ece`` is ``ece`` of the set ``shift/c``."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        prefix, _, name = key.rpartition("/")
        if prefix and prefix != "train" and (name in CORE or name in SOFT or name == "n"):
            sets.setdefault(prefix, {})[name] = float(value)
    return sets


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """Table of a run from logged values: a row per set, a column per metric, an arrow in the better direction."""
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    table.add_column("N", justify="right")
    sets = results_by_set(metrics)
    keys = [*CORE, *(key for key in SOFT if any(key in values for values in sets.values()))]
    for key in keys:
        table.add_column(heading(key), justify="right")
    for set_name, values in sets.items():
        cells = [cell(key, values.get(key, math.nan)) for key in keys]
        table.add_row(set_name, f"{values.get('n', math.nan):,.0f}", *cells)
    return table


def print_table(metrics: Mapping[str, float], title: str) -> None:
    """Print the table of a run, 160 characters wide if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(result_table(metrics, title))
