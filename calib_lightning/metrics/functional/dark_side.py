"""Terms that relate calibration error, accuracy and the ranking by confidence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.bins import bin_sums
from calib_lightning.metrics.functional.calibration import ece_from_bins
from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.ordered import order_rows
from calib_lightning.metrics.functional.refinement import auroc_from_ordered
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.undefined import checked_result

_N_BINS = 15
FINE_BINS = 100
"""Number of bins in which "On the Dark Side of Calibration" assumes over-confidence."""

_TIED = 1e-9


class DarkSideTerms(NamedTuple):
    """Terms of `dark_side_terms`, fractions.

    Attributes:
        alpha: Mean confidence.
        beta: ``2 r pi (1 - pi)`` with r the area under the ROC curve of correctness and pi the accuracy.
        gamma: ``(pi^2 + (1 - pi)^2) / 2``.
        residual: ``ECE - (alpha - beta - gamma)``.
    """

    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    residual: Tensor


def dark_side_from(mean_confidence: Tensor, accuracy: Tensor, auroc: Tensor, ece: Tensor) -> DarkSideTerms:
    """The terms, each ``(...)``, from mean confidence, accuracy, AUROC of correctness and ECE."""
    beta = 2.0 * auroc * accuracy * (1.0 - accuracy)
    gamma = 0.5 * (accuracy.square() + (1.0 - accuracy).square())
    return DarkSideTerms(mean_confidence, beta, gamma, ece - (mean_confidence - beta - gamma))


def dark_side_terms(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> DarkSideTerms:
    """Diagnostic terms of mean confidence, accuracy and ranking; **their difference is not the ECE**.

    ``alpha = E[c]``, ``beta = 2 r pi (1 - pi)`` and ``gamma = (pi^2 + (1 - pi)^2) / 2`` with the accuracy pi and the
    area r under the ROC curve of "the prediction is correct" (`correctness_auroc`). ``beta + gamma`` is the accuracy
    of *detecting correct predictions* by a threshold on the confidence, averaged over thresholds that accept uniform
    shares of the rows. It is not the accuracy pi of the classifier, so ``alpha - beta - gamma`` is neither the
    expected calibration error, as has been claimed, nor the signed gap ``E[c] - pi``; ``residual`` is its distance
    from the former. What does hold is ``ECE >= |E[c] - pi|``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        The terms, each 0-d float64, with the calibration error of 15 bins in ``residual``; ``beta`` and ``residual``
        are nan, with a warning, unless there are both correct and incorrect predictions.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> terms = dark_side_terms(probs, torch.tensor([0, 1, 0, 1]), input="probs")
        >>> [round(term.item(), 4) for term in terms]
        [0.75, 0.375, 0.25, 0.325]
    """
    rows = checked_rows("dark_side_terms", logits, labels, confidence, input)
    terms = dark_side_from(
        rows.confidence.mean(dtype=torch.float64),
        rows.correct.mean(dtype=torch.float64),
        auroc_from_ordered(order_rows(rows.log_odds, rows.correct)),
        ece_from_bins(bin_sums(rows.confidence, rows.correct, _N_BINS)),
    )
    checked_result("dark_side_terms", terms.residual, len(labels), int(rows.correct.sum()))
    return terms


def assumption_from_bins(bins: Tensor) -> Tensor:
    """`dark_side_assumption` ``(...)`` from equal-width bins ``(..., M, 3)``; nan without rows."""
    count, confidence, correct = bins.unbind(dim=-1)
    # Sums in another order may differ in their last digits; a bin whose figures are equal holds either way.
    holds = (count > 0) & (correct <= confidence + _TIED * count)
    return holds.sum(dim=-1).double() / (count > 0).sum(dim=-1)


def dark_side_assumption(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> Tensor:
    """Share of the non-empty ones of 100 equal-width bins ``(lo, hi]`` whose accuracy is at most their confidence.

    "On the Dark Side of Calibration" assumes that all bins are so, a share of 1: only then is the ECE of these bins
    the signed gap ``E[c] - pi``, from which `dark_side_terms` starts. A diagnostic: every bin counts once, and chance
    alone moves one with few rows to either side.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> dark_side_assumption(probs, torch.tensor([0, 1, 0, 1]), input="probs")
        tensor(0.5000, dtype=torch.float64)
    """
    rows = checked_rows("dark_side_assumption", logits, labels, confidence, input)
    share = assumption_from_bins(bin_sums(rows.confidence, rows.correct, FINE_BINS))
    return checked_result("dark_side_assumption", share, len(labels))
