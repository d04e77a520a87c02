"""Mixup (Zhang et al., ICLR 2018; for calibration: Thulasidasan et al., NeurIPS 2019)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from calib_lightning.core import BatchTransform, ClassificationModule, ModuleOptions
from calib_lightning.core.batch_transform import Classifier
from calib_lightning.core.module_options import with_transform
from calib_lightning.types import Batch


def mix(image: Tensor, order: Tensor, weight: float) -> Tensor:
    """Mix every image with another image of its batch (Zhang et al., 2018), ``w x + (1 - w) x[order]``.

    Args:
        image: ``(N, ...)``.
        order: Permutation ``(N,)`` int64 of the rows.
        weight: ``w`` in ``[0, 1]``.

    Returns:
        ``(N, ...)``.

    Example:
        >>> mix(torch.tensor([0.0, 1.0]), torch.tensor([1, 0]), 0.75)
        tensor([0.2500, 0.7500])
    """
    return weight * image + (1.0 - weight) * image[order]


def beta_weight(alpha: float) -> float:
    """Draw ``w ~ Beta(alpha, alpha)`` from torch's global CPU generator."""
    both = torch.tensor(alpha, dtype=torch.float64)  # the default dtype may be too narrow
    return float(torch.distributions.Beta(both, both, validate_args=False).sample())


def check_alpha(alpha: float, usual: str) -> None:
    """Reject an invalid parameter of a symmetric Beta distribution; the error names the ``usual`` values."""
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; it must be above 0 and finite. Usual values: {usual}.")


class MixupTransform(BatchTransform):
    """Mixup around any criterion: ``w L(f(x~), y) + (1 - w) L(f(x~), y[order])`` with ``x~ = w x + (1 - w) x[order]``.

    One ``w ~ Beta(alpha, alpha)`` and one permutation per batch. Training metrics only use ``y``.

    Args:
        alpha: Parameter of the Beta distribution, above 0.

    Raises:
        ValueError: If ``alpha`` is not above 0.

    Example:
        >>> MixupTransform(alpha=1.0).alpha
        1.0
    """

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__()
        check_alpha(alpha, "0.2 and 1")
        self.alpha = alpha

    def loss(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar), and logits ``(N, K)`` of the mixed images."""
        weight, order = beta_weight(self.alpha), torch.randperm(len(batch.label), device=batch.label.device)
        logits = module(mix(batch.image, order, weight))
        own = module.criterion_value(logits, batch.label)
        other = module.criterion_value(logits, batch.label[order])
        return weight * own + (1.0 - weight) * other, logits


class Mixup(ClassificationModule):
    """Train with cross-entropy on mixed images, mixup (Zhang et al., ICLR 2018).

    Paper: Zhang et al. 2018; Thulasidasan et al. 2019.
    Mechanism: mixes images and labels in pairs.
    Extra cost: none.

    To use mixup with another method's criterion, pass `MixupTransform` as its ``batch_transform``.

    Args:
        num_classes: K; the command line takes it from the data.
        alpha: Parameter of the Beta distribution; 0.2 in calibration papers, 1 in others.
        **options: See `ClassificationModule`.

    Example:
        >>> Mixup(10, alpha=1.0, encoder="digits_cnn").hparams.alpha
        1.0
    """

    def __init__(self, num_classes: int, alpha: float = 0.2, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, **with_transform(options, MixupTransform(alpha)))
