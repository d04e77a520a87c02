"""Rows grouped by score: what ranking, selective and equal-mass metrics read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ordered(NamedTuple):
    """Groups of rows with equal scores, in ascending order of the score.

    One form for three sources: the rows of a set (a group is a distinct score), a histogram of scores (a group is a
    bin), and resamples or subsets (leading dimensions; groups may be empty or weighted).

    Attributes:
        count: Rows per group, ``(..., G)`` float64.
        correct: Correct (in general, positive) rows per group, ``(..., G)`` float64.
        confidence: Sum of the confidences per group, ``(..., G)`` float64.
    """

    count: Tensor  # type: ignore[assignment]  # it hides tuple.count, which is not needed here
    correct: Tensor
    confidence: Tensor

    @property
    def wrong(self) -> Tensor:
        """Rows per group that are not correct, ``(..., G)`` float64."""
        return self.count - self.correct


def group_ends(ordered: Tensor) -> Tensor:
    """The position ``(G,)`` after the last row of each group of equal values; the rows ``(N,)`` are sorted."""
    if len(ordered) == 0:
        return torch.empty(0, dtype=torch.int64, device=ordered.device)
    last = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    torch.ne(ordered[1:], ordered[:-1], out=last[:-1])
    return last.nonzero().squeeze(-1) + 1


def sums_of_groups(values: Tensor, ends: Tensor) -> Tensor:
    """Sums ``(..., G)`` float64 of values ``(..., N)`` over consecutive groups with these ends."""
    if len(ends) == values.shape[-1]:
        return values.double()
    sums = values.double().cumsum(-1)[..., ends - 1]
    return torch.diff(sums, prepend=sums.new_zeros(*sums.shape[:-1], 1))


def order_rows(scores: Tensor, positive: Tensor) -> Ordered:
    """Sort rows by score and group equal scores; the result does not depend on the order of the rows.

    Args:
        scores: Log-odds of the confidence ``(N,)``, floating point; infinite scores are allowed. The confidence is
            ``1 / (1 + exp(-score))``.
        positive: ``(N,)`` bool.

    Returns:
        The groups, each ``(G,)``; G = 0 for no rows.

    Raises:
        ValueError: The shapes differ, or a score is NaN.

    Example:
        >>> order_rows(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([True, False, False])).correct
        tensor([0., 1.], dtype=torch.float64)
    """
    if scores.ndim != 1 or scores.shape != positive.shape:
        shapes = f"{tuple(scores.shape)} and {tuple(positive.shape)}"
        raise ValueError(f"The shapes of scores and positive are {shapes}; both must be (N,).")
    if bool(scores.isnan().any()):
        raise ValueError(
            f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN; they must not be NaN (inf is allowed)."
        )
    ordered, sorted_positive = _sorted(scores, positive.bool())
    ends = group_ends(ordered)
    count = torch.diff(ends, prepend=ends.new_zeros(1)).double()
    # Whole numbers below 2^53: their float64 sums are exact in any order.
    return Ordered(count, sums_of_groups(sorted_positive, ends), count * torch.sigmoid(ordered[ends - 1].double()))


def _sorted(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        ordered, order = scores.sort()
        return ordered, positive[order]
    # A float32 and its flag fit into one integer of the same order, and sorting integers takes half the time and memory
    # of sorting numbers with their positions. Negative numbers have all bits but the sign flipped; -0 becomes 0.
    bits = (scores + 0.0).view(torch.int32)
    keys = bits.bitwise_xor((bits >> 31) & 0x7FFFFFFF).long().bitwise_left_shift_(1).add_(positive)
    keys.numpy().sort()
    sorted_positive = (keys & 1).bool()
    bits = keys.bitwise_right_shift_(1).int()
    return bits.bitwise_xor_((bits >> 31) & 0x7FFFFFFF).view(torch.float32), sorted_positive
