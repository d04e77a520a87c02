"""Difference between confidence and accuracy, DCA (Liang et al., 2020)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.utils.described import Described


def dca_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference between the batch's mean confidence and its accuracy (Liang et al., 2020).

    ``DCA = |mean_n max_k p_nk - mean_n 1[argmax_k p_nk = y_n]|``; the accuracy carries no gradient.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``: then a row is correct to the degree ``t_nk`` of its
            predicted class k.

    Returns:
        Scalar in ``[0, 1]``.

    Example:
        >>> import torch
        >>> dca_penalty(torch.zeros(1, 2), torch.tensor([0])).item()
        0.5
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
    if labels.ndim == 2:
        correct = labels.gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
    else:
        correct = (predicted == labels).to(confidence.dtype)
    return (confidence - correct).mean().abs()


class DCALoss(Described, nn.Module):
    """A criterion with `dca_penalty` added: ``L = criterion + b DCA``.

    Args:
        criterion: Classification loss. Default: cross-entropy.
        strength: ``b``, at least 0.

    Raises:
        ValueError: If ``strength`` is negative.
    """

    def __init__(self, criterion: nn.Module | None = None, strength: float = 1.0) -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The usual value is 1.")
        self.criterion = CrossEntropyLoss() if criterion is None else criterion
        self.strength = strength

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``, or ``(N, K)`` if the criterion accepts them."""
        logits, labels = checked_batch(logits, labels, soft=True)
        classification: Tensor = self.criterion(logits, labels)
        return classification + self.strength * dca_penalty(logits, labels)


class DCA(ClassificationModule):
    """Train with a criterion and the DCA penalty (Liang et al., 2020).

    Paper: Liang et al. 2020.
    Mechanism: pulls the mean confidence towards the accuracy of the batch.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        criterion: Classification loss, cross-entropy by default. Checkpoints do not store it: pass it again to
            continue training.
        strength: Weight of the penalty.
        **options: See `ClassificationModule`.

    Example:
        >>> DCA(10, encoder="digits_cnn").hparams.strength
        1.0
    """

    def __init__(
        self,
        num_classes: int,
        criterion: nn.Module | None = None,
        strength: float = 1.0,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(num_classes, criterion=DCALoss(criterion, strength), **options)
