"""Random exchanges of rows between runs: how their values differ, for all pairs of several methods at once.

In an exchange each row is a coin toss: the predictions of two runs for it are exchanged or stay. The tosses are the
same for all pairs and for all seeds of a method. What is a sum over rows is read once for each run: of the first run of
a pair it is then its own sum over the rows that stay plus the other's over those that do not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.ordered import group_ends
from calib_lightning.metrics.row_table import RowTable, SumsView
from calib_lightning.metrics.table import METRICS
from calib_lightning.metrics.weights import exchanges, read_weighted, resamples, stays

ROUNDING = 1e-14
"""What sums in another order may differ by, of values around 1."""

_AT_ONCE = 2**25
_OF_ROWS_TOGETHER = {"ranks", "fine_bins", "classwise", "scores"}

_Both = dict[str, tuple[Tensor, ...]]
"""Values ``(B,)`` of the two runs of a pair, by metric."""


def differences(
    methods: Sequence[Sequence[RowTable]], metrics: Sequence[str], total: int, seed: int, *, distance: bool = False
) -> dict[str, Tensor]:
    """Differences between methods after random exchanges of rows; the whole block of seeds is exchanged together.

    Args:
        methods: The rows of each run, by method and seed; as many seeds for each, all with the same labels.
        metrics: Keys of metrics.
        total: Number of exchanges.
        seed: Seed of the exchanges.
        distance: Whether a metric whose best value is 0 counts by its distance from it.

    Returns:
        For each metric the mean over seeds of the first method's value minus the second's, ``(pairs, 1 + total)``
        float64, for the pairs of `itertools.combinations`; in the first column nothing is exchanged.
    """
    pairs = list(itertools.combinations(range(len(methods)), 2))
    rows = len(methods[0][0])
    shared = sorted(set.intersection(*(set(table.columns) for runs in methods for table in runs)))
    methods = [[table.with_columns(shared) for table in runs] for runs in methods]
    summed = [key for key in metrics if not _OF_ROWS_TOGETHER & set(METRICS[key].parts)]
    ranked = [key for key in metrics if key == "correctness_auroc"]
    others = [key for key in metrics if key not in (*summed, *ranked)]
    pieces: dict[tuple[str, int], list[Tensor]] = {}
    for kept in stays(rows, total, seed)(max(1, _AT_ONCE // max(1, rows))):
        sums = [[_sums(table, kept, summed) for table in runs] for runs in methods] if summed else []
        columns = kept.t().to(torch.float32 if rows < 2**22 else torch.float64).contiguous() if ranked else kept
        for place, (one, other) in enumerate(pairs):
            read = [_of_sums(*runs, summed) for runs in zip(sums[one], sums[other], strict=True)] if sums else []
            if ranked:
                aurocs = [_exchanged_auroc(*runs, columns) for runs in zip(methods[one], methods[other], strict=True)]
                read += [{ranked[0]: found} for found in aurocs]
            _keep(pieces, place, read, distance)
    for place, (one, other) in enumerate(pairs) if others else ():
        joined = [own.joined(its) for own, its in zip(methods[one], methods[other], strict=True)]
        drawn = [read_weighted(table, others, exchanges(rows, total, seed)) for table in joined]
        read = [{key: values.view(-1, 2).unbind(dim=1) for key, values in found.items()} for found in drawn]
        _keep(pieces, place, read, distance)
    found = {key: torch.stack([torch.cat(pieces[key, place]) for place in range(len(pairs))]) for key in metrics}
    for values in found.values():
        # Rounding must not make equal runs or equal differences unequal.
        values[values.abs() <= ROUNDING] = 0.0
    return found


def standard_errors(
    methods: Sequence[Sequence[RowTable]], metrics: Sequence[str], total: int, seed: int, *, distance: bool = False
) -> dict[str, Tensor]:
    """How the differences between methods vary over resamples of the rows, the same ones for all runs.

    Args:
        methods: The rows of each run, as for `differences`.
        metrics: Keys of metrics.
        total: Number of resamples.
        seed: Seed of the resamples.
        distance: Whether a metric whose best value is 0 counts by its distance from it.

    Returns:
        For each metric the standard error of each pair's difference ``(pairs,)`` float64, over resamples after which
        it is defined.
    """
    draws = resamples(len(methods[0][0]), total, seed)
    read = [[read_weighted(table, metrics, draws) for table in runs] for runs in methods]
    found = {}
    for key in metrics:
        by_distance = distance and METRICS[key].better == "zero"
        means = [torch.stack([one[key].abs() if by_distance else one[key] for one in runs]).mean(0) for runs in read]
        drawn = torch.stack([one - other for one, other in itertools.combinations(means, 2)])
        found[key] = (drawn - drawn.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1).sqrt()
    return found


def in_own_spread(drawn: Tensor, errors: Tensor) -> Tensor:
    """Differences whose p-values say that the values differ, not only that the networks do.

    Exchanged rows of an over-confident and an under-confident network make two nearly calibrated ones, whose ECE varies
    less than those of the two. So a p-value of exchanges may be small though both have the same true ECE. Here the
    difference that was found is made smaller by ``rms(d*) / s`` where its standard error s is larger than the spread
    under exchanges, as in a studentised permutation test (Chung and Romano, 2013).

    Args:
        drawn: Differences ``(pairs, 1 + n)`` of `differences`.
        errors: Standard errors ``(pairs,)`` of `standard_errors`.

    Returns:
        The differences ``(pairs, 1 + n)``, of which the first column has changed.
    """
    spread = drawn[:, 1:].square().nanmean(dim=1).sqrt()
    share = torch.where((errors > spread) & errors.isfinite(), spread / errors, 1.0)
    return torch.cat([drawn[:, :1] * share.unsqueeze(1), drawn[:, 1:]], dim=1)


def _keep(pieces: dict[tuple[str, int], list[Tensor]], place: int, read: Sequence[_Both], distance: bool) -> None:
    """Add a piece of the differences of a pair, the mean over seeds."""
    for key in dict.fromkeys(key for values in read for key in values):
        by_distance = distance and METRICS[key].better == "zero"
        both = [[value.abs() if by_distance else value for value in values[key]] for values in read if key in values]
        pieces.setdefault((key, place), []).append(torch.stack([one - other for one, other in both]).mean(dim=0))


class _Sums(SumsView):
    """Sums of a run over the rows that stay, and over all."""

    def __init__(self, table: RowTable, kept: Tensor, binned: bool) -> None:
        super().__init__(table.columns, table.n_bins, torch.full((len(kept),), float(len(table)), dtype=torch.float64))
        matrices = {
            "column_sums": table.column_matrix,
            "infinite_sums": table.infinite,
            "bin_sums": table.bin_matrix if binned else None,
        }
        self.over_all = {name: None if matrix is None else matrix.sum(dim=0) for name, matrix in matrices.items()}
        for name, matrix in matrices.items():
            setattr(self, name, None if matrix is None else kept @ matrix)

    def exchanged(self, other: _Sums) -> SumsView:
        """This run with the other's rows where its own do not stay."""
        mixed = SumsView(self._names, self.n_bins, self.count)
        for name, total in other.over_all.items():
            own, its = getattr(self, name), getattr(other, name)
            others = None if its is None or total is None else total - its
            setattr(mixed, name, own if others is None else others if own is None else own + others)
        return mixed


