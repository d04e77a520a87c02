"""One shared accumulator over an evaluated set, from which the metrics are computed.

The state consists of *parts* (a count, sums, binned sums, ordered rows), and a metric is a function of a view of the
state. Its row in `table.METRICS` names the parts it needs. `EvaluationState` holds the parts of all its metrics and
fills them in one pass; a single metric holds only its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.row_metric import RowMetric
from calib_lightning.metrics.table import CORE, METRICS, MetricRow
from calib_lightning.metrics.view import StateView


class EvaluationState(RowMetric):
    """All metrics of an evaluated set in one pass over its logits.

    Per batch a maximum, an exponential and a few sums over ``(N, K)`` serve every metric. The sums do not grow with
    the set; the rows of the exact ranking metrics take 5 bytes each (9 for float64 logits).

    Args:
        metrics: Keys of `METRICS`; ``metrics.REPORT`` is everything that does not keep K numbers per row.
        n_bins: Number of bins of the calibration errors.
        rank_bins: Size of the histogram of log-odds for ranking metrics, such as 16384; ``None`` keeps the score of
            every row, which is exact.
        details: Whether to keep one value per row of every quantity, for `bootstrap_intervals` and `by_class`; for
            ``"classwise_ece"`` all K scores are then kept.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: An unknown metric, or an invalid argument.

    Example:
        >>> state = EvaluationState()
        >>> state.update(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0]))
        >>> {name: round(float(value), 3) for name, value in state.compute().items()}
        {'accuracy': 0.667, 'nll': 0.496, 'brier': 0.367, 'ece': 0.299, 'signed_gap': 0.188, 'correctness_auroc': 1.0}
    """

    correct_sum: Tensor
    bins: Tensor
    rank_scores: list[Tensor]

    def __init__(
        self,
        metrics: Sequence[str] = CORE,
        n_bins: int = 15,
        rank_bins: int | None = None,
        details: bool = False,
        input: InputKind = "logits",
        **kwargs: Any,
    ) -> None:
        if isinstance(metrics, str):
            raise ValueError(f"metrics is {metrics!r}; it must be a list of keys, such as [{metrics!r}].")
        unknown = [key for key in metrics if key not in METRICS]
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"metrics contains {names}; it must contain only keys of {', '.join(METRICS)}.")
        self.metrics = tuple(dict.fromkeys(metrics))
        needed = [part for key in self.metrics for part in METRICS[key].parts]
        super().__init__(needed, n_bins, rank_bins, details, input, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Compute all metrics.

        Returns:
            Each a 0-d float64 tensor; nan, with one warning, where it is undefined.

        Raises:
            ValueError: Batches on a device held invalid values; their number, kind and first batch are named.
        """
        self.check_faults()
        view = StateView(self)
        values = {key: _read(METRICS[key], view) for key in self.metrics}
        self._warn_about(values)
        return values


def _read(row: MetricRow, view: StateView) -> Tensor:
    # Not every function can handle an empty set.
    if int(view.count) == 0:
        return torch.full((), torch.nan, dtype=torch.float64)
    return row.value(view)


class SingleMetric(RowMetric):
    """A single metric, with only the parts of the state that it needs.

    Subclasses set ``key``, a key of `METRICS`, or override ``row``.

    Args:
        n_bins: Number of bins of the calibration errors.
        rank_bins: Size of the histogram of log-odds for ranking metrics; ``None`` keeps the score of every row, which
            is exact.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    key: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.higher_is_better = {"higher": True, "lower": False}.get(METRICS[cls.key].better)

    def __init__(
        self, n_bins: int = 15, rank_bins: int | None = None, input: InputKind = "logits", **kwargs: Any
    ) -> None:
        super().__init__(self.row.parts, n_bins, rank_bins, input=input, **kwargs)

    @property
    def row(self) -> MetricRow:
        """The row of the metric in the table."""
        return METRICS[self.key]

    def compute(self) -> Tensor:
        """Compute the metric.

        Returns:
            0-d float64; nan, with a warning, where it is undefined.

        Raises:
            ValueError: Batches on a device held invalid values; their number, kind and first batch are named.
        """
        self.check_faults()
        value = _read(self.row, StateView(self))
        self._warn_about({type(self).__name__: value})
        return value
