"""Calibration errors as metrics."""

from __future__ import annotations

from typing import Any

from calib_lightning.metrics.functional.rows import InputKind
from calib_lightning.metrics.state import ReadOutMetric


class ExpectedCalibrationError(ReadOutMetric):
    """Expected calibration error of the predicted class (Guo et al., 2017); see `functional.ece`.

    Args:
        n_bins: Number of equal-width bins ``(lo, hi]``.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = ExpectedCalibrationError(n_bins=10, input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.2000, dtype=torch.float64)
    """

    key = "ece"
    higher_is_better = False

    def __init__(self, n_bins: int = 15, input: InputKind = "logits", **kwargs: Any) -> None:
        super().__init__(input=input, n_bins=n_bins, **kwargs)


class SignedGap(ReadOutMetric):
    """Mean confidence less accuracy, positive for over-confidence; see `functional.signed_gap`.

    Args:
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = SignedGap(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.3000, dtype=torch.float64)
    """

    key = "signed_gap"
    higher_is_better = None
