"""How well the confidence ranks predictions, as metrics."""

from __future__ import annotations

from calib_lightning.metrics.state import ReadOutMetric


class CorrectnessAUROC(ReadOutMetric):
    """Area under the ROC curve of "the prediction is correct", exact; see `functional.correctness_auroc`.

    It keeps 5 bytes a row (9 for float64 logits).

    Args:
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = CorrectnessAUROC()
        >>> metric.update(torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    key = "correctness_auroc"
    higher_is_better = True
