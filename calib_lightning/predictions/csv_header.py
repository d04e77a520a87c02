"""What the columns of a CSV file are, from its first row; without torch, so that a command can tell a fault at once."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from calib_lightning.predictions.long_table import is_number

Holds = Literal["scores and labels", "scores", "labels"]

SKIPPED = re.compile(r"id|index|Unnamed: \d+")
"""Columns that are skipped, as a first column without a name, the index of pandas, read back as `Unnamed: 0`."""

PROBABILITY = ("p", "prob", "proba", "probability")
"""Names of a single column that is the probability of class 1 of two."""

_GENERIC = (*PROBABILITY, "z", "score")

_OF_SCORES = (*_GENERIC, "logit", "output", "pred")
"""Names of numbered columns that say what the numbers are, not which class they belong to, without a plural s."""

_HOW = (
    "scores must be named 0, 1, 2, ... or z0, z1, z2, ... in class order, or all by the names of their classes; one "
    "column p is the probability of class 1 of two, one column z its logit."
)


class Columns(NamedTuple):
    """The columns of a file.

    Attributes:
        header: Their names; empty without a header.
        width: Their number.
        scores: Places of the scores, in the order of the classes.
        class_names: Names of the classes; of a single column, that of class 1. ``None`` if they are numbered from 0.
        label: Place of the labels.
        confidence: Place of the confidence.
        skipped: Places that are skipped.
        note: Which columns are read as what.
    """

    header: list[str]
    width: int
    scores: list[int]
    class_names: tuple[str, ...] | None
    label: int | None
    confidence: int | None
    skipped: list[int]
    note: str


def columns_of(path: Path, labels_key: str | None, holds: Holds) -> Columns:
    """Find the columns of a file: labels in ``labels_key`` (default: ``label``), or in the last without a header."""
    first = _first_row(path)
    header = first if _is_header(path, first) else []
    skipped = [place for place, name in enumerate(header) if SKIPPED.fullmatch(name) or (place == 0 and not name)]
    confidence = header.index("confidence") if "confidence" in header else None
    label = _label_column(path, header, labels_key, holds)
    rest = [place for place in range(len(first)) if place not in {*skipped, confidence, label}]
    if label is None and rest and holds != "scores":
        if header and len(rest) > 1:
            raise ValueError(
                f"{path}: no column of labels among {quoted(header)}; name it 'label', set labels_key, or give the "
                "labels in another file"
            )
        label = rest.pop()
    names = None
    if header and holds != "labels":
        order, names = classes_of([header[place] for place in rest], str(path))
        rest = [rest[place] for place in order]
    note = _columns_read(header or range(1, len(first) + 1), rest, None if holds == "scores" else label, names)
    return Columns(header, len(first), rest, names, label, confidence, skipped, note)


def classes_of(columns: Sequence[str], where: str) -> tuple[list[int], tuple[str, ...] | None]:
    """Order of the columns of scores, and the names of the classes; ``None`` if they are numbered from 0 in order."""
    places = list(range(len(columns)))
    if len(columns) == 1 and columns[0] in _GENERIC:
        return places, None
    parts = [re.fullmatch(r"(.*?)(\d+)", name) if _is_name(name) else None for name in columns]
    first = next((part[1] for part in parts if part), None)
    extra = [name for name, part in zip(columns, parts, strict=True) if part is None or part[1] != first]
    found = [int(part[2]) for part in parts if part and part[1] == first]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{where}: columns of scores of the same name: {quoted(columns)}; {_HOW}")
    if not extra and first == "":  # classes that are whole numbers, in their order
        places.sort(key=found.__getitem__)
        numbers = [found[place] for place in places]
        return places, None if numbers == list(range(len(numbers))) else tuple(map(str, numbers))
    if not extra:
        if found and (found[0] not in (0, 1) or found != list(range(found[0], found[0] + len(found)))):
            raise ValueError(f"{where}: columns of scores out of order or missing: {quoted(columns)}; {_HOW}")
        of_scores = (first or "").rstrip("_-. ").lower().removesuffix("s") in _OF_SCORES
        return places, None if of_scores else tuple(columns)  # scikit-learn calls classes class_0, class_1, ...
    numbered = first == "" or (len(found) > 1 and found == list(range(found[0], found[0] + len(found))))
    if numbered or not all(name and _is_name(name) for name in columns):
        raise ValueError(f"{where}: unrecognised columns: {quoted(extra)}; drop or rename them: {_HOW}")
    return places, tuple(columns)


def quoted(names: Sequence[str]) -> str:
    """Names in quotation marks, of many the first and the last."""
    shown = [repr(name) if name else "one without a name" for name in names]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:10], "...", shown[-1]])


DELIMITERS = {";": "semicolons", "\t": "tabs", ",": "commas"}


def delimiter_of(path: Path) -> str:
    """What separates the cells of the first line; a comma beside a semicolon is one of decimals."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline()
    return next((mark for mark in DELIMITERS if mark in line), ",")


def _first_row(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = [cell.strip() for cell in next(csv.reader(file, delimiter=delimiter_of(path)), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); it must be comma-separated UTF-8 text.") from error
    if not first:
        raise ValueError(f"{path} is empty; it must have rows of scores and a label, with or without a header.")
    if found := next((cell for cell in first if re.fullmatch(r"-?\d+,\d+", cell)), None):
        raise ValueError(
            f"{path}: row 0, the first, has {found!r}; it must have numbers or names. Write decimals with a point."
        )
    if first[0].startswith("#"):  # numpy.savetxt writes its header as a comment
        first[0] = first[0].lstrip("# ")
    return first


def _is_header(path: Path, first: Sequence[str]) -> bool:
    if all(map(is_number, first)):  # as pandas numbers columns, or scikit-learn classes from 1
        counted = [list(map(str, range(start, start + len(first)))) for start in (0, 1)]
        return len(first) > 1 and list(first) in counted[: len(first) - 1]
    if any(cell and not is_number(cell) for cell in first):
        return True
    if len(first) > 1 and not first[0] and all(cell.isdecimal() for cell in first[1:]):
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
        held = quoted(header) or "no header"
        raise ValueError(f"{path}: labels_key is {wanted!r}; it must be a column of the file, which has {held}.")
    return None


def _is_name(name: str) -> bool:
    return name.isdecimal() or not is_number(name)


def _columns_read(
    called: Sequence[str | int], scores: Sequence[int], label: int | None, names: tuple[str, ...] | None
) -> str:
    if not scores:
        return ""
    ends = f"{called[scores[0]]!r} to {called[scores[-1]]!r}" if len(scores) > 1 else repr(called[scores[0]])
    of_classes = "" if names is None else ", which are taken as the classes, in this order"
    if len(scores) == 1:
        of_classes = ", of class 1 of two" if names is None else f", of class {names[0]!r} of two"
    of_labels = "" if label is None else f"; the labels are column {called[label]!r}"
    columns = f"{len(scores)} column{'s' if len(scores) > 1 else ''}"
    return f"the scores are {columns} of the file, {ends}{of_classes}{of_labels}"
