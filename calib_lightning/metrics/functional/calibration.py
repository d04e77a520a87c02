"""Calibration errors of the predicted class over equal-width bins, and the signed gap."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.metrics.functional.bins import at_least_tiny
from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.proper import mean_of_rows
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.twins import of_bins


def ece_from_bins(sums: Tensor) -> Tensor:
    """Expected calibration error of binned sums, ``sum_m |S_correct,m - S_confidence,m| / N``.

    Args:
        sums: ``(..., M, 3)`` of `bin_sums`, or weighted sums of that form.

    Returns:
        ``(...)`` float64 in ``[0, 1]``; nan without rows.

    Example:
        >>> ece_from_bins(torch.tensor([[2.0, 0.5, 1.0], [2.0, 1.5, 1.0]], dtype=torch.float64))
        tensor(0.2500, dtype=torch.float64)
    """
    count, confidence, correct = sums.double().unbind(dim=-1)
    return (correct - confidence).abs_().sum(dim=-1) / count.sum(dim=-1)


def mce_from_bins(sums: Tensor) -> Tensor:
    """``max_m |S_correct,m - S_confidence,m| / n_m`` over bins with rows ``(..., M, 3)``."""
    count, confidence, correct = sums.double().unbind(dim=-1)
    largest = (correct - confidence).abs_().div_(at_least_tiny(count)).amax(dim=-1)
    return largest.masked_fill_(count.sum(dim=-1) == 0, torch.nan)


def rmsce_from_bins(sums: Tensor) -> Tensor:
    """``sqrt(sum_m (S_correct,m - S_confidence,m)^2 / n_m / N)`` of bins ``(..., M, 3)``."""
    count, confidence, correct = sums.double().unbind(dim=-1)
    squares = (correct - confidence).square_().div_(at_least_tiny(count))
    return (squares.sum(dim=-1) / count.sum(dim=-1)).sqrt_()


def overconfidence_error_from_bins(sums: Tensor) -> Tensor:
    """``sum_m S_confidence,m max(S_confidence,m - S_correct,m, 0) / n_m / N`` of bins ``(..., M, 3)``."""
    count, confidence, correct = sums.double().unbind(dim=-1)
    products = (confidence - correct).clamp_min_(0.0).mul_(confidence).div_(at_least_tiny(count))
    return products.sum(dim=-1) / count.sum(dim=-1)


def over_ece_from_bins(sums: Tensor) -> Tensor:
    """``sum_m max(S_confidence,m - S_correct,m, 0) / N`` of bins ``(..., M, 3)``."""
    count, confidence, correct = sums.double().unbind(dim=-1)
    return (confidence - correct).clamp_min_(0.0).sum(dim=-1) / count.sum(dim=-1)


def under_ece_from_bins(sums: Tensor) -> Tensor:
    """``sum_m max(S_correct,m - S_confidence,m, 0) / N`` of bins ``(..., M, 3)``."""
    count, confidence, correct = sums.double().unbind(dim=-1)
    return (correct - confidence).clamp_min_(0.0).sum(dim=-1) / count.sum(dim=-1)


def ece(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Expected calibration error of the predicted class (Guo et al., 2017) with M equal-width bins ``(lo, hi]``.

    ``ECE = sum_m n_m / N |acc_m - conf_m|``, a fraction.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> ece(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 0]), n_bins=10, input="probs")
        tensor(0.2000, dtype=torch.float64)
    """
    return of_bins("ece", ece_from_bins, n_bins, logits, labels, confidence, input)


def mce(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Maximum calibration error of the predicted class (Guo et al., 2017) with M equal-width bins ``(lo, hi]``.

    ``MCE = max_m |acc_m - conf_m|`` over the bins that hold rows, a fraction. A single row in a bin can decide it,
    so it says little about small sets.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> mce(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), n_bins=10, input="probs")
        tensor(0.7000, dtype=torch.float64)
    """
    return of_bins("mce", mce_from_bins, n_bins, logits, labels, confidence, input)


def rmsce(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Root mean square calibration error of the predicted class (Hendrycks et al., 2019) with M equal-width bins.

    ``RMSCE = sqrt(sum_m n_m / N (acc_m - conf_m)^2)``, a fraction; the bins are ``(lo, hi]``.

    Deviations: the paper uses bins of equal mass; these are of equal width, those of `ece`.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> rmsce(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), n_bins=10, input="probs")
        tensor(0.5000, dtype=torch.float64)
    """
    return of_bins("rmsce", rmsce_from_bins, n_bins, logits, labels, confidence, input)


def overconfidence_error(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Overconfidence error of the predicted class (Thulasidasan et al., 2019) with M equal-width bins ``(lo, hi]``.

    ``OE = sum_m n_m / N conf_m max(conf_m - acc_m, 0)``, a fraction: confident mistakes cost most.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> overconfidence_error(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), n_bins=10, input="probs")
        tensor(0.2450, dtype=torch.float64)
    """
    return of_bins("overconfidence_error", overconfidence_error_from_bins, n_bins, logits, labels, confidence, input)


def over_ece(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Part of the expected calibration error that comes from over-confident bins.

    ``ECE+ = sum_m n_m / N max(conf_m - acc_m, 0)``, a fraction. ``over_ece + under_ece`` is `ece`, and
    ``over_ece - under_ece`` is `signed_gap`. The M bins are of equal width, ``(lo, hi]``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> over_ece(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), n_bins=10, input="probs")
        tensor(0.3500, dtype=torch.float64)
    """
    return of_bins("over_ece", over_ece_from_bins, n_bins, logits, labels, confidence, input)


def under_ece(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Part of the expected calibration error that comes from under-confident bins.

    ``ECE- = sum_m n_m / N max(acc_m - conf_m, 0)``, a fraction. ``over_ece + under_ece`` is `ece`, and
    ``over_ece - under_ece`` is `signed_gap`. The M bins are of equal width, ``(lo, hi]``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> under_ece(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), n_bins=10, input="probs")
        tensor(0.0500, dtype=torch.float64)
    """
    return of_bins("under_ece", under_ece_from_bins, n_bins, logits, labels, confidence, input)


def signed_gap(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> Tensor:
    """Mean confidence minus accuracy, ``E[c] - E[correct]``: positive means over-confident.

    Its absolute value never exceeds the expected calibration error.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[-1, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> signed_gap(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), input="probs")
        tensor(0.3000, dtype=torch.float64)
    """
    rows = checked_rows("signed_gap", logits, labels, confidence, input)
    return mean_of_rows("signed_gap", rows.confidence.double() - rows.correct.double())
