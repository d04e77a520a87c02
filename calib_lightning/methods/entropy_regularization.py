"""Entropy-regularised loss, ERL, also called the confidence penalty (Pereyra et al., ICLR workshop 2017)."""

from __future__ import annotations

from typing import Literal, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described

EntropyReduction = Literal["sum", "mean"]


def entropy_regularization_loss(
    logits: Tensor, labels: Tensor, *, strength: float = 0.1, entropy_reduction: EntropyReduction = "sum"
) -> Tensor:
    """Cross-entropy with a reward for entropy (Pereyra et al., 2017): ``L = CE - b * mean_n H(p_n)``.

    ``H(p) = -sum_k p_k log p_k`` in nats, ``b = strength``.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``.
        strength: ``b``, 0.1 in the literature on calibration.
        entropy_reduction: ``"sum"`` over the classes (the paper), or ``"mean"``, as in some published code, whose
            ``b`` equals ``b / K`` here.

    Returns:
        Scalar, in nats.

    Deviations:
        None with ``"sum"``; probabilities are never clamped.

    Example:
        >>> import torch
        >>> round(entropy_regularization_loss(torch.zeros(1, 2), torch.tensor([0]), strength=1.0).item(), 6)
        0.0
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    log_probs = logits.log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    if entropy_reduction == "mean":
        entropy = entropy / logits.shape[-1]
    return F.cross_entropy(logits, labels) - strength * entropy.mean()


class EntropyRegularizationLoss(Described, nn.Module):
    """Criterion of `entropy_regularization_loss`.

    Args:
        strength: Weight of the entropy, at least 0.
        entropy_reduction: ``"sum"`` or ``"mean"`` over the classes.

    Raises:
        ValueError: If ``strength`` is negative or ``entropy_reduction`` is unknown.
    """

    def __init__(self, strength: float = 0.1, entropy_reduction: EntropyReduction = "sum") -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The usual value is 0.1.")
        if entropy_reduction not in ("sum", "mean"):
            raise ValueError(f"entropy_reduction is {entropy_reduction!r}; it must be 'sum' or 'mean'.")
        self.strength = strength
        self.entropy_reduction: EntropyReduction = entropy_reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return entropy_regularization_loss(
            logits, labels, strength=self.strength, entropy_reduction=self.entropy_reduction
        )


class EntropyRegularization(ClassificationModule):
    """Train with cross-entropy and a reward for entropy, ERL (Pereyra et al., 2017).

    Paper: Pereyra et al. 2017.
    Mechanism: cross-entropy minus entropy (ERL, confidence penalty).
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        strength: Weight of the entropy.
        entropy_reduction: ``"sum"`` or ``"mean"`` over the classes.
        **options: See `ClassificationModule`.

    Example:
        >>> EntropyRegularization(10, strength=0.1, encoder="digits_cnn").hparams.strength
        0.1
    """

    def __init__(
        self,
        num_classes: int,
        strength: float = 0.1,
        entropy_reduction: EntropyReduction = "sum",
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(num_classes, criterion=EntropyRegularizationLoss(strength, entropy_reduction), **options)
