"""The one warning about a metric that is undefined on the given rows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def why_undefined(rows: int, correct: int | None = None) -> str:
    """The clause of a warning: what makes metrics undefined on a set."""
    if rows == 0:
        return "no rows were given"
    if correct == rows:
        return f"all {rows} rows are correct (positive); wrong rows are needed too"
    if correct == 0:
        return f"all {rows} rows are wrong (negative); correct rows are needed too"
    return f"these {rows} rows do not define it (a risk that is never reached, or labels of one class)"


def undefined_keys(values: Mapping[str, Tensor]) -> list[str]:
    """Keys of the 0-d values that are nan."""
    return [key for key, value in values.items() if bool(value.isnan())]


def warn_undefined(who: str, names: Sequence[str], reason: str, stacklevel: int = 3) -> None:
    """Warn once about all undefined values of a computation; without names, about "the result"."""
    what = f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} nan" if names else "the result is nan"
    warnings.warn(f"{who}: {reason}; {what}", stacklevel=stacklevel + 1)


def checked_result(who: str, value: Tensor, rows: int, correct: int | None = None, stacklevel: int = 3) -> Tensor:
    """The 0-d value, with a warning if it is nan."""
    if bool(torch.isnan(value)):
        warn_undefined(who, (), why_undefined(rows, correct), stacklevel=stacklevel)
    return value
