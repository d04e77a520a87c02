"""Calibration errors of the predicted class, from rows sorted by confidence."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.metrics.functional.bins import at_least_tiny, check_n_bins
from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.ordered import Ordered
from calib_lightning.metrics.functional.twins import of_ordered


def with_a_group(ordered: Ordered) -> Ordered:
    """``ordered``, with one empty group ``(..., 1)`` if it has no groups, so that there is always a last one."""
    if ordered.count.shape[-1]:
        return ordered
    return Ordered(*(torch.nn.functional.pad(x, (0, 1)) for x in ordered))


class _EqualSplit:
    """Equal-mass bins; a group cut by a border is shared. ``size`` is the number of rows per bin ``(..., M)``."""

    def __init__(self, count: Tensor, n_bins: int) -> None:
        check_n_bins(n_bins)
        below = count.cumsum(dim=-1)
        total = below[..., -1:]
        step = torch.arange(1, n_bins, dtype=torch.float64, device=count.device)
        base = torch.floor(total / n_bins)
        borders = step * base + torch.minimum(step, total - n_bins * base)
        self._group = torch.searchsorted(below, borders).clamp_(max=count.shape[-1] - 1)
        cut = below.gather(-1, self._group) - borders
        self._share = cut / at_least_tiny(count.gather(-1, self._group))
        self.size = self._differences(borders, total)

    def __call__(self, values: Tensor) -> Tensor:
        """Sums ``(..., M)`` per bin of the sums ``(..., G)`` per group."""
        running = values.cumsum(dim=-1)
        total = running[..., -1:]
        return self._differences(running.gather(-1, self._group) - self._share * values.gather(-1, self._group), total)

    @staticmethod
    def _differences(borders: Tensor, total: Tensor) -> Tensor:
        return torch.diff(borders, prepend=torch.zeros_like(total), append=total)


def aece_split_from_ordered(ordered: Ordered, n_bins: int = 15) -> Tensor:
    """`aece_split` ``(...)`` of groups ``(..., G)``."""
    count, correct, confidence = with_a_group(ordered)
    split = _EqualSplit(count, n_bins)
    return split(correct - confidence).abs_().sum(dim=-1) / count.sum(dim=-1)


def aece_official_from_ordered(ordered: Ordered, n_bins: int = 15) -> Tensor:
    """`aece_official` ``(...)`` of groups ``(..., G)``."""
    check_n_bins(n_bins)
    count, correct, confidence = with_a_group(ordered)
    below = count.cumsum(dim=-1)
    total = below[..., -1:]
    # The edge at the fractional rank r = N m / M lies at row floor(r) or between it and the next row, so the rows up to
    # the edge end with the group of row floor(r). N m is exact, so N m / M never rounds across a whole number.
    ranks = torch.floor(total * torch.arange(n_bins, dtype=torch.float64, device=count.device) / n_bins)
    cuts = torch.searchsorted(below, ranks, right=True).clamp_(max=count.shape[-1] - 1)
    running = (correct - confidence).cumsum(dim=-1)
    sums = torch.diff(running.gather(-1, cuts), append=running[..., -1:])
    return sums.abs_().sum(dim=-1) / total.squeeze(-1)


def ks_from_ordered(ordered: Ordered) -> Tensor:
    """`ks` ``(...)`` of groups ``(..., G)``; empty groups and weights are fine."""
    count, correct, confidence = with_a_group(ordered)
    return (correct - confidence).cumsum(dim=-1).abs_().amax(dim=-1) / count.sum(dim=-1)


def debiased_l2_from_ordered(ordered: Ordered, n_bins: int = 15) -> Tensor:
    """`debiased_l2` ``(...)`` of groups ``(..., G)``."""
    count, correct, confidence = with_a_group(ordered)
    split = _EqualSplit(count, n_bins)
    size, correct_sum = split.size, split(correct)
    gap = (split(confidence) - correct_sum) / at_least_tiny(size)
    accuracy = correct_sum / at_least_tiny(size)
    bias = accuracy * (1.0 - accuracy) / (size - 1.0)
    terms = torch.where(size >= 2, size * (gap.square() - bias), 0.0)
    return (terms.sum(dim=-1) / count.sum(dim=-1)).clamp_min_(0.0).sqrt_()


def aece_split(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Adaptive calibration error of the predicted class (Nguyen and O'Connor, 2015) with M bins of equal size.

    ``AECE = sum_m n_m / N |acc_m - conf_m|`` over the rows in order of their confidence, cut into M parts whose sizes
    differ by at most one, larger ones first; with fewer rows than bins each row is a bin.

    Deviations: rows of equal confidence on both sides of a cut count with their average, the expectation over all
    their orders, so the result does not depend on the order of the rows.

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
        >>> aece_split(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), n_bins=2, input="probs")
        tensor(0.4000, dtype=torch.float64)
    """
    return of_ordered(
        "aece_split", lambda ordered: aece_split_from_ordered(ordered, n_bins), logits, labels, confidence, input
    )


def aece_official(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Adaptive calibration error of the predicted class as in the code of Mukhoti et al. (2020) and its successors.

    ``AECE = sum_m n_m / N |acc_m - conf_m|`` over bins ``(e_m, e_{m+1}]`` with ``e_m`` the sorted confidences,
    interpolated linearly at rank ``N m / M``. The rows with the smallest confidence are in no bin, so the weights sum
    to slightly less than one; rows of equal confidence stay together. Use it to compare with published tables, and
    `aece_split` otherwise.

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
        >>> aece_official(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), n_bins=2, input="probs")
        tensor(0.0500, dtype=torch.float64)
    """
    return of_ordered(
        "aece_official", lambda ordered: aece_official_from_ordered(ordered, n_bins), logits, labels, confidence, input
    )


def ks(logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits") -> Tensor:
    """Kolmogorov-Smirnov calibration error of the predicted class (Gupta et al., 2021), without bins.

    ``KS = max_j |sum_{i <= j} (c_i - a_i)| / N`` over the rows in order of their confidence; j runs over the last rows
    of groups of equal confidence, so the order of the rows does not matter. It is at least ``|signed_gap|`` (if
    probabilities sum to exactly 1; rows are ordered by normalised ones).

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> ks(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]), input="probs")
        tensor(0.3500, dtype=torch.float64)
    """
    return of_ordered("ks", ks_from_ordered, logits, labels, confidence, input)


def debiased_l2(
    logits: Tensor,
    labels: Tensor,
    *,
    n_bins: int = 15,
    confidence: Tensor | None = None,
    input: InputKind = "logits",
) -> Tensor:
    """Debiased L2 calibration error of the predicted class (Kumar et al., 2019) with M bins of equal size.

    ``sqrt(max(0, sum_m n_m / N [(acc_m - conf_m)^2 - acc_m (1 - acc_m) / (n_m - 1)]))`` over the bins of `aece_split`;
    the subtracted term is the expected noise of the squared gap. Bins with fewer than two rows count as 0.

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
        >>> debiased_l2(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([1, 1]), n_bins=1, input="probs")
        tensor(0.8000, dtype=torch.float64)
    """
    return of_ordered(
        "debiased_l2", lambda ordered: debiased_l2_from_ordered(ordered, n_bins), logits, labels, confidence, input
    )
