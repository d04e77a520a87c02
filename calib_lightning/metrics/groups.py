"""Every metric on groups of rows: of each class, of frequent and rare classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.row_table import RowTable
from calib_lightning.metrics.state import EvaluationState
from calib_lightning.metrics.table import METRICS
from calib_lightning.metrics.weights import read_weighted, subsets


class GroupTable(NamedTuple):
    """Metrics of groups of rows.

    Attributes:
        names: Names of the groups.
        rows: Number of rows per group.
        values: Per metric one value per group, ``(G,)`` float64; nan where it is undefined.
    """

    names: tuple[str, ...]
    rows: Tensor
    values: dict[str, Tensor]

    def worst(self, metric: str) -> tuple[str, float]:
        """Find the group with the worst value of a metric.

        Args:
            metric: Key of a metric that has a better direction.

        Returns:
            Name and value; ``("", nan)`` if the metric is undefined for every group.

        Raises:
            ValueError: The metric has no better direction, or was not computed.
        """
        better = METRICS[metric].better if metric in METRICS else "none"
        if metric not in self.values or better == "none":
            allowed = [key for key in self.values if METRICS[key].better != "none"]
            raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(allowed)}.")
        values = self.values[metric]
        badness = {"higher": -values, "lower": values, "zero": values.abs()}[better]
        if bool(badness.isnan().all()):
            return "", torch.nan
        index = int(badness.nan_to_num(nan=-torch.inf).argmax())
        return self.names[index], float(values[index])


def by_class(state: EvaluationState) -> GroupTable:
    """Compute every metric on the rows of each class.

    Args:
        state: A state made with ``details=True``.

    Returns:
        One group per class, named by its number.

    Raises:
        ValueError: The state keeps no rows.
    """
    table = RowTable.of(state)
    names = tuple(str(label) for label in range(table.num_classes))
    return _groups(table, state.metrics, names, table.labels == torch.arange(table.num_classes).unsqueeze(1))


def by_frequency(state: EvaluationState, train_counts: Tensor, many: int = 100, few: int = 20) -> GroupTable:
    """Compute every metric on the rows whose class has many, a medium number of, or few training images.

    Args:
        state: A state made with ``details=True``.
        train_counts: Number of training images of each class, ``(K,)`` integer.
        many: A class with more training images than this belongs to ``"many"`` (Liu et al., 2019).
        few: A class with fewer than this belongs to ``"few"``.

    Returns:
        The groups ``"many"``, ``"medium"`` and ``"few"``.

    Raises:
        ValueError: The state keeps no rows, or ``train_counts`` does not fit.
    """
    table = RowTable.of(state)
    counts = torch.as_tensor(train_counts)
    if counts.shape != (table.num_classes,) or counts.is_floating_point() or bool((counts < 0).any()):
        raise ValueError(
            f"train_counts is {counts.dtype} of shape {tuple(counts.shape)}; it must be {table.num_classes} integers "
            ">= 0, one per class."
        )
    if not 0 <= few <= many:
        raise ValueError(f"few is {few!r} and many is {many!r}; they must satisfy 0 <= few <= many.")
    of_row = counts.cpu()[table.labels]
    member = torch.stack([of_row > many, (of_row <= many) & (of_row >= few), of_row < few])
    return _groups(table, state.metrics, ("many", "medium", "few"), member)


def _groups(table: RowTable, metrics: Sequence[str], names: tuple[str, ...], member: Tensor) -> GroupTable:
    if len(table) == 0:
        empty = torch.full((len(names),), torch.nan, dtype=torch.float64)
        return GroupTable(names, member.sum(dim=1), dict.fromkeys(metrics, empty))
    values = read_weighted(table, metrics, subsets(member))
    return GroupTable(names, member.sum(dim=1), values)
