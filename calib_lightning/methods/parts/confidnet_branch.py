"""The branch of ConfidNet, which estimates how far to trust a classifier, and its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib_lightning.core import Head, LinearHead
from calib_lightning.functional import at_least_float32, checked_batch


def tcp_loss(confidence: Tensor, logits: Tensor, labels: Tensor, *, error_weight: float = 1.0) -> Tensor:
    """Squared distance of a confidence from the true class probability, TCP (Corbiere et al., 2019).

    ``L = mean_n w_n (c_n - p_{n, y_n})^2`` with ``p = softmax(logits)``, ``w_n = error_weight`` where the prediction is
    wrong and 1 where it is correct. No gradient flows through ``p``.

    Args:
        confidence: ``c``, ``(N,)`` in ``[0, 1]``.
        logits: ``(N, K)`` of the classifier.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``: then the expected TCP ``sum_k t_nk p_nk``, and a prediction
            is correct if it is the largest target.
        error_weight: Weight of a misclassified row, above 0.

    Returns:
        Scalar.

    Raises:
        TypeError: If a dtype is wrong (see `calib_lightning.functional.checked_batch`).
        ValueError: If shapes do not match, there are no rows, or a label is outside ``0..K-1``.

    Example:
        >>> tcp_loss(torch.tensor([1.0]), torch.zeros(1, 2), torch.tensor([0])).item()
        0.25
    """
    logits, labels = checked_batch(logits.detach(), labels, soft=True)
    if confidence.shape != logits.shape[:1]:
        raise ValueError(
            f"confidence has shape {tuple(confidence.shape)}; it must be ({len(logits)},), one value per row."
        )
    probs = logits.softmax(dim=-1)
    if labels.ndim == 2:
        target, winner = (labels * probs).sum(dim=-1), labels.argmax(dim=-1)
    else:
        target, winner = probs.gather(1, labels.unsqueeze(1)).squeeze(1), labels
    weight = torch.where(logits.argmax(dim=-1) == winner, 1.0, error_weight)
    return (weight * (at_least_float32(confidence) - target).square()).mean()


class ConfidenceHead(Head):
    """A frozen classifier, and a branch that estimates how far to trust it.

    Logits come from the classifier; the confidence is
    ``sigmoid(Linear(400, 1)(f(f(f(f(h))))))`` with ``f = relu(Linear(., 400))``.

    Args:
        in_features: d, the number of features.
        num_classes: K.
        classifier: The trained classifier. Default: a new `LinearHead`.
        width: Width of the branch's layers.

    Raises:
        ValueError: If ``width`` is below 1.

    Example:
        >>> head = ConfidenceHead(96, 10)
        >>> head(torch.zeros(2, 96)).shape, head.confidence(torch.zeros(2, 96)).shape
        (torch.Size([2, 10]), torch.Size([2]))
    """

    def __init__(self, in_features: int, num_classes: int, classifier: Head | None = None, width: int = 400) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1. The paper uses 400.")
        self.classifier = LinearHead(in_features, num_classes) if classifier is None else classifier
        layers: list[nn.Module] = []
        for inputs in (in_features, width, width, width):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        self.branch = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``, computed in evaluation mode even in training."""
        if self.classifier.training:  # stages put the whole head into training mode
            self.classifier.eval()
        logits: Tensor = self.classifier(features)
        return logits

    def confidence(self, features: Tensor) -> Tensor:
        """Confidence ``(N,)`` in ``[0, 1]``, float32 or wider, of features ``(N, d)``."""
        return at_least_float32(self.branch(features)).sigmoid().squeeze(1)
