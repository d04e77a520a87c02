"""Adaptive and conditional label smoothing, ACLS (Park et al., ICCV 2023)."""

from __future__ import annotations

from typing import Literal, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch
from calib_lightning.utils.described import Described

PositiveReference = Literal["zero", "min"]


def acls_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    margin: float = 10.0,
    strength: float = 0.1,
    positive_weight: float = 1.0,
    negative_weight: float = 0.1,
    positive_reference: PositiveReference = "zero",
) -> Tensor:
    """Adaptive and conditional label smoothing (Park et al., 2023): ``L = CE + a (w_p P + w_n Q)``.

    ``P = mean_n relu(l_nj - m)^2`` and ``Q = 1/(N (K-1)) sum_n sum_{k != j} relu(sg(l_nj) - l_nk - m)^2``, where j is
    the predicted class, not necessarily the true one, m is the margin and sg stops the gradient.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)`` for the cross-entropy; the penalties ignore them.
        margin: ``m``, at least 0.
        strength: ``a``, at least 0.
        positive_weight: ``w_p``, at least 0.
        negative_weight: ``w_n``, at least 0.
        positive_reference: ``"zero"`` as above; ``"min"`` measures from the smallest logit,
            ``P = mean_n relu(l_nj - min_k l_nk - m)^2``.

    Returns:
        Scalar, in nats.

    Deviations:
        ``P`` follows the official code, which uses the logit itself; ``positive_reference="min"`` is the reading of
        the paper that measures it from the smallest logit. Among equal largest logits, the first is the prediction.

    Example:
        >>> import torch
        >>> round(acls_loss(torch.tensor([[4.0, 0.0]]), torch.tensor([0]), margin=2.0, strength=1.0).item(), 4)
        4.4181
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    rows, classes = logits.shape
    largest = logits.max(dim=-1, keepdim=True).values
    height = largest - logits.amin(dim=-1, keepdim=True) if positive_reference == "min" else largest
    positive = F.relu(height - margin).square().mean()
    # the predicted class is within the margin, so the sum over all classes equals that over the others
    negative = F.relu(largest.detach() - logits - margin).square().sum() / (rows * max(classes - 1, 1))
    penalty = positive_weight * positive + negative_weight * negative
    return F.cross_entropy(logits, labels) + strength * penalty


class ACLSLoss(Described, nn.Module):
    """Criterion of `acls_loss`.

    Args:
        margin: Distance without penalty, at least 0.
        strength: Weight of both penalties, at least 0.
        positive_weight: Weight of the penalty on the predicted class, at least 0.
        negative_weight: Weight of the penalty on the other classes, at least 0.
        positive_reference: ``"zero"`` or ``"min"``: the reference point of the predicted class's logit.

    Raises:
        ValueError: If a value is negative or ``positive_reference`` is unknown.
    """

    def __init__(
        self,
        margin: float = 10.0,
        strength: float = 0.1,
        positive_weight: float = 1.0,
        negative_weight: float = 0.1,
        positive_reference: PositiveReference = "zero",
    ) -> None:
        super().__init__()
        if not 0 <= margin < float("inf"):
            raise ValueError(f"margin is {margin}; it must be at least 0 and finite. Usual values are 6 to 10.")
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The authors' code uses 0.1.")
        if not 0 <= positive_weight < float("inf"):
            raise ValueError(
                f"positive_weight is {positive_weight}; it must be at least 0 and finite. The authors' code uses 1."
            )
        if not 0 <= negative_weight < float("inf"):
            raise ValueError(
                f"negative_weight is {negative_weight}; it must be at least 0 and finite. The authors' code uses 0.1."
            )
        if positive_reference not in ("zero", "min"):
            raise ValueError(f"positive_reference is {positive_reference!r}; it must be 'zero' or 'min'.")
        self.margin = margin
        self.strength = strength
        self.positive_weight = positive_weight
        self.negative_weight = negative_weight
        self.positive_reference: PositiveReference = positive_reference

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)`` or ``(N, K)``."""
        return acls_loss(
            logits,
            labels,
            margin=self.margin,
            strength=self.strength,
            positive_weight=self.positive_weight,
            negative_weight=self.negative_weight,
            positive_reference=self.positive_reference,
        )


class ACLS(ClassificationModule):
    """Train with adaptive and conditional label smoothing (Park et al., ICCV 2023).

    Paper: Park et al. 2023.
    Mechanism: penalises the predicted class's logit and logits far below it quadratically beyond a margin.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        margin: Distance without penalty; 10 in the authors' code, 6 in other published runs on CIFAR.
        strength: Weight of both penalties.
        positive_weight: Weight of the penalty on the predicted class.
        negative_weight: Weight of the penalty on the other classes.
        positive_reference: ``"zero"`` or ``"min"``: the reference point of the predicted class's logit.
        **options: See `ClassificationModule`.

    Example:
        >>> ACLS(10, margin=6.0, encoder="digits_cnn").hparams.margin
        6.0
    """

    def __init__(
        self,
        num_classes: int,
        margin: float = 10.0,
        strength: float = 0.1,
        positive_weight: float = 1.0,
        negative_weight: float = 0.1,
        positive_reference: PositiveReference = "zero",
        **options: Unpack[ModuleOptions],
    ) -> None:
        criterion = ACLSLoss(margin, strength, positive_weight, negative_weight, positive_reference)
        super().__init__(num_classes, criterion=criterion, **options)
