"""Focal loss (Lin et al., ICCV 2017), for calibration (Mukhoti et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described


def focal_loss(logits: Tensor, labels: Tensor, *, gamma: float = 3.0) -> Tensor:
    """Focal loss (Lin et al., ICCV 2017), ``L = -mean_n (1 - p_{n, y_n})^gamma log p_{n, y_n}``.

    The gradient flows through the factor. ``gamma = 0`` is cross-entropy.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``: then ``-mean_n sum_k t_nk (1 - p_nk)^gamma log p_nk``.
        gamma: Focusing parameter, at least 0; 3 is the usual baseline in calibration papers.

    Returns:
        Scalar, in nats.

    Deviations:
        No class weights alpha. ``1 - p`` is computed as ``-expm1(log p)`` and clamped to at least 1e-12, because the
        gradient of ``x^gamma`` at 0 is not finite for ``0 < gamma < 1``.

    Example:
        >>> import torch
        >>> round(focal_loss(torch.zeros(1, 2), torch.tensor([0]), gamma=1.0).item(), 4)
        0.3466
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    log_probs = logits.log_softmax(dim=-1)
    if labels.ndim == 2:
        return (labels * _focal_terms(log_probs, gamma)).sum(dim=-1).mean()
    return _focal_terms(log_probs.gather(-1, labels.unsqueeze(-1)), gamma).mean()


def _focal_terms(log_probs: Tensor, gamma: float) -> Tensor:
    return -torch.expm1(log_probs).neg().clamp_min(1e-12).pow(gamma) * log_probs


class FocalLoss(Described, nn.Module):
    """Criterion of `focal_loss`.

    Args:
        gamma: Focusing parameter, at least 0.

    Raises:
        ValueError: If ``gamma`` is negative.
    """

    def __init__(self, gamma: float = 3.0) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ValueError(
                f"gamma is {gamma}; it must be at least 0 and finite. 0 is cross-entropy; the usual value is 3."
            )
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return focal_loss(logits, labels, gamma=self.gamma)


class Focal(ClassificationModule):
    """Train with the focal loss (Mukhoti et al., NeurIPS 2020).

    Paper: Lin et al. 2017; Mukhoti et al. 2020.
    Mechanism: gives easy samples less weight (FL-3).
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        gamma: Focusing parameter; 3 is the usual baseline in calibration papers.
        **options: See `ClassificationModule`.

    Example:
        >>> Focal(10, gamma=2.0, encoder="digits_cnn").hparams.gamma
        2.0
    """

    def __init__(self, num_classes: int, gamma: float = 3.0, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=FocalLoss(gamma), **options)
