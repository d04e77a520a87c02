"""The tables of the four papers: commands and published values of every cell, from ``configs/papers.yaml``."""

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
    """A cell: the names of paper, table, row (a method) and column (``data/network``)."""

    paper: str
    table: str
    row: str
    column: str


@dataclass(frozen=True)
class Cell:
    """One cell of a table, with the command lines that reproduce it.

    ``published`` maps metrics, with units, to values (``mean ± std`` is text); ``averaged``: over the networks.
    ``remarks`` describe the table, the evaluated epoch, and deviations from the paper.
    """

    where: Where
    commands: tuple[str, ...]
    published: dict[str, float | str]
    averaged: bool
    remarks: tuple[str, ...]


def read_index(*, as_text: bool = False) -> dict[str, Any]:
    """Read the index: title, columns, rows and tables by paper; ``as_text`` keeps numbers as they are written."""
    loader = yaml.BaseLoader if as_text else yaml.SafeLoader
    for folder in config_folders():
        if (folder / INDEX).is_file():
            index: dict[str, Any] = yaml.load((folder / INDEX).read_text(encoding="utf-8"), loader)
            return index
    raise FileNotFoundError(f"{INDEX} is not in any of {', '.join(map(str, config_folders()))}. Reinstall the package.")


def tables(index: Mapping[str, Any], paper: str) -> list[str]:
    """Names of the tables of a paper."""
    return list(pick(index, paper, "paper")["tables"])


def rows_and_columns(index: Mapping[str, Any], paper: str, table: str) -> tuple[list[str], list[str]]:
    """Names of the rows and columns of a table."""
    known = pick(index, paper, "paper")
    found = pick(known["tables"], table, f"table of {paper}")
    return list(found.get("rows", known["rows"])), list(found.get("columns", known["columns"]))


def cell(index: Mapping[str, Any], paper: str, table: str, row: str, column: str, seed: int | None = None) -> Cell:
    """Return a cell with its commands.

    ``seed`` trains with that seed in a separate folder; in papers that repeat the calibrators on one network, it is the
    seed of the calibrators. ``None`` uses the paper's.
    """
    rows, columns = rows_and_columns(index, paper, table)
    known, where = index[paper], f"of {paper} {table}"
    of_table = known["tables"][table]
    pick(dict.fromkeys(rows), row, f"row {where}")
    pick(dict.fromkeys(columns), column, f"column {where}")
    words = words_of(index, paper, table, row, column)
    trains = seed is not None and known.get("seeds") != "calibrators"
    if seed is not None:
        words |= {"seed": seed, **({"run": f"{words['run']}-seed{seed}"} if trains else {})}
    values = of_table["published"].get(row, {})
    data = column.partition("/")[0]
    lines = (filled(template, words) for template in words["commands"])
    parts = (of_table, known["columns"][column], known["rows"][row])
    notes = [str(part["note"]) for part in parts if "note" in part]
    return Cell(
        Where(paper, table, row, column),
        tuple(_seeded(shlex.join(shlex.split(line)), seed if trains else None) for line in lines if line is not None),
        dict(zip(of_table["metrics"], values.get(column, values.get(data, ())), strict=False)),
        column not in values and data in values,
        (of_table["title"], f"evaluated epoch: {known['selects']}", *notes),
    )


def cells(index: Mapping[str, Any]) -> list[Cell]:
    """All cells of all tables."""
    return [
        cell(index, paper, table, row, column)
        for paper in index
        for table in tables(index, paper)
        for row in rows_and_columns(index, paper, table)[0]
        for column in rows_and_columns(index, paper, table)[1]
    ]


def _seeded(command: str, seed: int | None) -> str:
    return command if seed is None or not command.startswith("calib fit ") else f"{command} --seed_everything={seed}"


def words_of(index: Mapping[str, Any], paper: str, table: str, row: str, column: str) -> dict[str, Any]:
    """The words that templates of a cell look up: those of the row, then the column, the table and the paper."""
    known = index[paper]
    parts = (known, known["tables"][table], known["columns"][column], known["rows"][row])
    return {key: value for part in parts for key, value in part.items()} | {"row": row, "column": column}


def filled(template: str, words: Mapping[str, Any]) -> str | None:
    """Substitute words into a template; ``None`` if the cell lacks one and so does not need the command."""
    line = template
    while re.search(r"(?<!\{)\{\w+\}(?!\})", line):
        try:
            line = re.sub(r"(?<!\{)\{(\w+)\}(?!\})", lambda found: str(words[found[1]]), line)
        except KeyError:
            return None
    return line.replace("{{", "{").replace("}}", "}")


def pick(known: Mapping[str, Any], name: str, what: str) -> Any:
    """What a name stands for; ``ValueError`` with the nearest names if it is unknown."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f" The nearest: {', '.join(near)}." if near else ""
    raise ValueError(f"{what} is {name!r}; it must be one of {', '.join(known)}.{hint} `calib paper` lists all names.")
