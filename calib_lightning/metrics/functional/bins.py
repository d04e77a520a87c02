"""Equal-width bins of the confidence, and sums in them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
