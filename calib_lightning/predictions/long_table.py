"""Values as one long table in CSV, a row for each record."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real


def to_csv(records: Iterable[Mapping[str, object]]) -> str:
    r"""Return records as CSV (RFC 4180, but lines end with ``\n``).

    Columns are in order of first appearance. Numbers have full precision; what is undefined (nan, ``None``, or not in
    the record) is empty, what is infinite ``inf`` or ``-inf``. Text that a spreadsheet would take for a formula, since
    it begins with ``= + - @`` and is no number, gets an apostrophe in front.

    Args:
        records: Values by column: text, numbers, ``True``, ``False`` or ``None``.

    Returns:
        The header and one line for each record; nothing without records.

    Raises:
        ValueError: A value is anything else.

    Example:
        >>> print(to_csv([{"method": "mixup", "ece": 0.1}, {"method": "focal", "ece": float("nan")}]), end="")
        method,ece
        mixup,0.1
        focal,
    """
    rows = list(records)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return ""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_safe(column) for column in columns])
    for row in rows:
        writer.writerow([_text(column, row.get(column)) for column in columns])
    return buffer.getvalue()


def _text(column: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return _safe(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return "" if math.isnan(value) else repr(float(value))
    raise ValueError(f"{column} is {value!r}; it must be text, a number, True, False or None. Convert it first.")


def _safe(text: str) -> str:
    """Text that no spreadsheet takes for a formula, and without returns, which some versions of csv do not quote."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) and not is_number(text) else text


def is_number(text: str) -> bool:
    """Whether text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
