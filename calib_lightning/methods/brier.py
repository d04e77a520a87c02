"""Brier loss (Brier, 1950; for training: Mukhoti et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch, one_hot
from calib_lightning.utils.described import Described


def brier_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Brier loss (Brier, 1950), ``L = mean_n sum_k (p_nk - 1[k = y_n])^2``, in ``[0, 2]``.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``.

    Returns:
        Scalar: sum over classes, mean over samples.

    Deviations:
        None. Convergence is slow: published recipes train for up to 550 epochs instead of 350.

    Example:
        >>> import torch
        >>> brier_loss(torch.zeros(1, 2), torch.tensor([0])).item()
        0.5
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    targets = one_hot(labels, logits.shape[-1], logits.dtype)
    return (logits.softmax(dim=-1) - targets).square().sum(dim=-1).mean()


class BrierLoss(Described, nn.Module):
    """Criterion of `brier_loss`."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return brier_loss(logits, labels)


class Brier(ClassificationModule):
    """Train with the Brier loss (Mukhoti et al., NeurIPS 2020).

    Paper: Brier 1950; Mukhoti et al. 2020.
    Mechanism: squared error of the probabilities.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        **options: See `ClassificationModule`.

    Example:
        >>> Brier(10, encoder="digits_cnn").num_classes
        10
    """

    def __init__(self, num_classes: int, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=BrierLoss(), **options)
