"""Sample-dependent focal loss, FLSD-53 (Mukhoti et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described


def flsd_loss(logits: Tensor, labels: Tensor, *, gamma: float = 3.0) -> Tensor:
    """Sample-dependent focal loss (Mukhoti et al., 2020), ``L = -mean_n (1 - p_{n, y_n})^{g_n} log p_{n, y_n}``.

    ``g = 5`` where ``p_y < 0.2``, 3 where ``0.2 <= p_y < 0.5`` and ``gamma`` above; with ``gamma = 3`` this is FLSD-53.
    The choice of g carries no gradient.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
        gamma: Focusing parameter of samples with ``p_y >= 0.5``, at least 0.

    Returns:
        Scalar, in nats.

    Deviations:
        ``1 - p`` is computed as ``-expm1(log p)`` and clamped to at least 1e-12, because the gradient of ``x^gamma`` at
        0 is not finite for ``0 < gamma < 1``.

    Example:
        >>> round(flsd_loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.0866
    """
    logits, labels = checked_batch(logits, labels, soft=False)
    log_probs = logits.log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1))
    probs = log_probs.detach().exp()
    gammas = torch.full_like(probs, gamma).masked_fill(probs < 0.5, 3.0).masked_fill(probs < 0.2, 5.0)
    return -(torch.expm1(log_probs).neg().clamp_min(1e-12).pow(gammas) * log_probs).mean()


class FLSDLoss(Described, nn.Module):
    """Criterion of `flsd_loss`.

    Args:
        gamma: Focusing parameter of samples with ``p_y >= 0.5``, at least 0.

    Raises:
        ValueError: If ``gamma`` is negative.
    """

    def __init__(self, gamma: float = 3.0) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma is {gamma}; it must be at least 0 and finite. 3 gives FLSD-53.")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``."""
        return flsd_loss(logits, labels, gamma=self.gamma)


class FLSD(ClassificationModule):
    """Train with the sample-dependent focal loss, FLSD-53 (Mukhoti et al., NeurIPS 2020).

    Paper: Mukhoti et al. 2020.
    Mechanism: focal loss with a larger gamma where the true class is unlikely (FLSD-53).
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        gamma: Focusing parameter of samples with ``p_y >= 0.5``.
        **options: See `ClassificationModule`.

    Example:
        >>> FLSD(10, encoder="digits_cnn").hparams.gamma
        3.0
    """

    def __init__(self, num_classes: int, gamma: float = 3.0, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=FLSDLoss(gamma), **options)
