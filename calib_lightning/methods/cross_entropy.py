"""Cross-entropy: the baseline of every comparison."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, ``L = -mean_n log p_{n, y_n}`` with ``p = softmax(logits)``.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``: then ``-mean_n sum_k t_nk log p_nk``.

    Returns:
        Scalar, in nats.

    Example:
        >>> import torch
        >>> round(cross_entropy_loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.6931
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    return F.cross_entropy(logits, labels)


class CrossEntropyLoss(Described, nn.Module):
    """Criterion of `cross_entropy_loss`."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return cross_entropy_loss(logits, labels)


class CrossEntropy(ClassificationModule):
    """Train with cross-entropy.

    Paper: none.
    Mechanism: the baseline.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        **options: See `ClassificationModule`.

    Example:
        >>> CrossEntropy(10, encoder="digits_cnn").num_classes
        10
    """

    def __init__(self, num_classes: int, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
