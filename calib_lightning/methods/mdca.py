"""Multi-class difference in confidence and accuracy, MDCA (Hebbalaguppe et al., CVPR 2022)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import checked_batch, one_hot
from calib_lightning.methods.focal import FocalLoss
from calib_lightning.utils.described import Described


def mdca_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference between mean probability and class frequency (Hebbalaguppe et al., 2022), averaged over classes.

    ``MDCA = 1/K sum_k |mean_n p_nk - mean_n 1[y_n = k]|``. Classes that are absent from the batch count too.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``: then ``mean_n t_nk`` is the frequency.

    Returns:
        Scalar in ``[0, 2 / K]``.

    Example:
        >>> import torch
        >>> mdca_penalty(torch.zeros(1, 2), torch.tensor([0])).item()
        0.5
    """
    logits, labels = checked_batch(logits, labels, soft=True)
    targets = one_hot(labels, logits.shape[-1], logits.dtype)
    return (logits.softmax(dim=-1) - targets).mean(dim=0).abs().mean()


class MDCALoss(Described, nn.Module):
    """A criterion with `mdca_penalty` added: ``L = criterion + b MDCA``.

    Args:
        criterion: Classification loss. Default: focal loss with gamma 1, the paper's FL+MDCA.
        strength: ``b``, at least 0; 1 in the authors' scripts.

    Raises:
        ValueError: If ``strength`` is negative.
    """

    def __init__(self, criterion: nn.Module | None = None, strength: float = 1.0) -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The authors' scripts use 1.")
        self.criterion = FocalLoss(1.0) if criterion is None else criterion
        self.strength = strength

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``, or ``(N, K)`` if the criterion accepts them."""
        logits, labels = checked_batch(logits, labels, soft=True)
        classification: Tensor = self.criterion(logits, labels)
        return classification + self.strength * mdca_penalty(logits, labels)


class MDCA(ClassificationModule):
    """Train with a criterion and the MDCA penalty (Hebbalaguppe et al., CVPR 2022).

    Paper: Hebbalaguppe et al. 2022.
    Mechanism: pulls the mean probability of every class towards its frequency in the batch.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        criterion: Classification loss, focal loss with gamma 1 by default. Checkpoints do not store it: pass it again
            to continue training.
        strength: Weight of the penalty.
        **options: See `ClassificationModule`.

    Example:
        >>> MDCA(10, criterion=nn.CrossEntropyLoss(), encoder="digits_cnn").hparams.strength
        1.0
    """

    def __init__(
        self,
        num_classes: int,
        criterion: nn.Module | None = None,
        strength: float = 1.0,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(num_classes, criterion=MDCALoss(criterion, strength), **options)