def _sums(table: RowTable, kept: Tensor, metrics: Sequence[str]) -> _Sums:
    return _Sums(table, kept, any({"bins", "moments"} & set(METRICS[key].parts) for key in metrics))


def _of_sums(first: _Sums, second: _Sums, metrics: Sequence[str]) -> _Both:
    views = first.exchanged(second), second.exchanged(first)
    return {key: tuple(METRICS[key].value(view) for view in views) for key in metrics}


class _Levels(NamedTuple):
    """Right rows below the confidences of W wrong rows ``(W + 1, B)``, at last all; wrong rows there ``(W, B)``."""

    below: Tensor
    wrong: Tensor


def _levels(table: RowTable, levels: Tensor, kept: Tensor) -> _Levels:
    right, ranks = table.columns["correct"].bool(), table.ranks
    steps = torch.zeros(len(levels) + 1, kept.shape[1], dtype=kept.dtype)
    for after_equal in (False, True):  # a right row equal to a level counts one half there
        steps.index_add_(0, torch.searchsorted(levels, ranks[right], right=after_equal), kept[right], alpha=0.5)
    wrong = torch.zeros(len(levels), kept.shape[1], dtype=kept.dtype)
    return _Levels(steps.cumsum_(dim=0), wrong.index_add_(0, torch.searchsorted(levels, ranks[~right]), kept[~right]))


def _exchanged_auroc(first: RowTable, second: RowTable, kept: Tensor) -> tuple[Tensor, ...]:
    """The correctness AUROC ``(B,)`` of two runs after exchanges ``(N, B)``, 1 where a row stays.

    ``1 - sum_w (right below w + right equal to w / 2) / (R W)`` over the confidences w of wrong rows.
    """
    tables = (first, second)
    levels = torch.cat([table.ranks[~table.columns["correct"].bool()] for table in tables]).sort().values
    levels = levels[group_ends(levels) - 1]
    stay, every = ([_levels(table, levels, rows) for table in tables] for rows in (kept, kept.new_ones(len(kept), 1)))
    values = []
    for own, its in ((0, 1), (1, 0)):
        below, wrong = (stay[own][part] + (every[its][part] - stay[its][part]) for part in (0, 1))
        right = below[-1].double()
        lost = torch.einsum("wb,wb->b", below[:-1].double(), wrong.double())
        values.append(1.0 - lost / (right * (len(kept) - right)))
    return tuple(values)
