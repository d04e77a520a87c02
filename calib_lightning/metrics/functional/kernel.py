"""The kernel calibration error of all classes, and a test of calibration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.undefined import checked_result

_AT_ONCE = 2**22


class KernelCalibrationTest(NamedTuple):
    """Result of `kernel_calibration_test`.

    Attributes:
        skce: The unbiased estimate, as `skce` gives it.
        p_value: Chance of an estimate at least as large if the network is calibrated.
    """

    skce: Tensor
    p_value: Tensor


def check_bandwidth(bandwidth: float) -> None:
    """Refuse a bandwidth that is not above 0 and finite."""
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"bandwidth is {bandwidth}; it must be above 0 and finite. The default is 1.")


def _sums_over_pairs(probs: Tensor, labels: Tensor, bandwidth: float, signs: Tensor) -> Tensor:
    """``sum_{i != j} s_i s_j h_ij`` ``(B,)`` float64 for B weightings ``(B, N)`` of the rows, in blocks of rows."""
    probs = probs.double()
    residuals = -probs
    residuals[torch.arange(len(labels), device=labels.device), labels] += 1.0
    totals = torch.zeros(len(signs), dtype=torch.float64, device=probs.device)
    step = max(1, _AT_ONCE // max(1, len(probs)))
    for start in range(0, len(probs), step):
        rows = slice(start, start + step)
        # each pair once: the rows from the block on
        distance = torch.cdist(probs[rows], probs[start:], p=1).mul_(-0.5 / bandwidth)
        block = distance.exp_().mul_(residuals[rows] @ residuals[start:].T).triu_(1)
        totals += ((signs[:, rows] @ block) * signs[:, start:]).sum(dim=1)
    return 2.0 * totals


def skce(logits: Tensor, labels: Tensor, *, bandwidth: float = 1.0, input: InputKind = "logits") -> Tensor:
    """Squared kernel calibration error (Widmann, Lindsten and Zachariah, NeurIPS 2019), its unbiased estimate.

    ``SKCE = 1 / (N (N - 1)) sum_{i != j} (e_{y_i} - p_i)^T k(p_i, p_j) (e_{y_j} - p_j)`` with the matrix-valued kernel
    ``k(p, q) = exp(-|p - q| / b) I`` and the total variation distance ``|p - q| = 1/2 sum_k |p_k - q_k|``. It is about
    the probabilities of all classes, and 0 on average if they are calibrated; an estimate may be below 0.

    It takes ``N^2 K / 2`` steps, and memory for a few blocks of pairs, whatever N.

    Deviations: the paper takes the median distance of the set for ``b``; that of a network which is sure of its
    answers is near 1 for ten classes or more, and a fixed ``b`` lets two networks be compared. For theirs, pass
    ``torch.pdist(probs, p=1).median() / 2``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        bandwidth: ``b``, above 0.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64; nan, with a warning, with fewer than two rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> skce(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 0]), input="probs")
        tensor(0.0491, dtype=torch.float64)
    """
    check_bandwidth(bandwidth)
    rows = checked_rows("skce", logits, labels, input=input)
    return checked_result("skce", skce_of(rows.probs.detach(), rows.labels.long(), bandwidth), len(labels))


def skce_of(probs: Tensor, labels: Tensor, bandwidth: float) -> Tensor:
    """`skce` of checked rows, without a warning."""
    n = len(labels)
    signs = torch.ones(1, n, dtype=torch.float64, device=probs.device)
    total = _sums_over_pairs(probs, labels, bandwidth, signs).squeeze(0)
    return total / (n * (n - 1)) if n > 1 else torch.full_like(total, torch.nan)


def kernel_calibration_test(
    logits: Tensor,
    labels: Tensor,
    *,
    bandwidth: float = 1.0,
    n_resamples: int = 1000,
    seed: int = 0,
    input: InputKind = "logits",
) -> KernelCalibrationTest:
    """Test whether the probabilities of all classes are calibrated (Widmann, Lindsten and Zachariah, NeurIPS 2019).

    The statistic is `skce`. Under calibration the estimate is a degenerate U-statistic, whose distribution is that of
    ``1 / (N (N - 1)) sum_{i != j} s_i s_j h_ij`` with random signs ``s``: the p-value is ``(1 + R) / (1 + B)``, where R
    of B draws are at least as large as the estimate.

    Deviations: the paper draws rows with replacement and centres their terms; random signs have the same limit and
    need no centring.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        bandwidth: See `skce`.
        n_resamples: B, at least 1.
        seed: Seed of the signs.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        Estimate and p-value, each 0-d float64; nan, with a warning, with fewer than two rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> probs, labels = torch.tensor([[0.8, 0.2]]).expand(100, 2), torch.arange(100) % 5 // 4
        >>> bool(kernel_calibration_test(probs, labels, input="probs").p_value > 0.5)
        True
    """
    check_bandwidth(bandwidth)
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; it must be at least 1. The default is 1000.")
    rows = checked_rows("kernel_calibration_test", logits, labels, input=input)
    n = len(labels)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (n_resamples, n), generator=generator).double().mul_(2.0).sub_(1.0)
    signs = torch.cat([torch.ones(1, n, dtype=torch.float64), signs]).to(logits.device)
    totals = _sums_over_pairs(rows.probs.detach(), rows.labels.long(), bandwidth, signs)
    if n < 2:
        totals = torch.full_like(totals, torch.nan)
    estimate = checked_result("kernel_calibration_test", totals[0] / max(1, n * (n - 1)), n)
    larger = (totals[1:] >= totals[0]).sum()
    p_value = (1.0 + larger.double()) / (1.0 + n_resamples)
    return KernelCalibrationTest(estimate, torch.where(estimate.isnan(), torch.nan, p_value))
