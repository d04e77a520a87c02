"""Dual focal loss, DFL (Tao, Dong and Xu, ICML 2023)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described


def dual_focal_loss(logits: Tensor, labels: Tensor, *, gamma: float = 5.0) -> Tensor:
    """Dual focal loss (Tao et al., 2023), ``L = -mean_n (1 - p_y + p_j)^gamma log p_y``.

    ``p_j = max {p_k : p_k < p_y}``, 0 if there is none: the largest probability below that of the true class, which is
    not the strongest competitor when the prediction is wrong. The gradient flows through ``p_j``.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
        gamma: Focusing parameter, at least 0; 0 is cross-entropy, the authors use 5 for CIFAR-10.

    Returns:
        Scalar, in nats.

    Deviations:
        ``1 - p_y + p_j`` is clamped to at least 1e-12, because the gradient of ``x^gamma`` at 0 is not finite for
        ``0 < gamma < 1``.

    Example:
        >>> round(dual_focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0).item(), 4)
        0.3466
    """
    logits, labels = checked_batch(logits, labels, soft=False)
    column = labels.unsqueeze(-1)
    # logits rank like probabilities, even where those round to 0 or 1
    below = logits < logits.gather(-1, column)
    log_probs = logits.log_softmax(dim=-1)
    next_below = torch.where(below, log_probs.exp(), 0.0).amax(dim=-1, keepdim=True)
    own_log = log_probs.gather(-1, column)
    base = (next_below - torch.expm1(own_log)).clamp_min(1e-12)
    return -(base.pow(gamma) * own_log).mean()


class DualFocalLoss(Described, nn.Module):
    """Criterion of `dual_focal_loss`.

    Args:
        gamma: Focusing parameter, at least 0.

    Raises:
        ValueError: If ``gamma`` is negative.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ValueError(
                f"gamma is {gamma}; it must be at least 0 and finite. 0 is cross-entropy; the authors use 5."
            )
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``."""
        return dual_focal_loss(logits, labels, gamma=self.gamma)


class DualFocal(ClassificationModule):
    """Train with the dual focal loss (Tao, Dong and Xu, ICML 2023).

    Paper: Tao et al. 2023.
    Mechanism: focal loss that also widens the gap to the class ranked just below the true one.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        gamma: Focusing parameter; the authors tune it for each network.
        **options: See `ClassificationModule`.

    Example:
        >>> DualFocal(10, encoder="digits_cnn").hparams.gamma
        5.0
    """

    def __init__(self, num_classes: int, gamma: float = 5.0, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=DualFocalLoss(gamma), **options)
