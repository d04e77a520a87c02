"""Calibration error of the predicted class: equal-width bins, and the signed gap."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from calib_lightning.metrics.functional.proper import mean_of_rows
from calib_lightning.metrics.functional.rows import InputKind, checked_rows


def check_n_bins(n_bins: int) -> None:
    """Refuse a number of bins below one.

    Args:
        n_bins: Number of bins M.

    Raises:
        ValueError: It is not a positive integer.
    """
    if isinstance(n_bins, bool) or not isinstance(n_bins, int) or n_bins < 1:
        raise ValueError(f"n_bins={n_bins!r}: the number of bins must be an integer >= 1 (15 is customary)")


@lru_cache(maxsize=64)
def _inner_edges(n_bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # m / M rounded once: `torch.linspace` is off by a bit of the last place at some edges.
    edges = torch.arange(1, n_bins, dtype=torch.float64, device=device) / n_bins
    return edges.to(dtype).double()


def bin_sums(confidence: Tensor, correct: Tensor, n_bins: int) -> Tensor:
    """Sum up confidences and hits in equal-width bins ``(lo, hi]``.

    Bin m holds ``m / M < c <= (m + 1) / M``, and the first holds 0 too. The edges are rounded to the dtype of
    ``confidence``, so a confidence written as ``k / M`` always falls in the bin that ends there. This reads no values
    on the host.

    Args:
        confidence: ``(N,)`` in ``[0, 1]``.
        correct: ``(N,)`` bool, or numbers in ``[0, 1]``.
        n_bins: Number of bins M.

    Returns:
        ``(M, 3)`` float64: count, sum of the confidences, sum of ``correct``. Sums of parts of a set add up.

    Raises:
        ValueError: ``n_bins`` < 1.

    Example:
        >>> bin_sums(torch.tensor([0.2, 0.3, 1.0]), torch.tensor([False, True, True]), 5)[:, 0]
        tensor([1., 1., 0., 0., 1.], dtype=torch.float64)
    """
    check_n_bins(n_bins)
    wide = confidence.double()
    index = torch.bucketize(wide, _inner_edges(n_bins, confidence.dtype, confidence.device))
    values = torch.stack([torch.ones_like(wide), wide, correct.double()])
    return (
        torch.zeros(3, n_bins, dtype=torch.float64, device=wide.device).scatter_add_(1, index.expand(3, -1), values).T
    )


def ece_from_bins(sums: Tensor) -> Tensor:
    """Expected calibration error of binned sums, ``sum_m |S_correct,m - S_confidence,m| / N``.

    Args:
        sums: ``(M, 3)`` of `bin_sums`.

    Returns:
        0-d float64 in ``[0, 1]``; nan without rows.

    Example:
        >>> ece_from_bins(torch.tensor([[2.0, 0.5, 1.0], [2.0, 1.5, 1.0]], dtype=torch.float64))
        tensor(0.2500, dtype=torch.float64)
    """
    count, confidence, correct = sums.double().unbind(dim=1)
    return (correct - confidence).abs().sum() / count.sum()


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
    # The mean warns about an empty set; with rows it is not needed, so it is not computed.
    if len(labels) == 0:
        return mean_of_rows("ece", rows.confidence)
    return ece_from_bins(bin_sums(rows.confidence, rows.correct, n_bins))


def signed_gap(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> Tensor:
    """Mean confidence less accuracy, ``E[c] - E[correct]``: positive means over-confident.

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
