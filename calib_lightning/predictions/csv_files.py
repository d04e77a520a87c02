"""Scores and labels from CSV files: a column of labels and K columns of scores."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib_lightning.predictions.csv_header import DELIMITERS, PROBABILITY, Columns, Holds, columns_of, delimiter_of


class Table(NamedTuple):
    """A file as read.

    ``content`` has ``scores`` and, if present, ``confidence``, and ``p`` for a single column of probabilities;
    ``labels`` is the text of the labels, or ``None``.
    """

    columns: Columns
    content: dict[str, Tensor]
    labels: list[str] | None


def load_csv(path: Path, labels_key: str | None, holds: Holds) -> Table:
    """Read scores and labels; see `columns_of`."""
    columns = columns_of(path, labels_key, holds)
    header, label = columns.header, columns.label
    labels: list[str] = []
    texts: dict[int, Callable[[str], object]] = dict.fromkeys(columns.skipped, len)
    if label is not None:
        texts[label] = labels.append
    table = numbers(path, 1 if header else 0, texts, header)
    table = table if table.size else np.zeros((0, columns.width))
    if header and table.shape[1] != len(header):
        raise ValueError(f"{path}: the header has {len(header)} columns, but the rows have {table.shape[1]}.")
    content = {"scores": torch.from_numpy(table[:, columns.scores])}
    if columns.confidence is not None:
        content["confidence"] = torch.from_numpy(table[:, columns.confidence].copy())
    if header and len(columns.scores) == 1 and header[columns.scores[0]] in PROBABILITY:
        content["p"] = content["scores"].squeeze(1)
    return Table(columns, content, None if label is None else labels)


def numbers(
    path: Path, skipped_rows: int, texts: dict[int, Callable[[str], object]] | None = None, header: Collection[str] = ()
) -> npt.NDArray[Any]:
    """Read numbers ``(rows, columns)``; ``texts`` takes the cells of some columns, which are 0 in the result."""
    converters: dict[int | str, Any] = {place: _passed_to(take) for place, take in (texts or {}).items()}
    delimiter = delimiter_of(path)
    with path.open(encoding="utf-8-sig") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data")
        try:
            return np.loadtxt(
                file,
                delimiter=delimiter,
                skiprows=skipped_rows,
                ndmin=2,
                comments=None,
                quotechar='"',
                converters=converters or None,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {_why(str(error), list(header), delimiter)}") from error


def _passed_to(take: Callable[[str], object]) -> Callable[[str], float]:
    def convert(cell: str) -> float:
        take(cell.strip())
        return 0.0

    return convert


def _why(message: str, header: list[str], delimiter: str) -> str:
    """What numpy says of a cell, with the name of its column."""
    too_few = re.search(r"number of fields (\d+)", message) if header else None
    if too_few is not None:
        return f"the header has {len(header)} columns, but the rows have {too_few[1]}."
    cell = re.match(r"could not convert string (.*) to \w+ at row (\d+), column (\d+)", message, re.DOTALL)
    if cell is None:
        reason = (message.splitlines() or [""])[0].partition("; use ")[0].rstrip(".")
        return (
            f"{reason} (rows are counted after the header); it must have numbers separated by "
            f"{DELIMITERS[delimiter]}, the same count in each row."
        )
    found, row, column = cell[1], cell[2], int(cell[3])
    is_decimal = delimiter != "," and re.fullmatch(r"'-?\d+,\d+'", found)
    name = f" {header[column - 1]!r}" if column <= len(header) else ""
    what = "is empty" if found in ("''", '""') else f"has {found:.40}"
    return (
        f"column {column}{name} {what} in row {row} (rows are counted after the header); it must have a number in each "
        f"cell. {'Write decimals with a point' if is_decimal else 'Leave the row or the column out'}."
    )
