"""Margin-based label smoothing, MbLS (Liu et al., CVPR 2022)."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described


def mbls_loss(logits: Tensor, labels: Tensor, *, margin: float = 10.0, strength: float = 0.1) -> Tensor:
    """Margin-based label smoothing (Liu et al., 2022): ``L = CE + a mean_{n,k} relu(max_j l_nj - l_nk - m)``.

    ``m = margin``, ``a = strength``; the mean is over all N K entries and the gradient flows through the maximum.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)`` for the cross-entropy.
        margin: Distance to the largest logit without penalty, at least 0; 6 to 10 in the literature.
        strength: Weight of the penalty, at least 0.

    Returns:
        Scalar, in nats.

    Example:
        >>> import torch
        >>> round(mbls_loss(torch.tensor([[4.0, 0.0]]), torch.tensor([0]), margin=2.0, strength=1.0).item(), 4)
        1.0181
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    distance = logits.amax(dim=-1, keepdim=True) - logits
    return F.cross_entropy(logits, labels) + strength * F.relu(distance - margin).mean()


class MbLSLoss(Described, nn.Module):
    """Criterion of `mbls_loss`.

    Args:
        margin: Distance to the largest logit without penalty, at least 0.
        strength: Weight of the penalty, at least 0.

    Raises:
        ValueError: If ``margin`` or ``strength`` is negative.
    """

    def __init__(self, margin: float = 10.0, strength: float = 0.1) -> None:
        super().__init__()
        if not 0 <= margin < float("inf"):
            raise ValueError(f"margin is {margin}; it must be at least 0 and finite. Usual values are 6 to 10.")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The usual value is 0.1.")
        self.margin = margin
        self.strength = strength

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return mbls_loss(logits, labels, margin=self.margin, strength=self.strength)


class MbLS(ClassificationModule):
    """Train with margin-based label smoothing (Liu et al., CVPR 2022).

    Paper: Liu et al. 2022.
    Mechanism: penalises logits more than a margin below the largest.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        margin: Distance to the largest logit without penalty.
        strength: Weight of the penalty.
        **options: See `ClassificationModule`.

    Example:
        >>> MbLS(10, margin=6.0, encoder="digits_cnn").hparams.margin
        6.0
    """

    def __init__(
        self, num_classes: int, margin: float = 10.0, strength: float = 0.1, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(num_classes, criterion=MbLSLoss(margin, strength), **options)
