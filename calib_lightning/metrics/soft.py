"""Scores against distributions over the classes, such as the votes of several people on an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.row_metric import RowMetric
from calib_lightning.metrics.table import SOFT
from calib_lightning.metrics.view import StateView


class SoftLabelScores(RowMetric):
    """`functional.soft_nll`, `functional.soft_brier` and `functional.label_entropy` of an evaluated set in one pass.

    Labels are distributions ``(N, K)``, floating-point rows >= 0 that sum to 1 +- 1e-3, or class numbers ``(N,)``.

    Args:
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = SoftLabelScores()
        >>> metric.update(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
        >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
        {'soft_nll': 1.3863, 'soft_brier': 0.25, 'label_entropy': 0.6931}
    """

    takes_soft_labels = True

    def __init__(self, input: InputKind = "logits", **kwargs: Any) -> None:
        super().__init__([part for row in SOFT.values() for part in row.parts], input=input, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Compute all three.

        Returns:
            Each a 0-d float64 tensor; nan, with one warning, without rows.

        Raises:
            ValueError: Batches on a device held invalid values; their number, kind and first batch are named.
        """
        self.check_faults()
        view = StateView(self)
        values = {key: row.value(view) for key, row in SOFT.items()}
        self._warn_about(values)
        return values
