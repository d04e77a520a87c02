"""The tables of the four papers: the commands and published figures of every cell, from ``configs/papers.yaml``."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from calib_lightning.utils.config_search import config_folders

INDEX = "papers.yaml"


class Where(NamedTuple):
    """Which cell: the names of paper, table, row (a method) and column (``data/network``)."""

    paper: str
    table: str
    row: str
    column: str


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        where: Which one.
        commands: The command lines that make the cell, in order.
        published: Value by figure, with its unit in the name; ``mean ± std`` is text. Empty where none was published.
        averaged: Whether the published values are averages over the networks.
        remarks: What the table shows, which epoch is evaluated, and what differs from the paper.
    """

    where: Where
    commands: tuple[str, ...]
    published: dict[str, float | str]
    averaged: bool
    remarks: tuple[str, ...]


def read_index() -> dict[str, Any]:
    """Read the index of the papers.

    Returns:
        By paper: its title, columns, rows and tables.

    Raises:
        FileNotFoundError: If there is no such file among the configurations.

    Example:
        >>> sorted(read_index())
        ['dark_side', 'mac_cal', 'neural_clamping', 'refcal']
    """
    for folder in config_folders():
        if (folder / INDEX).is_file():
            index: dict[str, Any] = yaml.safe_load((folder / INDEX).read_text(encoding="utf-8"))
            return index
    raise FileNotFoundError(f"{INDEX} is in none of {', '.join(map(str, config_folders()))}. Install the package anew.")


def tables(index: Mapping[str, Any], paper: str) -> list[str]:
    """Name the tables of a paper.

    Args:
        index: From `read_index`.
        paper: Name of the paper.

    Returns:
        Names, as in the index.

    Raises:
        ValueError: If the index has no such paper; the nearest names are in the message.
    """
    return list(_pick(index, paper, "paper")["tables"])


def rows_and_columns(index: Mapping[str, Any], paper: str, table: str) -> tuple[list[str], list[str]]:
    """Name the rows and columns of a table.

    Args:
        index: From `read_index`.
        paper: Name of the paper.
        table: Name of the table.

    Returns:
        Rows, columns.

    Raises:
        ValueError: If the index has no such paper or table; the nearest names are in the message.
    """
    known = _pick(index, paper, "paper")
    found = _pick(known["tables"], table, f"table of {paper}")
    return list(found.get("rows", known["rows"])), list(found.get("columns", known["columns"]))


def cell(index: Mapping[str, Any], paper: str, table: str, row: str, column: str, seed: int | None = None) -> Cell:
    """Find a cell and write its commands.

    Args:
        index: From `read_index`.
        paper: Name of the paper.
        table: Name of the table.
        row: Name of the row.
        column: Name of the column.
        seed: Trains with this seed, in a folder of its own; in papers that repeat the calibrators on one network it is
            the calibrators'. ``None`` takes the paper's.

    Returns:
        The cell.

    Raises:
        ValueError: If there is no such cell; the nearest names are in the message.

    Example:
        >>> found = cell(read_index(), "mac_cal", "table1", "flsd", "cifar100/resnet110")
        >>> found.published
        {'ECE %': 7.83}
    """
    rows, columns = rows_and_columns(index, paper, table)
    known, where = index[paper], f"of {paper} {table}"
    of_table = known["tables"][table]
    _pick(dict.fromkeys(rows), row, f"row {where}")
    _pick(dict.fromkeys(columns), column, f"column {where}")
    words = {**known, **of_table, **known["columns"][column], **known["rows"][row], "row": row, "column": column}
    trains = seed is not None and known.get("seeds") != "calibrators"
    if seed is not None:
        words |= {"seed": seed, **({"run": f"{words['run']}-seed{seed}"} if trains else {})}
    values = of_table["published"].get(row, {})
    data = column.partition("/")[0]
    lines = (_filled(template, words) for template in words["commands"])
    parts = (of_table, known["columns"][column], known["rows"][row])
    notes = [str(part["note"]) for part in parts if "note" in part]
    return Cell(
        Where(paper, table, row, column),
        tuple(_seeded(line, seed if trains else None) for line in lines if line is not None),
        dict(zip(of_table["figures"], values.get(column, values.get(data, ())), strict=False)),
        column not in values and data in values,
        (of_table["title"], f"evaluated epoch: {known['selects']}", *notes),
    )


def cells(index: Mapping[str, Any]) -> list[Cell]:
    """List every cell of every table.

    Args:
        index: From `read_index`.

    Returns:
        All cells.
    """
    return [
        cell(index, paper, table, row, column)
        for paper in index
        for table in tables(index, paper)
        for row in rows_and_columns(index, paper, table)[0]
        for column in rows_and_columns(index, paper, table)[1]
    ]


def _seeded(command: str, seed: int | None) -> str:
    return command if seed is None or not command.startswith("calib fit ") else f"{command} --seed_everything={seed}"


def _filled(template: str, words: Mapping[str, Any]) -> str | None:
    """Put words into a template until none is left; None where the cell lacks one, and so needs no such command."""
    line = template
    while re.search(r"(?<!\{)\{\w+\}(?!\})", line):
        try:
            line = re.sub(r"(?<!\{)\{(\w+)\}(?!\})", lambda found: str(words[found[1]]), line)
        except KeyError:
            return None
    return shlex.join(shlex.split(line.replace("{{", "{").replace("}}", "}")))


def _pick(known: Mapping[str, Any], name: str, what: str) -> Any:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f" The nearest: {', '.join(near)}." if near else ""
    raise ValueError(f"{what} is {name!r}; it must be one of {', '.join(known)}.{hint} calib paper lists them all.")
