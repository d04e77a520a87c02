"""Calibration error of the probabilities of all classes, not only of the predicted one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.calibration import bin_index, check_n_bins
from calib_lightning.metrics.functional.rows import InputKind, checked_rows
from calib_lightning.metrics.functional.undefined import checked_result

_BLOCK = 2**18


def _entries_above(probs: Tensor, edge: float) -> NDArray[np.int64]:
    # Looking for the few entries is most of the work; numpy skips runs of zero bytes several at a time, which torch
    # does not. A Python number is compared in the dtype of the array, and the edge is a number of that dtype.
    return np.flatnonzero(at_least_float32(probs).numpy() > edge)


@lru_cache(maxsize=64)
def _first_edge(n_bins: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(1.0 / n_bins, dtype=dtype))


def classwise_sums(probs: Tensor, labels: Tensor, n_bins: int, totals: Tensor | None = None) -> Tensor:
    """Sum up probabilities and hits of every class in equal-width bins ``(lo, hi]``, whose edges are as in `bin_sums`.

    On the CPU only the entries above ``1/M`` are visited, at most ``M - 1`` a row; the first bin of a class is its
    total less the others. On other devices all entries are, which reads no values on the host.

    Args:
        probs: Probabilities ``(N, K)``, floating point.
        labels: Class labels ``(N,)`` in ``0..K-1``.
        n_bins: Number of bins M.
        totals: Sums of the columns of ``probs``, ``(K,)`` float64, where they are known already.

    Returns:
        ``(2, K, M)`` float64: sums of the probabilities of each class, and numbers of rows with its label, by the bin
        of the probability. Sums of parts of a set add up.

    Raises:
        ValueError: ``n_bins`` < 1.

    Example:
        >>> classwise_sums(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]), 2)[0]
        tensor([[0.5000, 0.7500],
                [0.7500, 0.0000]], dtype=torch.float64)
    """
    check_n_bins(n_bins)
    probs, labels = probs.detach(), labels.long()
    classes = probs.shape[1]
    if probs.device.type != "cpu":
        of_label = probs.gather(1, labels.unsqueeze(1)).squeeze(1)
        hit = labels * n_bins + bin_index(of_label, n_bins)
        sums = torch.zeros(2, classes * n_bins, dtype=torch.float64, device=probs.device)
        sums[1].scatter_add_(0, hit, sums.new_ones(()).expand_as(hit))
        cells = bin_index(probs, n_bins) + torch.arange(classes, device=probs.device) * n_bins
        sums[0].scatter_add_(0, cells.reshape(-1), probs.double().reshape(-1))
        return sums.view(2, classes, n_bins)
    entries = _entries_above(probs, _first_edge(n_bins, probs.dtype))
    found = len(entries)
    # The entries of the labels go through the same steps; where there are only some 1000 rows, steps are what costs.
    entries = np.concatenate([entries, np.arange(0, probs.numel(), classes) + labels.numpy()])
    values = at_least_float32(probs).reshape(-1).numpy().take(entries)
    column = entries - entries // classes * classes  # numpy divides by a number many times as fast as it takes a rest
    cells = column * n_bins + bin_index(torch.from_numpy(values).to(probs.dtype), n_bins).numpy()
    above = np.bincount(cells[:found], weights=values[:found], minlength=classes * n_bins)
    hits = np.bincount(cells[found:], minlength=classes * n_bins)
    sums = torch.from_numpy(np.stack([above, hits], dtype=np.float64)).view(2, classes, n_bins)
    # Widening first is several times faster than a float64 sum over float32 columns. With one bin the first edge is 1,
    # which a probability may exceed by rounding; the total overwrites that.
    totals = probs.double().sum(dim=0) if totals is None else totals
    sums[0, :, 0] = totals - sums[0, :, 1:].sum(dim=1)
    return sums


def weighted_classwise_sums(probs: Tensor, labels: Tensor, weights: Tensor, n_bins: int) -> Tensor:
    """Do what `classwise_sums` does, for several weightings of the rows at once (resamples).

    Class totals are a matrix product; the entries above ``1/M`` and those of the labels are sparse ones. Besides the
    result this takes some ``8 B (M K + E)`` bytes, E being the number of entries above ``1/M``.

    Args:
        probs: Probabilities ``(N, K)``, floating point.
        labels: Class labels ``(N,)`` in ``0..K-1``.
        weights: Weight of each row in each of B resamples, ``(B, N)``: mostly how often it was drawn.
        n_bins: Number of bins M.

    Returns:
        ``(B, 2, K, M)`` float64.

    Raises:
        ValueError: ``n_bins`` < 1.

    Example:
        >>> probs, labels = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1])
        >>> weighted_classwise_sums(probs, labels, torch.tensor([[2, 0]]), 2)[0, 0]
        tensor([[0.0000, 1.5000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """
    probs, labels, by_row = probs.detach(), labels.long(), weights.double().T.contiguous()
    rows, classes = probs.shape

    def product(cells: Tensor, at: Tensor, values: Tensor) -> Tensor:
        sparse = torch.sparse_coo_tensor(
            torch.stack([cells, at]), values, (classes * n_bins, rows), check_invariants=False
        )
        return (sparse @ by_row).view(classes, n_bins, -1)

    of_label = probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    cells = labels * n_bins + bin_index(of_label, n_bins)
    hits = product(cells, torch.arange(rows, device=probs.device), by_row.new_ones(rows))
    row, column = (probs > _first_edge(n_bins, probs.dtype)).nonzero(as_tuple=True)
    values = probs[row, column]
    above = product(column * n_bins + bin_index(values, n_bins), row, values.double())
    totals = by_row.new_zeros(classes, by_row.shape[1])
    step = max(1, _BLOCK // classes)
    for some, their in zip(torch.split(probs, step), torch.split(by_row, step), strict=True):
        totals.addmm_(some.double().T, their)
    above[:, 0] = totals - above[:, 1:].sum(dim=1)
    return torch.stack([above, hits]).permute(3, 0, 1, 2)


def classwise_ece_from_sums(sums: Tensor, count: Tensor) -> Tensor:
    """Class-wise expected calibration error of binned sums, ``1/K sum_k sum_m |S_hit,km - S_p,km| / N``.

    Args:
        sums: ``(..., 2, K, M)`` of `classwise_sums`.
        count: Number (or weight) of rows N, ``(...)``.

    Returns:
        ``(...)`` float64 in ``[0, 1]``; nan without rows.

    Example:
        >>> sums = torch.tensor([[[0.5, 0.75], [0.75, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
        >>> classwise_ece_from_sums(sums, torch.tensor(2))
        tensor(0.2500, dtype=torch.float64)
    """
    probs, hits = sums.double().unbind(dim=-3)
    return (hits - probs).abs_().sum(dim=(-2, -1)) / (count * sums.shape[-2])


def classwise_ece(logits: Tensor, labels: Tensor, *, n_bins: int = 15, input: InputKind = "logits") -> Tensor:
    """Class-wise (static) calibration error (Nixon et al., 2019), the mean over classes of one against the rest.

    ``SCE = 1/K sum_k sum_m n_mk / N |freq_mk - mean p_mk|``, a fraction, with M equal-width bins ``(lo, hi]`` of the
    probability of class k, ``freq_mk`` the share of the rows of the bin whose label is k.

    Deviations: K is the number of classes of the model; common codes take the largest label plus one, which is wrong
    where the last class has no rows.

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
