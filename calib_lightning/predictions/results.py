"""The table of a run; values are fractions, shown in percent where that is usual."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from calib_lightning.metrics import CORE, OOD, OTHERS, SEVERITIES_SHOWN, SOFT, Family, families, mean_values
from calib_lightning.predictions.tables import cell, heading

SHARED = "validation and calibration are the same images"
"""Remark in the title of a table of a run whose split has ``share``."""
OOD_TITLE = "images of other classes, told from {} by the largest probability"
MEAN_OF_OTHERS = "mean of these"


def results_by_set(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Group logged values by set, without training values: ``shift/c/ece`` is ``ece`` of the set ``shift/c``."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        prefix, _, name = key.rpartition("/")
        if prefix and prefix != "train" and (name in CORE or name in SOFT or name in OOD or name in ("n", "sets")):
            sets.setdefault(prefix, {})[name] = float(value)
    return sets


class Line(NamedTuple):
    """A row of a table: its name, how many images or sets it is about, and the values."""

    name: str
    size: str
    values: Mapping[str, float]


def lines_of(sets: Mapping[str, Mapping[str, float]]) -> list[Line]:
    """Rows for sets: of the corruptions of one benchmark only some severities and the mean, each over all corruptions.

    Args:
        sets: The values of each set by name; ``n`` is its number of images.

    Returns:
        The rows; those of sets of other classes last.
    """
    grouped = {family.name: family for family in families(sets)}
    inside = {name for family in grouped.values() if family.name != OTHERS for name in family.members}
    lines: list[Line] = []
    others: list[Line] = []
    for name, values in sets.items():
        if name in inside or name in grouped:
            continue
        line = Line(name, f"{values['n']:,.0f}" if "n" in values else "", values)
        (others if name.startswith(f"{OTHERS}/") else lines).append(line)
    for family in grouped.values():
        if family.name == OTHERS:
            others.append(_mean_line(MEAN_OF_OTHERS, list(family.members), sets))
        else:
            lines += _lines_of_family(family, sets)
    return [*lines, *others]


def lines_of_corruptions(sets: Mapping[str, Mapping[str, float]]) -> list[Line]:
    """Only the rows of `lines_of` for corruptions.

    Args:
        sets: The values of each set by name.

    Returns:
        The rows.
    """
    return [line for family in families(sets) if family.name != OTHERS for line in _lines_of_family(family, sets)]


def _lines_of_family(family: Family, sets: Mapping[str, Mapping[str, float]]) -> list[Line]:
    lines = [
        _mean_line(f"{family.name}, severity {severity}", family.of_severity(severity), sets)
        for severity in SEVERITIES_SHOWN
        if severity in family.severities
    ]
    return [*lines, _mean_line(f"{family.name}, mean", list(family.members), sets)]


def _mean_line(name: str, members: Sequence[str], sets: Mapping[str, Mapping[str, float]]) -> Line:
    count = f"{len(members)} set{'s'[: len(members) > 1]}"
    return Line(name, count, mean_values([sets[member] for member in members]))


def result_tables(metrics: Mapping[str, float], title: str) -> list[Table]:
    """Tables of a run from logged values: a row per set, a column per metric, an arrow in the better direction.

    Sets of other classes have a table of their own.
    """
    lines = lines_of(results_by_set(metrics))
    others = [line for line in lines if any(key in line.values for key in OOD)]
    own = [line for line in lines if line not in others]
    keys = [*CORE, *(key for key in SOFT if any(key in line.values for line in own))]
    tables = [_table(title, own, keys)]
    if others:
        tables.append(_table(OOD_TITLE.format("test"), others, list(OOD)))
    return tables


def _table(title: str, lines: Sequence[Line], keys: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    table.add_column("N", justify="right")
    for key in keys:
        table.add_column(heading(key), justify="right")
    for line in lines:
        table.add_row(line.name, line.size, *(cell(key, line.values.get(key, math.nan)) for key in keys))
    return table


def print_table(metrics: Mapping[str, float], title: str) -> None:
    """Print the tables of a run, 160 characters wide if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for table in result_tables(metrics, title):
        console.print(table)
