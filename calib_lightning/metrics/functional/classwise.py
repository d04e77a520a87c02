"""Calibration error of the probabilities of all classes, not only of the predicted one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.bins import bin_index, check_n_bins
from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.undefined import checked_result

_BLOCK = 2**18


def _entries_above(probs: Tensor, edge: float) -> NDArray[np.int64]:
    # Finding the few entries is most of the work; unlike torch, numpy skips several zero bytes at a time. A Python
    # number is compared in the dtype of the array, and the edge is a number of that dtype.
    return np.flatnonzero(at_least_float32(probs).numpy() > edge)


@lru_cache(maxsize=64)
def _first_edge(n_bins: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(1.0 / n_bins, dtype=dtype))


def classwise_sums(probs: Tensor, labels: Tensor, n_bins: int, totals: Tensor | None = None) -> Tensor:
    """Sums ``(2, K, M)`` float64 per class and bin: of the probabilities ``(N, K)``, and of rows with that label."""
    # The edges are those of `bin_sums`. On the CPU only the entries above 1 / M are visited, at most M - 1 per row; the
    # first bin of a class is its total minus the others. Other devices visit all entries, without a host sync.
    check_n_bins(n_bins)
    probs, labels = probs.detach(), labels.long()
    classes = probs.shape[1]
    if probs.device.type != "cpu":
        of_label = probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        own = labels * n_bins + bin_index(of_label, n_bins)
        sums = torch.zeros(2, classes * n_bins, dtype=torch.float64, device=probs.device)
        sums[1].scatter_add_(0, own, sums.new_ones(()).expand_as(own))
        cells = bin_index(probs, n_bins) + torch.arange(classes, device=probs.device) * n_bins
        sums[0].scatter_add_(0, cells.reshape(-1), probs.double().reshape(-1))
        return sums.view(2, classes, n_bins)
    entries = _entries_above(probs, _first_edge(n_bins, probs.dtype))
    found = len(entries)
    # The entries of the labels go through the same steps: on 1000 rows or so the number of steps sets the time.
    entries = np.concatenate([entries, np.arange(0, probs.numel(), classes) + labels.numpy()])
    values = at_least_float32(probs).reshape(-1).numpy().take(entries)
    column = entries - entries // classes * classes  # numpy divides many times faster than it takes a remainder
    cells = column * n_bins + bin_index(torch.from_numpy(values).to(probs.dtype), n_bins).numpy()
    above = np.bincount(cells[:found], weights=values[:found], minlength=classes * n_bins)
    labelled = np.bincount(cells[found:], minlength=classes * n_bins)
    sums = torch.from_numpy(np.stack([above, labelled], dtype=np.float64)).view(2, classes, n_bins)
    # Widening first is several times faster than a float64 sum over float32 columns. With one bin the first edge is 1,
    # and a probability may exceed it by rounding; the total overwrites such entries.
    totals = probs.double().sum(dim=0) if totals is None else totals
    sums[0, :, 0] = totals - sums[0, :, 1:].sum(dim=1)
    return sums


def weighted_classwise_sums(probs: Tensor, labels: Tensor, weights: Tensor, n_bins: int) -> Tensor:
    """`classwise_sums` ``(B, 2, K, M)`` for B weightings ``(B, N)`` of the rows at once (resamples)."""
    # Class totals are a matrix product; the entries above 1 / M and those of the labels are sparse ones. Besides the
    # result this takes about 8 B (M K + E) bytes, with E the number of entries above 1 / M.
    probs, labels, by_row = probs.detach(), labels.long(), weights.double().T.contiguous()
    rows, classes = probs.shape

    def product(cells: Tensor, at: Tensor, values: Tensor) -> Tensor:
        sparse = torch.sparse_coo_tensor(
            torch.stack([cells, at]), values, (classes * n_bins, rows), check_invariants=False
        )
        return (sparse @ by_row).view(classes, n_bins, -1)

    of_label = probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    cells = labels * n_bins + bin_index(of_label, n_bins)
    labelled = product(cells, torch.arange(rows, device=probs.device), by_row.new_ones(rows))
    row, column = (probs > _first_edge(n_bins, probs.dtype)).nonzero(as_tuple=True)
    values = probs[row, column]
    above = product(column * n_bins + bin_index(values, n_bins), row, values.double())
    totals = by_row.new_zeros(classes, by_row.shape[1])
    step = max(1, _BLOCK // classes)
    for some, their in zip(torch.split(probs, step), torch.split(by_row, step), strict=True):
        totals.addmm_(some.double().T, their)
    above[:, 0] = totals - above[:, 1:].sum(dim=1)
    return torch.stack([above, labelled]).permute(3, 0, 1, 2)


def classwise_ece_from_sums(sums: Tensor, count: Tensor) -> Tensor:
    """``1/K sum_k sum_m |S_label,km - S_p,km| / N`` ``(...)`` of sums ``(..., 2, K, M)``."""
    probs, labelled = sums.double().unbind(dim=-3)
    return (labelled - probs).abs_().sum(dim=(-2, -1)) / (count * sums.shape[-2])


def classwise_ece(logits: Tensor, labels: Tensor, *, n_bins: int = 15, input: InputKind = "logits") -> Tensor:
    """Class-wise (static) calibration error (Nixon et al., 2019), the mean over classes of one against the rest.

    ``SCE = 1/K sum_k sum_m n_mk / N |freq_mk - mean p_mk|``, a fraction, with M equal-width bins ``(lo, hi]`` of the
    probability of class k, ``freq_mk`` the share of the rows of the bin whose label is k.

    Deviations: K is the number of classes of the model; common implementations take the largest label plus one, which
    is wrong if the last class has no rows.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 before the softmax.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        n_bins: Number of bins M.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``n_bins`` < 1.

    Example:
        >>> classwise_ece(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]), n_bins=2, input="probs")
        tensor(0.2500, dtype=torch.float64)
    """
    rows = checked_rows("classwise_ece", logits, labels, input=input)
    count = torch.tensor(len(labels), device=logits.device)
    value = classwise_ece_from_sums(classwise_sums(rows.probs, rows.labels, n_bins), count)
    return checked_result("classwise_ece", value, len(labels))
