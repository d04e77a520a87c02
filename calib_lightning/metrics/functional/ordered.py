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

    count: Tensor  # type: ignore[assignment]  # it hides tuple.count, which nobody needs here
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
    if len(ordered) == 0:
        return torch.empty(0, dtype=torch.int64, device=ordered.device)
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
    ordered, hit = _sorted(scores, positive.bool())
    ends = group_ends(ordered)
    count = torch.diff(ends, prepend=ends.new_zeros(1)).double()
    # Whole numbers below 2^53: their float64 sums are exact in any order.
    return Ordered(count, sums_of_groups(hit, ends), count * torch.sigmoid(ordered[ends - 1].double()))


def _sorted(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        ordered, order = scores.sort()
        return ordered, positive[order]
    # A float32 and its flag fit into one integer of the same order, and whole numbers are sorted in half the time and
    # memory of numbers with their positions. Of a negative number all bits but the sign are turned; -0 becomes 0.
    bits = (scores + 0.0).view(torch.int32)
    keys = bits.bitwise_xor((bits >> 31) & 0x7FFFFFFF).long().bitwise_left_shift_(1).add_(positive)
    keys.numpy().sort()
    hit = (keys & 1).bool()
    bits = keys.bitwise_right_shift_(1).int()
    return bits.bitwise_xor_((bits >> 31) & 0x7FFFFFFF).view(torch.float32), hit
