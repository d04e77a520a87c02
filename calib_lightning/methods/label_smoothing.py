"""Label smoothing (Szegedy et al., CVPR 2016; Müller et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described


def label_smoothing_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.05) -> Tensor:
    """Label smoothing (Szegedy et al., CVPR 2016): targets mixed with the uniform distribution.

    ``L = (1 - a) * (-mean_n log p_{n, y_n}) + a * (-mean_n (1/K) sum_k log p_nk)`` with ``a = smoothing``.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``, which are smoothed likewise.
        smoothing: ``a`` in ``[0, 1]``, spread uniformly over all K classes.

    Returns:
        Scalar, in nats.

    Deviations:
        None. Code that spreads ``a`` over the K - 1 wrong classes only corresponds to
        ``smoothing = a * K / (K - 1)`` here.

    Example:
        >>> import torch
        >>> round(label_smoothing_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), smoothing=0.1).item(), 4)
        0.2269
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


class LabelSmoothingLoss(Described, nn.Module):
    """Criterion of `label_smoothing_loss`.

    Args:
        smoothing: Weight of the uniform distribution in the targets, in ``[0, 1]``.

    Raises:
        ValueError: If ``smoothing`` is outside ``[0, 1]``.
    """

    def __init__(self, smoothing: float = 0.05) -> None:
        super().__init__()
        if not 0 <= smoothing <= 1:
            raise ValueError(
                f"smoothing is {smoothing}; it must be in [0, 1]. Usual values are 0.05 for CIFAR and 0.1 for ImageNet."
            )
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return label_smoothing_loss(logits, labels, smoothing=self.smoothing)


class LabelSmoothing(ClassificationModule):
    """Train with label smoothing (Szegedy et al., CVPR 2016).

    Paper: Szegedy et al. 2016; Müller et al. 2019.
    Mechanism: targets mixed with the uniform distribution.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        smoothing: Weight of the uniform distribution in the targets; 0.05 for CIFAR, 0.1 for ImageNet.
        **options: See `ClassificationModule`.

    Example:
        >>> LabelSmoothing(10, smoothing=0.1, encoder="digits_cnn").hparams.smoothing
        0.1
    """

    def __init__(self, num_classes: int, smoothing: float = 0.05, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=LabelSmoothingLoss(smoothing), **options)
