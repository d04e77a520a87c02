"""The one warning of a metric that is not defined on the given rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def why_undefined(rows: int, correct: int | None = None) -> str:
    """Say what about a set makes metrics undefined.

    Args:
        rows: Number of rows.
        correct: Number of correct predictions (of positive rows), where it is known.

    Returns:
        A clause for a warning.
    """
    if rows == 0:
        return "no rows were given"
    if correct == rows:
        return f"all {rows} rows are correct (positive), and wrong ones are needed too"
    if correct == 0:
        return f"all {rows} rows are wrong (negative), and correct ones are needed too"
    return f"these {rows} rows do not define it (a risk that is never reached, or labels of one class)"


def undefined_keys(values: Mapping[str, Tensor]) -> list[str]:
    """Keys of the 0-d values that are nan."""
    return [key for key, value in values.items() if bool(value.isnan())]


def warn_undefined(who: str, names: Sequence[str], reason: str, stacklevel: int = 3) -> None:
    """Warn once about all undefined values of a computation.

    Args:
        who: Name of the function or class.
        names: The undefined values; empty for "the result".
        reason: What `why_undefined` says.
        stacklevel: As in `warnings.warn`.
    """
    what = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} nan" if names else "the result is nan"
    warnings.warn(f"{who}: {reason}; {what}", stacklevel=stacklevel + 1)


def checked_result(who: str, value: Tensor, rows: int, correct: int | None = None) -> Tensor:
    """Return a value, with a warning if it is nan.

    Args:
        who: Name of the function.
        value: 0-d.
        rows: Number of rows.
        correct: Number of correct (positive) rows, where it is known.

    Returns:
        The value.
    """
    if bool(torch.isnan(value)):
        warn_undefined(who, (), why_undefined(rows, correct), stacklevel=3)
    return value
