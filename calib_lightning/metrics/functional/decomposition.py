"""The Brier score of the confidence, split into calibration and discrimination."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calib_lightning.metrics.functional.adaptive import with_a_group
from calib_lightning.metrics.functional.bins import at_least_tiny, bin_index, bin_sums, sums_in_bins
from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.undefined import checked_result


class MurphyDecomposition(NamedTuple):
    """Binned terms of the Brier score of the confidence.

    ``brier = reliability - resolution + uncertainty + within_variance - within_covariance``, exactly.

    Attributes:
        brier: Mean of ``(c - a)^2``, in ``[0, 1]``.
        reliability: Mean squared gap between confidence and accuracy of the bins; smaller is better.
        resolution: Variance of the accuracy over bins; larger is better.
        uncertainty: ``acc (1 - acc)`` of the whole set.
        within_variance: Variance of the confidence inside the bins.
        within_covariance: Twice the covariance of confidence and correctness inside the bins.
    """

    brier: Tensor
    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_variance: Tensor
    within_covariance: Tensor


class CORPDecomposition(NamedTuple):
    """Terms of the Brier score of the confidence without bins.

    ``brier = miscalibration - discrimination + uncertainty``, exactly.

    Attributes:
        brier: Mean of ``(c - a)^2``, in ``[0, 1]``.
        miscalibration: What isotonic recalibration would remove; smaller is better.
        discrimination: What the recalibrated confidence gains over the constant accuracy; larger is better.
        uncertainty: ``acc (1 - acc)`` of the whole set.
    """

    brier: Tensor
    miscalibration: Tensor
    discrimination: Tensor
    uncertainty: Tensor


def moment_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Sums ``(M, 2)`` float64 of ``c^2`` and ``c a`` in the bins of `bin_sums`."""
    wide = confidence.double()
    return sums_in_bins(bin_index(confidence, n_bins), n_bins, [wide.square(), wide * correct])


def murphy_from_bins(bins: Tensor, moments: Tensor) -> MurphyDecomposition:
    """`murphy_decomposition`, terms ``(...)``, of bins ``(..., M, 3)`` and their moments ``(..., M, 2)``."""
    count, confidence, correct = bins.double().unbind(dim=-1)
    squares, products = moments.double().unbind(dim=-1)
    total = count.sum(dim=-1)
    safe = at_least_tiny(count)
    accuracy = correct.sum(dim=-1) / total
    # Sums over the rows of a bin; below, each is divided by the number of all rows.
    excess = correct - count * accuracy.unsqueeze(-1)
    return MurphyDecomposition(
        brier=(squares - 2.0 * products + correct).sum(dim=-1) / total,
        reliability=((confidence - correct).square() / safe).sum(dim=-1) / total,
        resolution=(excess.square() / safe).sum(dim=-1) / total,
        uncertainty=accuracy * (1.0 - accuracy),
        within_variance=(squares - confidence.square() / safe).sum(dim=-1) / total,
        within_covariance=2.0 * (products - confidence * correct / safe).sum(dim=-1) / total,
    )


def corp_from_ordered(ordered: Ordered) -> CORPDecomposition:
    """`corp_decomposition`, terms ``(...)``, of groups ``(..., G)``; isotonic regression runs on the CPU."""
    from sklearn.isotonic import isotonic_regression  # this import takes a second

    count, correct, confidence = with_a_group(ordered)
    weights, positives = (x.reshape(-1, x.shape[-1]).cpu().numpy() for x in (count, correct))
    recalibrated = np.zeros_like(weights)
    for row, (weight, positive) in enumerate(zip(weights, positives, strict=True)):
        present = weight > 0
        if present.any():
            frequency = positive[present] / weight[present]
            recalibrated[row, present] = isotonic_regression(frequency, sample_weight=weight[present])
    total = count.sum(dim=-1)
    accuracy = correct.sum(dim=-1) / total

    def score(position: Tensor) -> Tensor:
        # Mean of (x - a)^2, with one x per group.
        return (position * (position * count - 2.0 * correct) + correct).sum(dim=-1) / total

    brier = score(confidence / at_least_tiny(count))
    best = score(torch.from_numpy(recalibrated).reshape(count.shape).to(count.device))
    uncertainty = accuracy * (1.0 - accuracy)
    return CORPDecomposition(brier, brier - best, uncertainty - best, uncertainty)


def murphy_decomposition(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> MurphyDecomposition:
    """Binned decomposition of the Brier score of the predicted class (Murphy, 1973; Stephenson et al., 2008).

    With confidence c, correctness a and M equal-width bins ``(lo, hi]``:
    ``mean (c - a)^2 = REL - RES + UNC + WBV - WBC``, where ``REL = sum_m n_m / N (conf_m - acc_m)^2``,
    ``RES = sum_m n_m / N (acc_m - acc)^2``, ``UNC = acc (1 - acc)``, WBV is the variance of c within bins and WBC twice
    the covariance of c and a within bins. The usual three terms leave out the last two and are exact only where c is
    constant in each bin.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        The terms, 0-d float64; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
        >>> terms = murphy_decomposition(probs, torch.tensor([0, 0]), input="probs")
        >>> terms.brier, terms.reliability, terms.uncertainty
        (tensor(0.3125, dtype=torch.float64), tensor(0.0625, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    rows = checked_rows("murphy_decomposition", logits, labels, confidence, input)
    terms = murphy_from_bins(
        bin_sums(rows.confidence, rows.correct, n_bins), moment_sums(rows.confidence, rows.correct, n_bins)
    )
    checked_result("murphy_decomposition", terms.brier, len(labels))
    return terms


def corp_decomposition(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> CORPDecomposition:
    """Decomposition of the Brier score of the predicted class without bins (Dimitriadis et al., 2021).

    With x the isotonic regression of correctness a on confidence c and S the mean squared distance to a,
    ``S(c) = MCB - DSC + UNC`` with ``MCB = S(c) - S(x)``, ``DSC = S(acc) - S(x)`` and ``UNC = S(acc)``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        The terms, 0-d float64; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
        >>> terms = corp_decomposition(probs, torch.tensor([0, 0]), input="probs")
        >>> terms.brier, terms.miscalibration, terms.discrimination
        (tensor(0.3125, dtype=torch.float64), tensor(0.0625, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    rows = checked_rows("corp_decomposition", logits, labels, confidence, input)
    terms = corp_from_ordered(order_rows(rows.log_odds, rows.correct))
    checked_result("corp_decomposition", terms.brier, len(labels))
    return terms
