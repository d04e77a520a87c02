"""Maximum mean calibration error, MMCE (Kumar, Sarawagi and Jain, ICML 2018)."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, ModuleOptions
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.utils.described import Described

Normalization = Literal["paper", "official"]

KERNEL_WIDTH = 0.4


def _sorted_confidence_and_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
    confidence, order = confidence.sort()
    return confidence, (predicted == labels)[order].to(confidence.dtype)


def _pairings(confidence: Tensor, weights: Tensor) -> Tensor:
    """``sum_{i,j} u_i k(r_i, r_j) v_j`` for all pairs of rows u, v of ``weights``, ``(W, N)`` to ``(W, W)``.

    O(N log N) time and O(N) memory: for r_j <= r_i the kernel ``exp(-|r_i - r_j| / s)`` is the product
    ``exp(-r_i / s) exp(r_j / s)``, so a running sum over sorted confidences replaces the N x N matrix; symmetry gives
    the other half. Rows of equal confidence are summed separately: there the kernel is 1 and, like ``|x|`` at 0, has
    slope 0.
    """
    values, order = confidence.sort()
    weights = weights.index_select(-1, order)
    grow = torch.exp((values - 0.5) / KERNEL_WIDTH)  # centred at 1/2: between 0.28 and 3.5
    fixed = values.detach()
    first, last = torch.searchsorted(fixed, fixed), torch.searchsorted(fixed, fixed, right=True)
    below = F.pad((weights * grow).cumsum(-1), (1, 0)).index_select(-1, first) / grow
    counted = F.pad(weights.cumsum(-1), (1, 0))
    half = below + 0.5 * (counted.index_select(-1, last) - counted.index_select(-1, first))
    one_way = (weights.unsqueeze(1) * half).sum(dim=-1)
    return one_way + one_way.T


def mmce_penalty(logits: Tensor, labels: Tensor, *, sqrt: bool = False) -> Tensor:
    """Squared maximum mean calibration error of a batch (Kumar et al., 2018).

    ``M = 1/N^2 sum_{i,j} (c_i - r_i) (c_j - r_j) k(r_i, r_j)`` with confidence r, correctness c (no gradient) and
    ``k(a, b) = exp(-|a - b| / 0.4)``; the gradient also flows through k.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
        sqrt: Whether to return ``sqrt(M + 1e-10)``, the paper's MMCE; the official code uses the square.

    Returns:
        Scalar, at least 0.

    Example:
        >>> round(mmce_penalty(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.25
    """
    logits, labels = checked_batch(logits, labels, soft=False)
    confidence, correct = _sorted_confidence_and_correct(logits, labels)
    gap = (correct - confidence) / len(confidence)
    squared = _pairings(confidence, gap.unsqueeze(0)).sum().clamp_min(0.0)
    return torch.sqrt(squared + 1e-10) if sqrt else squared


def weighted_mmce_penalty(logits: Tensor, labels: Tensor, *, normalization: Normalization = "paper") -> Tensor:
    """Weighted maximum mean calibration error of a batch (Kumar et al., 2018), separating correct and wrong rows.

    ``sqrt(sum_{C,C} (1-r_i)(1-r_j) k / m^2 + sum_{I,I} r_i r_j k / n^2 - 2 sum_{C,I} (1-r_i) r_j k / (m n) + 1e-10)``
    with m correct rows C and n wrong rows I; 0 if either is empty.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` int64.
        normalization: ``"paper"`` as above; ``"official"`` divides the three terms by ``m^2 + 1e-5``, ``n^2 + 1e-5``
            and ``m n + 1e-5`` a second time, like the authors' code and its ports. The weight of the penalty is not
            transferable between the two.

    Returns:
        Scalar, at least 0.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
        >>> round(weighted_mmce_penalty(logits, torch.tensor([0, 1])).item(), 4)
        0.6548
    """
    logits, labels = checked_batch(logits, labels, soft=False)
    confidence, correct = _sorted_confidence_and_correct(logits, labels)
    m, n = correct.sum(), (1.0 - correct).sum()
    # if one set is empty, the value is unused but its gradient must be finite
    right = correct * (1.0 - confidence) / m.clamp_min(1.0)
    wrong = (1.0 - correct) * confidence / n.clamp_min(1.0)
    if normalization == "official":
        pairs = _pairings(confidence, torch.stack([right, wrong]))
        of_right, of_wrong, of_both = pairs[0, 0], pairs[1, 1], pairs[0, 1]
        squared = of_right / (m**2 + 1e-5) + of_wrong / (n**2 + 1e-5) - 2.0 * of_both / (m * n + 1e-5)
    else:
        squared = _pairings(confidence, (right - wrong).unsqueeze(0)).sum()  # the square of the difference
    penalty = torch.sqrt(squared.clamp_min(0.0) + 1e-10)
    return torch.where((m > 0) & (n > 0), penalty, 0.0)


def mmce_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    strength: float = 2.0,
    weighted: bool = True,
    normalization: Normalization = "official",
    sqrt: bool = False,
) -> Tensor:
    """Cross-entropy with a penalty on miscalibration (Kumar et al., 2018), ``L = CE + lambda MMCE``.

    Args:
        logits: ``(N, K)``; batches of at least 128 rows are advisable.
        labels: ``(N,)`` int64.
        strength: ``lambda``, at least 0; 2 in Mukhoti et al. (2020), with the weighted penalty normalised as in the
            official code. With ``normalization="paper"`` the same value has far more weight: start near 0.2.
        weighted: Whether to use `weighted_mmce_penalty` instead of `mmce_penalty`.
        normalization: ``"paper"`` or ``"official"``, for the weighted penalty.
        sqrt: Whether to take the root of the unweighted penalty.

    Returns:
        Scalar, in nats.

    Deviations:
        The defaults are those of the published code, for which the published weights are meant.
        ``normalization="paper"`` and, for the unweighted penalty, ``sqrt=True`` give the paper's equations.

    Example:
        >>> round(mmce_loss(torch.zeros(1, 2), torch.tensor([0])).item(), 4)
        0.6931
    """
    if weighted:
        penalty = weighted_mmce_penalty(logits, labels, normalization=normalization)
    else:
        penalty = mmce_penalty(logits, labels, sqrt=sqrt)
    return F.cross_entropy(at_least_float32(logits), labels.long()) + strength * penalty


class MMCELoss(Described, nn.Module):
    """Criterion of `mmce_loss`.

    Args:
        strength: Weight of the penalty, at least 0.
        weighted: Whether correct and wrong rows are separated.
        normalization: ``"paper"`` or ``"official"``, for the weighted penalty.
        sqrt: Whether to take the root of the unweighted penalty.

    Raises:
        ValueError: If ``strength`` is negative, ``normalization`` is unknown, or ``sqrt`` is combined with the
            weighted penalty.
    """

    def __init__(
        self,
        strength: float = 2.0,
        weighted: bool = True,
        normalization: Normalization = "official",
        sqrt: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The usual value is 2.")
        if normalization not in ("paper", "official"):
            raise ValueError(f"normalization is {normalization!r}; it must be 'paper' or 'official'.")
        if sqrt and weighted:
            raise ValueError(
                "sqrt is true, but the weighted penalty already is a root. Set weighted to false, or omit sqrt."
            )
        self.strength = strength
        self.weighted = weighted
        self.normalization: Normalization = normalization
        self.sqrt = sqrt

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``."""
        return mmce_loss(
            logits,
            labels,
            strength=self.strength,
            weighted=self.weighted,
            normalization=self.normalization,
            sqrt=self.sqrt,
        )


class MMCE(ClassificationModule):
    """Train with the maximum mean calibration error (Kumar, Sarawagi and Jain, ICML 2018).

    Paper: Kumar et al. 2018.
    Mechanism: cross-entropy plus a kernel estimate of the batch's miscalibration.
    Extra cost: O(N log N).

    Args:
        num_classes: K; the command line takes it from the data.
        strength: Weight of the penalty; 2 is for the official normalisation, start near 0.2 with ``"paper"``.
        weighted: Whether correct and wrong rows are separated (MMCE_w).
        normalization: ``"official"`` or ``"paper"``, for the weighted penalty (see `weighted_mmce_penalty`).
        sqrt: Whether to take the root of the unweighted penalty.
        **options: See `ClassificationModule`.

    Example:
        >>> MMCE(10, encoder="digits_cnn").hparams.strength
        2.0
    """

    def __init__(
        self,
        num_classes: int,
        strength: float = 2.0,
        weighted: bool = True,
        normalization: Normalization = "official",
        sqrt: bool = False,
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(num_classes, criterion=MMCELoss(strength, weighted, normalization, sqrt), **options)
