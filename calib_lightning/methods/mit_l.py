"""Mixup inference in training on logits, MIT-L (Wang et al., CVPR 2023)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from calib_lightning.core import BatchTransform, ClassificationModule, ModuleOptions
from calib_lightning.core.batch_transform import Classifier
from calib_lightning.core.module_options import with_transform
from calib_lightning.functional import at_least_float32
from calib_lightning.methods.mixup import beta_weight, check_alpha, mix
from calib_lightning.types import Batch


def draw_ratios(alpha: float, margin: float) -> tuple[float, float]:
    """Draw the two mixing ratios (Wang et al., 2023) from torch's global CPU generator.

    ``r1 = max(B, 1 - B)`` and ``r2 = min(B', 1 - B')`` with ``B, B' ~ Beta(alpha, alpha)``, redrawn until
    ``r1 - r2 >= margin``.

    Args:
        alpha: Above 0.
        margin: In ``[0, 1)``; keeps `decouple` from dividing by almost zero.

    Returns:
        ``r1 >= 1/2 >= r2``.

    Example:
        >>> first, second = draw_ratios(0.5, 0.5)
        >>> first - second >= 0.5
        True
    """
    while True:
        first, second = beta_weight(alpha), beta_weight(alpha)
        first, second = max(first, 1.0 - first), min(second, 1.0 - second)
        if first - second >= margin and first > second:
            return first, second


def decouple(first: Tensor, second: Tensor, ratios: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Recover the inputs of two mixtures (Wang et al., 2023).

    ``f1 = r1 a + (1 - r1) b`` and ``f2 = r2 a + (1 - r2) b`` give ``a = ((1 - r2) f1 - (1 - r1) f2) / (r1 - r2)`` and
    ``b = (r1 f2 - r2 f1) / (r1 - r2)``.

    Args:
        first: ``f1``, any shape.
        second: ``f2``, the same shape.
        ratios: ``(r1, r2)``, not equal.

    Returns:
        ``a`` and ``b``.

    Example:
        >>> decouple(torch.tensor([3.0]), torch.tensor([1.0]), (0.75, 0.25))
        (tensor([4.]), tensor([0.]))
    """
    r1, r2 = ratios
    distance = r1 - r2
    return ((1.0 - r2) * first - (1.0 - r1) * second) / distance, (r1 * second - r2 * first) / distance


def check_ratios(alpha: float, margin: float) -> None:
    """Reject parameters that are out of range, or a margin that fewer than one pair of ratios in 10,000 reaches."""
    check_alpha(alpha, "0.5 and 1")
    if not 0 <= margin < 1:
        raise ValueError(f"margin is {margin}; it must be in [0, 1). The authors' code uses 0.5.")
    # a separate generator: building a module must not change the run's random numbers
    generator = torch.Generator().manual_seed(0)
    draws = torch._sample_dirichlet(torch.full((40_000, 2), alpha, dtype=torch.float64), generator)[:, 0]
    one, two = draws.view(2, -1)
    share = ((one.maximum(1 - one) - two.minimum(1 - two)) >= margin).double().mean()
    if share < 1e-4:
        raise ValueError(
            f"margin is {margin}, which is unreachable with alpha {alpha}: of 20,000 pairs of ratios, "
            f"{int(share * 20_000)} are that far apart. Use a smaller margin or a smaller alpha."
        )


class MITLTransform(BatchTransform):
    """MIT-L (Wang et al., 2023) around any criterion: two mixtures of the same rows, decoupled at the logits.

    ``f1 = f(r1 x + (1 - r1) x[order])`` and likewise ``f2``, in two forward passes;
    ``L = (L(a, y) + L(b, y[order])) / 2`` with ``a, b = decouple(f1, f2)``. Evaluation is a plain forward pass.

    Args:
        alpha: Parameter of the Beta distribution of the ratios, above 0.
        margin: Minimum distance between the two ratios, in ``[0, 1)``.

    Raises:
        ValueError: If a parameter is out of range, or the margin is unreachable.

    Deviations:
        The margin is 0.5, the default of the authors' command line; some of their demonstrations have none, so the
        division by the distance of the ratios can explode.

    Example:
        >>> MITLTransform().margin
        0.5
    """

    def __init__(self, alpha: float = 0.5, margin: float = 0.5) -> None:
        super().__init__()
        check_ratios(alpha, margin)
        self.alpha = alpha
        self.margin = margin

    def loss(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar), and decoupled logits ``(N, K)`` of the batch's own images."""
        ratios = draw_ratios(self.alpha, self.margin)
        order = torch.randperm(len(batch.label), device=batch.label.device)
        first, second = (at_least_float32(module(mix(batch.image, order, ratio))) for ratio in ratios)
        own, other = decouple(first, second, ratios)
        loss = module.criterion_value(own, batch.label) + module.criterion_value(other, batch.label[order])
        return loss / 2.0, own


class MITL(ClassificationModule):
    """Train with mixup inference on logits, MIT-L (Wang et al., CVPR 2023).

    Paper: Wang et al. 2023.
    Mechanism: makes two mixtures of each pair and decouples their logits.
    Extra cost: 2 x the forward and backward passes.

    Args:
        num_classes: K; the command line takes it from the data.
        alpha: Parameter of the Beta distribution of the ratios.
        margin: Minimum distance between the two ratios.
        **options: See `ClassificationModule`.

    Example:
        >>> MITL(10, encoder="digits_cnn").hparams.margin
        0.5
    """

    def __init__(
        self, num_classes: int, alpha: float = 0.5, margin: float = 0.5, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(num_classes, **with_transform(options, MITLTransform(alpha, margin)))
