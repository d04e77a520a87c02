"""Calibration by pairwise constraints, CPC (Cheng and Vasconcelos, CVPR 2022)."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described

PAIRS_AT_ONCE = 2**22
"""Maximum number of class pairs in memory at once: 16 MiB in float32."""

_BLOCK = 32
"""Factors per product, each in [1/2, 1]: float32 represents 2^-126."""


class _PairwiseLogCosh(torch.autograd.Function):
    """``sum_n sum_{i<j} log(2 cosh((x_ni - x_nj) / 2))`` of x ``(N, M)``, and its gradient ``1/2 sum_j tanh(...)``.

    The forward pass computes both blockwise from one sigmoid per pair and keeps only the gradient ``(N, M)``. With the
    larger entry first, d >= 0 and ``s = sigmoid(d)``, a pair's value is ``d/2 - log s`` and its slope ``s - 1/2``. The
    sum of d only needs the ranks, and one logarithm of a product serves many s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        width = x.shape[1]
        ordered, order = x.sort(dim=-1, descending=True)
        ordered = ordered - ordered[:, :1]
        total = (ordered * ((width - 1) / 2 - torch.arange(width, device=x.device))).sum()
        slopes = []
        for part in torch.split(ordered, max(1, PAIRS_AT_ONCE // (width * min(width, _BLOCK)))):
            slope = torch.zeros_like(part)
            for start in range(0, width, _BLOCK):
                smaller = part[:, start:]
                larger = smaller[:, :_BLOCK]
                block, rest = larger.shape[1], smaller.shape[1]
                # a pair that occurs twice within the block, or an entry paired with itself, is clamped to d = 0: it has
                # no slope, and its log(1/2) is subtracted
                pair = (larger.unsqueeze(2) - smaller.unsqueeze(1)).clamp_min_(0.0).sigmoid_()
                twice = len(part) * block * (block + 1) / 2
                total = total - pair.prod(dim=1).log().sum() - twice * math.log(2.0)
                slope[:, start : start + block] += pair.sum(dim=2) - rest / 2
                slope[:, start:] -= pair.sum(dim=1) - block / 2
            slopes.append(slope)
        ctx.save_for_backward(torch.zeros_like(x).scatter(-1, order, torch.cat(slopes)))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph=True: the slope would be treated as a constant
            raise RuntimeError("The gradient of CPC cannot be differentiated again. Omit create_graph.")
        (slope,) = ctx.saved_tensors
        gradient: Tensor = gradients[0] * slope
        return gradient


def cpc_loss(
    logits: Tensor, labels: Tensor, *, discrimination_strength: float = 0.1, exclusion_strength: float = 1.0
) -> Tensor:
    """Cross-entropy with pairwise constraints (Cheng and Vasconcelos, 2022): ``L = CE + a BDC + b BEC``.

    ``BDC = -1/(N (K-1)) sum_n sum_{k != y} log s(l_ny - l_nk)`` separates the true class from every other one;
    ``BEC = -1/(N (K-1) (K-2)) sum_n sum_{i != j, both != y} 1/2 log s(l_ni - l_nj)`` keeps the others together; s is
    the logistic function. Time is O(N K^2); memory is independent of the number of pairs.

    Args:
        logits: ``(N, K)`` with K at least 3.
        labels: ``(N,)`` int64.
        discrimination_strength: ``a``, at least 0.
        exclusion_strength: ``b``, at least 0.

    Returns:
        Scalar, in nats.

    Raises:
        ValueError: If K is below 3.

    Deviations:
        There is no official code; the defaults of a and b come from a published comparison. Pairs ``i = j``, which
        would add a constant, are omitted. The gradient of BEC cannot be differentiated again; trying to is an error.

    Example:
        >>> loss = cpc_loss(torch.zeros(1, 3), torch.tensor([0]), discrimination_strength=0.0, exclusion_strength=1.0)
        >>> round(loss.item(), 4)
        1.4452
    """
    logits, labels = checked_batch(logits, labels, soft=False)
    rows, classes = logits.shape
    _check_classes(classes)
    column = labels.unsqueeze(-1)
    others = torch.arange(classes - 1, device=logits.device).expand(rows, -1)
    wrong = logits.gather(-1, others + (others >= column))
    discrimination = -F.logsigmoid(logits.gather(-1, column) - wrong).mean()
    exclusion = _PairwiseLogCosh.apply(wrong) / (rows * (classes - 1) * (classes - 2))
    loss: Tensor = (
        F.cross_entropy(logits, labels) + discrimination_strength * discrimination + exclusion_strength * exclusion
    )
    return loss


def _check_classes(classes: int) -> None:
    if classes < 3:
        raise ValueError(
            f"num_classes is {classes}; it must be at least 3 for CPC, which needs pairs of wrong classes. Use another "
            "method for two classes, such as focal loss or label smoothing."
        )


class CPCLoss(Described, nn.Module):
    """Criterion of `cpc_loss`.

    Args:
        discrimination_strength: Weight of pairs with the true class, at least 0.
        exclusion_strength: Weight of pairs of other classes, at least 0.

    Raises:
        ValueError: If a weight is negative.
    """

    def __init__(self, discrimination_strength: float = 0.1, exclusion_strength: float = 1.0) -> None:
        super().__init__()
        for name, value in (
            ("discrimination_strength", discrimination_strength),
            ("exclusion_strength", exclusion_strength),
        ):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be at least 0 and finite. Usual values are 0.1 to 1.")
        self.discrimination_strength = discrimination_strength
        self.exclusion_strength = exclusion_strength

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``."""
        return cpc_loss(
            logits,
            labels,
            discrimination_strength=self.discrimination_strength,
            exclusion_strength=self.exclusion_strength,
        )


class CPC(ClassificationModule):
    """Train with cross-entropy and pairwise constraints (Cheng and Vasconcelos, CVPR 2022).

    Paper: Cheng and Vasconcelos 2022.
    Mechanism: separates the true class from all others and keeps the others together.
    Extra cost: O(N K^2).

    Args:
        num_classes: K, at least 3; the command line takes it from the data.
        discrimination_strength: Weight of pairs with the true class.
        exclusion_strength: Weight of pairs of other classes.
        **options: See `ClassificationModule`.

    Raises:
        ValueError: If ``num_classes`` is below 3 or a weight is negative.

    Example:
        >>> CPC(10, encoder="digits_cnn").hparams.exclusion_strength
        1.0
    """

    def __init__(
        self,
        num_classes: int,
        discrimination_strength: float = 0.1,
        exclusion_strength: float = 1.0,
        **options: Unpack[ModuleOptions],
    ) -> None:
        _check_classes(num_classes)
        super().__init__(num_classes, criterion=CPCLoss(discrimination_strength, exclusion_strength), **options)
