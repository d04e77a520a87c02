"""Accuracy and the proper scores as metrics."""

from __future__ import annotations

from calib_lightning.metrics.state import ReadOutMetric


class Accuracy(ReadOutMetric):
    """Share of rows whose label is the predicted class; see `functional.accuracy`.

    Args:
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    key = "accuracy"
    higher_is_better = True


class NegativeLogLikelihood(ReadOutMetric):
    """Mean negative log-likelihood of the label in nats; see `functional.nll`.

    Args:
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> metric.compute()
        tensor(1.3863, dtype=torch.float64)
    """

    key = "nll"
    higher_is_better = False


class BrierScore(ReadOutMetric):
    """Brier score over all classes, in ``[0, 2]``; see `functional.brier`.

    Args:
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> metric = BrierScore()
        >>> metric.update(torch.zeros(1, 4), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    key = "brier"
    higher_is_better = False
