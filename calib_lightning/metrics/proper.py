"""Accuracy, the proper scores and the entropy as metrics."""

from __future__ import annotations

from typing import Any

from calib_lightning.metrics.state import SingleMetric
from calib_lightning.metrics.table import MetricRow, top_k_of


class Accuracy(SingleMetric):
    """Share of rows whose label is the predicted class; see `functional.accuracy`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = Accuracy(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.5
    """

    key = "accuracy"


class NegativeLogLikelihood(SingleMetric):
    """Mean negative log-likelihood in nats, also for soft labels ``(N, K)``; see `functional.nll`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> round(float(metric.compute()), 4)
        1.3863
    """

    key = "nll"
    takes_soft_labels = True


class BrierScore(SingleMetric):
    """Brier score over all classes, in ``[0, 2]``, also for soft labels ``(N, K)``; see `functional.brier`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = BrierScore()
        >>> metric.update(torch.zeros(1, 4), torch.tensor([0]))
        >>> round(float(metric.compute()), 4)
        0.75
    """

    key = "brier"
    takes_soft_labels = True


class Entropy(SingleMetric):
    """Mean entropy of the predicted probabilities in nats; labels do not matter. See `functional.entropy`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = Entropy()
        >>> metric.update(torch.zeros(1, 4), torch.tensor([0]))
        >>> round(float(metric.compute()), 4)
        1.3863
    """

    key = "entropy"
    takes_soft_labels = True


class TopKAccuracy(SingleMetric):
    """Share of rows whose label is among the k largest scores; see `functional.top_k_accuracy`.

    Args:
        k: Number of classes that count.
        **kwargs: Arguments of `SingleMetric`.

    Raises:
        ValueError: ``k`` is not a positive integer.

    Example:
        >>> metric = TopKAccuracy(k=2)
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([1, 2]))
        >>> round(float(metric.compute()), 4)
        0.5
    """

    key = "top5_accuracy"

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}; it must be an integer >= 1.")
        self.k = k
        super().__init__(**kwargs)

    @property
    def row(self) -> MetricRow:
        """The row for this k."""
        return top_k_of(self.k)

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the value must know."""
        return super().settings | {"k": self.k}
