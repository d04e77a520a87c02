"""The kernel calibration error of an evaluated set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.kernel import check_bandwidth, skce_of
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.metrics.functional.undefined import checked_result
from calib_lightning.metrics.row_metric import RowMetric


class SquaredKernelCalibrationError(RowMetric):
    """Squared kernel calibration error (Widmann, Lindsten and Zachariah, NeurIPS 2019); see `functional.skce`.

    It keeps all K scores per row and computes over ``N^2 / 2`` pairs, so no `EvaluationState` has it. The p-value of
    the same rows is that of `functional.kernel_calibration_test`.

    Args:
        bandwidth: See `functional.skce`.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: ``bandwidth`` is not above 0 and finite, or ``input`` is unknown.

    Example:
        >>> metric = SquaredKernelCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.0491, dtype=torch.float64)
    """

    def __init__(self, bandwidth: float = 1.0, input: InputKind = "logits", **kwargs: Any) -> None:
        check_bandwidth(bandwidth)
        super().__init__(("scores",), input=input, **kwargs)
        self.bandwidth = bandwidth

    def compute(self) -> Tensor:
        """Compute the estimate.

        Returns:
            0-d float64; nan, with one warning, with fewer than two rows.

        Raises:
            ValueError: Batches on a device held invalid values; their number, kind and first batch are named.
        """
        self.check_faults()
        value = torch.full((), torch.nan, dtype=torch.float64)
        if self.count > 0:
            rows = Rows(self.rows_of("scores"), self.rows_of("score_labels").long(), None, self.input)
            value = skce_of(rows.probs, rows.labels, self.bandwidth)
        return checked_result(type(self).__name__, value, int(self.count))
