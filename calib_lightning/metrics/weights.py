"""Weights of rows: of resamples, of subsets, of random exchanges between two runs; metrics read many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from calib_lightning.metrics.row_table import RowTable, WeightedView
from calib_lightning.metrics.table import METRICS

_AT_ONCE = 2**19
"""How many weights are processed together: enough for vector code, few enough for the cache."""

_AT_ONCE_WITH_SCORES = 2**24

_CLASS_BINS_AT_ONCE = 2**22

Weights = Callable[[int], Iterator[Tensor]]
"""Yields the weights of all subsets in pieces ``(b, N)`` of at most the given size, the same ones each time."""


def read_weighted(table: RowTable, metrics: Sequence[str], weights: Weights) -> dict[str, Tensor]:
    """Values ``(B,)`` float64 of each metric on many subsets; nan where it is undefined."""
    # Metrics of all scores have a cost per piece, so their pieces are larger.
    from_scores = [key for key in metrics if "scores" in METRICS[key].parts]
    others = [key for key in metrics if key not in from_scores]
    parts: dict[str, list[Tensor]] = {key: [] for key in metrics}
    for keys, limit in ((others, _AT_ONCE), (from_scores, _AT_ONCE_WITH_SCORES)):
        at_once = limit // max(1, len(table))
        if any("classwise" in METRICS[key].parts for key in keys):
            at_once = min(at_once, _CLASS_BINS_AT_ONCE // (2 * table.num_classes * table.n_bins))
        for piece in weights(max(1, at_once)) if keys else ():
            view = WeightedView(table, piece)
            for key in keys:
                parts[key].append(METRICS[key].value(view))
    return {key: torch.cat(values) for key, values in parts.items()}


def resamples(rows: int, total: int, seed: int) -> Weights:
    """Draw rows with replacement; the weights count how often each row was drawn."""

    def pieces(at_once: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        one = torch.ones(1, dtype=torch.float64).expand(rows)
        for start in range(0, total, at_once):
            piece = torch.zeros(min(at_once, total - start), rows, dtype=torch.float64)
            for weights in piece:
                weights.scatter_add_(0, torch.randint(rows, (rows,), generator=generator), one)
            yield piece

    return pieces


def subsets(member: Tensor) -> Weights:
    """Weights 1 and 0 of the rows inside and outside of subsets ``(B, N)``."""

    def pieces(at_once: int) -> Iterator[Tensor]:
        for piece in torch.split(member, at_once):
            yield piece.double()

    return pieces


def stays(rows: int, total: int, seed: int) -> Weights:
    """Which rows stay where they are in random exchanges between two runs: 1 or 0; in the first one all."""

    def pieces(at_once: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, total + 1, at_once):
            piece = torch.empty(min(at_once, total + 1 - start), rows, dtype=torch.float64)
            for exchange, row in enumerate(piece, start):
                if exchange == 0:
                    row.fill_(1.0)
                else:
                    row.copy_(torch.rand(rows, generator=generator) < 0.5)
            yield piece

    return pieces


def exchanges(rows: int, total: int, seed: int) -> Weights:
    """Weights of random exchanges between two runs, for a table with the rows of the second below the first.

    Each exchange has two weightings, of the first and of the second run; the first exchange changes nothing.
    """

    def pieces(at_once: int) -> Iterator[Tensor]:
        for piece in stays(rows, total, seed)(max(1, at_once // 2)):
            kept = torch.cat([piece, 1.0 - piece], dim=1)
            yield torch.stack([kept, 1.0 - kept], dim=1).flatten(0, 1)

    return pieces
