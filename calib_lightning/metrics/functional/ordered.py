"""Rows in the order of their score: what every ranking, selective and equal-mass metric is read from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ordered(NamedTuple):
    """Groups of rows with equal scores, in ascending order of the score.

    One form for three sources: the exact rows of a set (a group is a distinct score), a histogram of scores (a group
    is a bin), and resamples or subsets of rows (leading dimensions; a group may be empty then, or hold a weight).

    Attributes:
        count: Number of rows of each group, ``(..., G)`` float64.
        hits: Number of them that are positive (mostly: correct), ``(..., G)`` float64.
        confidence: Sum of their confidences, ``(..., G)`` float64.
    """

    count: Tensor
    hits: Tensor
    confidence: Tensor

    @property
    def misses(self) -> Tensor:
        """Number of rows of each group that are not positive, ``(..., G)`` float64."""
        return self.count - self.hits


def group_ends(ordered: Tensor) -> Tensor:
    """Find where groups of equal values end.

    Args:
        ordered: ``(N,)`` sorted.

    Returns:
        ``(G,)`` int64: for each group the position just after its last row; the last is N.
    """
    last = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    torch.ne(ordered[1:], ordered[:-1], out=last[:-1])
    return last.nonzero().squeeze(-1) + 1


def sums_of_groups(values: Tensor, ends: Tensor) -> Tensor:
    """Sum up consecutive groups.

    Args:
        values: ``(..., N)`` in the order of the groups.
        ends: ``(G,)`` of `group_ends`.

    Returns:
        ``(..., G)`` float64.
    """
    if len(ends) == values.shape[-1]:
        return values.double()
    sums = values.double().cumsum(-1)[..., ends - 1]
    return torch.diff(sums, prepend=sums.new_zeros(*sums.shape[:-1], 1))


def order_rows(scores: Tensor, positive: Tensor) -> Ordered:
    """Sort rows by score and join those with equal scores; the result does not depend on the order of the rows.

    Args:
        scores: Log-odds of the confidence ``(N,)``, floating point; infinite scores are allowed. The confidence is
            ``1 / (1 + exp(-score))``.
        positive: ``(N,)`` bool.

    Returns:
        The groups, each ``(G,)``; G = 0 for no rows.

    Raises:
        ValueError: The shapes differ, or a score is NaN.

    Example:
        >>> order_rows(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True, False, False])).hits
        tensor([0., 1.], dtype=torch.float64)
    """
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and positive {tuple(positive.shape)} must both be (N,)")
    if bool(scores.isnan().any()):
        raise ValueError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN; give comparable numbers")
    ordered, order = scores.sort()
    ends = group_ends(ordered)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    count = (ends - starts).double()
    # Whole numbers below 2^53: their float64 sums are exact in any order.
    hits = sums_of_groups(positive.bool()[order], ends)
    return Ordered(count, hits, count * torch.sigmoid(ordered[ends - 1].double()))
