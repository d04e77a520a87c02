"""Scores and labels from CSV files: a column of labels and K columns of scores in class order."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calib_lightning.predictions.long_table import is_number

Holds = Literal["scores and labels", "scores", "labels"]

SKIPPED = ("id", "index")
"""Columns that are skipped; also a first column without a name, the index of pandas."""

_HOW = (
    "scores must be named 0, 1, 2, ... or z0, z1, z2, ... in class order; one column p is the probability of "
    "class 1 of two, one column z its logit."
)


def load_csv(path: Path, labels_key: str | None, holds: Holds) -> tuple[dict[str, Tensor], str]:
    """Read ``scores`` and, if present, ``labels``, ``confidence`` and ``p``; also describe the columns that were read.

    Labels are in the column ``labels_key`` (default: ``label``), or in the last column if there is no header.
    """
    first = _first_row(path)
    header = first if _is_header(path, first) else []
    skipped = {place for place, name in enumerate(header) if name in SKIPPED or (place == 0 and not name)}
    confidence = header.index("confidence") if "confidence" in header else None
    label = _label_column(path, header, labels_key, holds)
    rest = [place for place in range(len(first)) if place not in {*skipped, confidence, label}]
    if label is None and rest and holds != "scores":
        if header and len(rest) > 1:
            raise ValueError(
                f"{path}: no column of labels among {_quoted(header)}; name it 'label', set labels_key, or give the "
                "labels in another file"
            )
        label = rest.pop()
    if header and holds != "labels":
        fault = _unrecognised([header[place] for place in rest])
        if fault:
            raise ValueError(f"{path}: {fault}")
    table = numbers(path, 1 if header else 0, skipped)
    table = table if table.size else np.zeros((0, len(first)))
    if header and table.shape[1] != len(header):
        raise ValueError(f"{path}: the header has {len(header)} columns, but the rows have {table.shape[1]}.")
    content = {"scores": torch.from_numpy(table[:, rest])}
    if label is not None:
        content["labels"] = _whole(path, table[:, label])
    if confidence is not None:
        content["confidence"] = torch.from_numpy(table[:, confidence].copy())
    if header and [header[place] for place in rest] == ["p"]:
        content["p"] = content["scores"].squeeze(1)
    return content, _columns_read(header or range(1, len(first) + 1), rest, None if holds == "scores" else label)


def numbers(path: Path, header: int, unread: Collection[int] = ()) -> npt.NDArray[Any]:
    """Read numbers ``(rows, columns)``; columns in ``unread`` are 0."""
    with path.open(encoding="utf-8-sig") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input contained no data")
        try:
            return np.loadtxt(
                file,
                delimiter=",",
                skiprows=header,
                ndmin=2,
                comments=None,
                quotechar='"',
                converters={place: lambda _: 0.0 for place in unread} or None,
            )
        except ValueError as error:
            reason = (str(error).splitlines() or [""])[0].partition(";")[0].rstrip(".")
            raise ValueError(
                f"{path}: {reason} (rows are counted after the header); it must have comma-separated numbers, the "
                "same count in each row."
            ) from error


def _first_row(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = [cell.strip() for cell in next(csv.reader(file), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); it must be comma-separated UTF-8 text.") from error
    if not first:
        raise ValueError(f"{path} is empty; it must have rows of scores and a label, with or without a header.")
    if first[0].startswith("#"):  # numpy.savetxt writes its header as a comment
        first[0] = first[0].lstrip("# ")
    return first


def _is_header(path: Path, first: Sequence[str]) -> bool:
    if all(map(is_number, first)):
        return len(first) > 1 and list(first) == list(map(str, range(len(first))))  # as pandas numbers columns
    if any(cell and not is_number(cell) for cell in first):
        return True
    if len(first) > 1 and list(first) == ["", *map(str, range(len(first) - 1))]:
        return True
    raise ValueError(
        f"{path}: row 0, the first, has an empty cell in column {list(first).index('') + 1}; it must have a number in "
        "each cell, or be a header with a name for each column (the first may be empty: an index, which is skipped)."
    )


def _label_column(path: Path, header: list[str], wanted: str | None, holds: Holds) -> int | None:
    for name in [wanted] if wanted else ["label", "labels"]:
        if name in header:
            return header.index(name)
    if wanted and holds != "scores":
        held = _quoted(header) or "no header"
        raise ValueError(f"{path}: labels_key is {wanted!r}; it must be a column of the file, which has {held}.")
    return None


def _unrecognised(names: Sequence[str]) -> str:
    """Why columns are not the scores of classes 0, 1, ... in order; empty if they are."""
    if list(names) in (["p"], ["z"]):
        return ""
    parts = [re.fullmatch(r"(.*?)(\d+)", name) if _is_name(name) else None for name in names]
    first = next((part[1] for part in parts if part), None)
    extra = [name for name, part in zip(names, parts, strict=True) if part is None or part[1] != first]
    if extra:
        return f"unrecognised columns: {_quoted(extra)}; drop or rename them: {_HOW}"
    found = [int(part[2]) for part in parts if part]
    starts = (0, 1) if first else (0,)
    if found and (found[0] not in starts or found != list(range(found[0], found[0] + len(found)))):
        return f"columns of scores out of order or missing: {_quoted(names)}; {_HOW}"
    return ""


def _is_name(name: str) -> bool:
    return name.isdecimal() or not is_number(name)


def _columns_read(called: Sequence[str | int], scores: Sequence[int], label: int | None) -> str:
    if not scores:
        return ""
    ends = f"{called[scores[0]]!r} to {called[scores[-1]]!r}" if len(scores) > 1 else repr(called[scores[0]])
    of_labels = "" if label is None else f"; the labels are column {called[label]!r}"
    columns = f"{len(scores)} column{'s' if len(scores) > 1 else ''}"
    return f"the scores are {columns} of the file, {ends}{of_labels}"


def _quoted(names: Sequence[str]) -> str:
    shown = [repr(name) if name else "one without a name" for name in names]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "...", shown[-1]])


def _whole(path: Path, column: npt.NDArray[np.float64]) -> Tensor:
    broken = np.flatnonzero(~(np.isfinite(column) & (column == np.floor(column)) & (np.abs(column) < 2**53)))
    if len(broken):
        raise ValueError(
            f"{path}: row {broken[0]} has label {column[broken[0]]}; it must be a whole number. Labels are in the "
            "column 'label' or labels_key, or in the last one."
        )
    return torch.from_numpy(column.astype(np.int64))
