"""RegMixup (Pinto et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from calib_lightning.core import BatchTransform, ClassificationModule, ModuleOptions
from calib_lightning.core.batch_transform import Classifier
from calib_lightning.core.module_options import with_transform
from calib_lightning.methods.mixup import beta_weight, check_alpha, mix
from calib_lightning.types import Batch


class RegMixupTransform(BatchTransform):
    """RegMixup (Pinto et al., 2022) around any criterion: clean and mixed images in one forward pass of 2 N rows.

    ``(L_clean + eta L_mix) / (1 + eta)`` with ``L_mix = w L(f(x~), y) + (1 - w) L(f(x~), y[order])`` and
    ``w ~ Beta(alpha, alpha)``; BatchNorm sees both halves together.

    Args:
        alpha: Parameter of the Beta distribution, above 0; large values keep the weights near 1/2.
        eta: Weight of the mixed images, at least 0.

    Raises:
        ValueError: If ``alpha`` is not above 0 or ``eta`` is negative.

    Deviations:
        The paper's sum ``L_clean + eta L_mix`` is divided by ``1 + eta``, which for ``eta = 1`` equals the authors'
        code (a mean over 2 N rows); the difference is a factor of the learning rate.

    Example:
        >>> RegMixupTransform(alpha=10.0).eta
        1.0
    """

    def __init__(self, alpha: float = 20.0, eta: float = 1.0) -> None:
        super().__init__()
        check_alpha(alpha, "20 for CIFAR-10, 10 for CIFAR-100")
        if not 0 <= eta < float("inf"):
            raise ValueError(f"eta is {eta}; it must be at least 0 and finite. The paper uses 1.")
        self.alpha = alpha
        self.eta = eta

    def loss(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar), and logits ``(N, K)`` of the clean images."""
        weight, order = beta_weight(self.alpha), torch.randperm(len(batch.label), device=batch.label.device)
        logits = module(torch.cat([batch.image, mix(batch.image, order, weight)]))
        clean, mixed = logits.chunk(2)
        own = module.criterion_value(mixed, batch.label)
        other = module.criterion_value(mixed, batch.label[order])
        of_mixed = weight * own + (1.0 - weight) * other
        return (module.criterion_value(clean, batch.label) + self.eta * of_mixed) / (1.0 + self.eta), clean


class RegMixup(ClassificationModule):
    """Train with cross-entropy on clean and mixed images together, RegMixup (Pinto et al., NeurIPS 2022).

    Paper: Pinto et al. 2022.
    Mechanism: trains on clean and mixed images together.
    Extra cost: 2 x the forward and backward passes.

    Args:
        num_classes: K; the command line takes it from the data.
        alpha: Parameter of the Beta distribution; 20 for CIFAR-10, 10 for CIFAR-100.
        eta: Weight of the mixed images.
        **options: See `ClassificationModule`.

    Example:
        >>> RegMixup(10, alpha=10.0, encoder="digits_cnn").hparams.alpha
        10.0
    """

    def __init__(
        self, num_classes: int, alpha: float = 20.0, eta: float = 1.0, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(num_classes, **with_transform(options, RegMixupTransform(alpha, eta)))
