"""Calibration errors of the predicted class over equal-width bins, and the signed gap."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib_lightning.metrics.functional.proper import mean_of_rows
from calib_lightning.metrics.functional.rows import InputKind, checked_rows
from calib_lightning.metrics.functional.undefined import checked_result


def check_n_bins(n_bins: int) -> None:
    """Refuse a number of bins that is not a positive integer."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"n_bins is {n_bins!r}; it must be an integer >= 1. The usual value is 15.")


@lru_cache(maxsize=64)
def _inner_edges(n_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # m / M, rounded once: some edges of `torch.linspace` are off in the last bit.
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=device) / n_bins
    return edges.to(dtype).double()


@lru_cache(maxsize=64)
def _host_edges(n_bins: int, dtype: torch.dtype) -> NDArray[np.float64]:
    inner = _inner_edges(n_bins, dtype, torch.device("cpu")).numpy()
    return np.concatenate([[-1.0], inner, [2.0]])


def _host_index(confidence: Tensor, n_bins: int) -> NDArray[np.int64]:
    wide = confidence.double().numpy()
    edges = _host_edges(n_bins, confidence.dtype)
    if n_bins > 1024 or confidence.dtype not in (torch.float32, torch.float64):
        return np.searchsorted(edges[1:-1], wide)
    # The edge below c M is m / M or its rounding, so one comparison finds the bin. A search branches, which is slow on
    # random numbers. Values outside [0, 1] (nan, a probability above 1 by rounding) stay in range.
    with np.errstate(invalid="ignore"):
        index = (wide * n_bins).astype(np.int64)
    np.maximum(np.minimum(index, n_bins, out=index), 0, out=index)  # np.clip takes twice as long to start
    index -= wide <= edges.take(index)
    return index


def bin_index(confidence: Tensor, n_bins: int) -> Tensor:
    """Number ``(N,)`` int64 of the equal-width bin ``(lo, hi]`` of each confidence ``(N,)``, without a host sync."""
    # Bin m holds m / M < c <= (m + 1) / M, and the first holds 0 too. The edges are rounded to the dtype of the
    # confidence, so a confidence written as k / M always falls in the bin that ends there.
    check_n_bins(n_bins)
    if confidence.device.type != "cpu":
        return torch.bucketize(confidence.double(), _inner_edges(n_bins, confidence.dtype, confidence.device))
    # On 1000 rows or so, calls of numpy cost a fraction of those of torch.
    return torch.from_numpy(_host_index(confidence.detach(), n_bins))


def sums_in_bins(index: Tensor, n_bins: int, values: list[Tensor]) -> Tensor:
    """Sums ``(M, V)`` float64 per bin of V columns ``(N,)``; empty bins hold zeros."""
    if index.device.type == "cpu":
        bins = index.numpy()
        columns = [np.bincount(bins, weights=column.detach().numpy(), minlength=n_bins) for column in values]
        return torch.from_numpy(np.array(columns, dtype=np.float64).T.copy())
    sums = torch.zeros(len(values), n_bins, dtype=torch.float64, device=index.device)
    return sums.scatter_add_(1, index.expand(len(values), -1), torch.stack([column.double() for column in values])).T


def bin_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Sum up count, confidence and correctness in equal-width bins ``(lo, hi]``, see `bin_index`.

    It causes no host sync.

    Args:
        confidence: ``(N,)`` in ``[0, 1]``.
        correct: ``(N,)`` bool, or numbers in ``[0, 1]``.
        n_bins: Number of bins M.

    Returns:
        ``(M, 3)`` float64: count, sum of the confidences, sum of ``correct``. The sums of two parts of a set add up.

    Raises:
        ValueError: ``n_bins`` < 1.

    Example:
        >>> bin_sums(torch.tensor([0.2, 0.3, 1.0]), torch.tensor([False, True, True]), 5)[:, 0]
        tensor([1., 1., 0., 0., 1.], dtype=torch.float64)
    """
    index = bin_index(confidence, n_bins)
    if index.device.type == "cpu":
        bins, weights = index.numpy(), (None, confidence.detach().double().numpy(), correct.detach().numpy())
        columns = [np.bincount(bins, weights=column, minlength=n_bins) for column in weights]
        return torch.from_numpy(np.array(columns, dtype=np.float64).T.copy())
    wide = confidence.double()
    return sums_in_bins(index, n_bins, [torch.ones_like(wide), wide, correct])


def at_least_tiny(count: Tensor) -> Tensor:
    """``count`` with its zeros replaced by the smallest normal number, so that 0 / count is 0."""
    return count.clamp_min(torch.finfo(count.dtype).tiny)


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
    rows = checked_rows("ece", logits, labels, confidence, input)
    value = ece_from_bins(bin_sums(rows.confidence, rows.correct, n_bins))
    return checked_result("ece", value, len(labels))


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
    rows = checked_rows("mce", logits, labels, confidence, input)
    value = mce_from_bins(bin_sums(rows.confidence, rows.correct, n_bins))
    return checked_result("mce", value, len(labels))


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
    rows = checked_rows("rmsce", logits, labels, confidence, input)
    value = rmsce_from_bins(bin_sums(rows.confidence, rows.correct, n_bins))
    return checked_result("rmsce", value, len(labels))


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
    rows = checked_rows("overconfidence_error", logits, labels, confidence, input)
    value = overconfidence_error_from_bins(bin_sums(rows.confidence, rows.correct, n_bins))
    return checked_result("overconfidence_error", value, len(labels))


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
    rows = checked_rows("over_ece", logits, labels, confidence, input)
    value = over_ece_from_bins(bin_sums(rows.confidence, rows.correct, n_bins))
    return checked_result("over_ece", value, len(labels))


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
    rows = checked_rows("under_ece", logits, labels, confidence, input)
    value = under_ece_from_bins(bin_sums(rows.confidence, rows.correct, n_bins))
    return checked_result("under_ece", value, len(labels))


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
