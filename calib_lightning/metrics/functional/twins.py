"""What the public functions ``x(logits, labels)`` share: check the rows, and read a value from their bins or order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.undefined import checked_result

# The functions call these rather than being made by a factory: each keeps a signature and a docstring of its own.


def of_bins(
    name: str,
    value: Callable[[Tensor], Tensor],
    n_bins: int,
    logits: Tensor,
    labels: Tensor,
    confidence: Tensor | None,
    input: InputKind,
) -> Tensor:
    """The value of sums ``(M, 3)`` in equal-width bins; nan, with a warning, where it is undefined."""
    rows = checked_rows(name, logits, labels, confidence, input)
    return checked_result(name, value(bin_sums(rows.confidence, rows.correct, n_bins)), len(labels), stacklevel=4)


def of_ordered(
    name: str,
    value: Callable[[Ordered], Tensor],
    logits: Tensor,
    labels: Tensor,
    confidence: Tensor | None,
    input: InputKind,
) -> Tensor:
    """The value of rows in the order of their confidence; nan, with a warning, where it is undefined."""
    rows = checked_rows(name, logits, labels, confidence, input)
    return checked_result(name, value(order_rows(rows.log_odds, rows.correct)), len(labels), stacklevel=4)
