"""Mixup inference in training after every block, MIT-A (Wang et al., CVPR 2023)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from calib_lightning.core import BatchTransform, ClassificationModule, ModuleOptions
from calib_lightning.core.batch_transform import Classifier
from calib_lightning.core.module_options import with_transform
from calib_lightning.functional import at_least_float32
from calib_lightning.methods.mit_l import check_ratios, decouple, draw_ratios
from calib_lightning.types import Batch


class MITATransform(BatchTransform):
    """MIT-A (Wang et al., 2023) around any criterion: inputs are mixed before and decoupled after every block.

    The blocks are the encoder's stem and stages, the last one followed by the head. Each block receives two mixtures of
    its inputs ``a`` and ``b = a[order]`` with fresh ratios, and yields ``a`` and ``b`` of the next block. After the
    last one ``L = (L(a, y) + L(b, y[order])) / 2``. Evaluation is a plain forward pass.

    Args:
        alpha: Parameter of the Beta distribution of the ratios, above 0.
        margin: Minimum distance between the two ratios, in ``[0, 1)``.

    Raises:
        ValueError: If a parameter is out of range, or the margin is unreachable.

    Deviations:
        The margin is 0.5, as in the authors' demonstration of MIT-A.

    Example:
        >>> MITATransform().margin
        0.5
    """

    def __init__(self, alpha: float = 0.5, margin: float = 0.5) -> None:
        super().__init__()
        check_ratios(alpha, margin)
        self.alpha = alpha
        self.margin = margin

    def attach(self, module: Classifier) -> None:
        """Reject an encoder that is not a sequence of blocks.

        Args:
            module: The module.

        Raises:
            NoBlocksError: If the encoder has no blocks.
        """
        _ = module.encoder.blocks

    def loss(self, module: Classifier, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar), and decoupled logits ``(N, K)`` of the batch's own images."""
        order = torch.randperm(len(batch.label), device=batch.label.device)
        blocks = list(module.encoder.blocks)
        own, other = batch.image, batch.image[order]
        for block in [*blocks[:-1], nn.Sequential(blocks[-1], nn.Flatten(1), module.head)]:
            ratios = draw_ratios(self.alpha, self.margin)
            r1, r2 = ratios
            # decouple in float32, since it takes differences; continue in the network's precision
            mixtures = (
                (r1 * own + (1.0 - r1) * other).to(batch.image.dtype),
                (r2 * own + (1.0 - r2) * other).to(batch.image.dtype),
            )
            first, second = (at_least_float32(block(mixture)) for mixture in mixtures)
            own, other = decouple(first, second, ratios)
        loss = module.criterion_value(own, batch.label) + module.criterion_value(other, batch.label[order])
        return loss / 2.0, own


class MITA(ClassificationModule):
    """Train with mixup inference after every block, MIT-A (Wang et al., CVPR 2023).

    Paper: Wang et al. 2023.
    Mechanism: mixes inputs before and decouples outputs after every block.
    Extra cost: 2 x the forward and backward passes.

    Args:
        num_classes: K; the command line takes it from the data.
        alpha: Parameter of the Beta distribution of the ratios.
        margin: Minimum distance between the two ratios.
        **options: See `ClassificationModule`; the encoder must have blocks.

    Example:
        >>> MITA(10, encoder="digits_cnn").hparams.margin
        0.5
    """

    def __init__(
        self, num_classes: int, alpha: float = 0.5, margin: float = 0.5, **options: Unpack[ModuleOptions]
    ) -> None:
        super().__init__(num_classes, **with_transform(options, MITATransform(alpha, margin)))
