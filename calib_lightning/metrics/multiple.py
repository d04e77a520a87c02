"""P-values of many comparisons at once, so that a mark in a table of many methods is not chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that the chance of any false rejection is bounded (Holm, 1979).

    In ascending order, ``max_{j <= k} (m - j + 1) p_(j)``, at most 1: to reject where the result is at most 0.05
    rejects a true hypothesis in at most 5 % of the tables, however the tests depend on each other.

    Args:
        p_values: p-values of m comparisons; nan for one that could not be made, which does not count.

    Returns:
        The adjusted p-values in the same order.

    Raises:
        ValueError: A value is not in [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    found = np.asarray(p_values, dtype=np.float64)
    known = ~np.isnan(found)
    outside = found[known & ((found < 0.0) | (found > 1.0))]
    if len(outside):
        raise ValueError(f"p_values has {outside[0]}; it must be from 0 to 1, or nan.")
    adjusted = np.full(len(found), np.nan)
    order = np.flatnonzero(known)[np.argsort(found[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * found[order]), 1.0) if len(order) else []
    return [float(value) for value in adjusted]


def step_down_max(drawn: Tensor) -> Tensor:
    """Adjust exchange tests for many pairs by the largest statistic (Westfall and Young, 1993; Romano and Wolf, 2005).

    With ``z = d / rms(d*)``, a difference in units of its own spread under exchanges, pairs are taken in descending
    order of ``|z|``. The adjusted p-value of one is the share of exchanges in which the largest ``|z*|`` of it and all
    that follow is at least its ``|z|``, and not below that of a pair before. As the tosses are the same for all pairs,
    this takes their dependence into account, and needs no more exchanges for more pairs, unlike Holm's method.

    Args:
        drawn: Differences of each pair ``(pairs, 1 + n)``, as `exchange.differences` gives them.

    Returns:
        Adjusted p-values ``(pairs,)`` float64; nan where the difference is undefined.

    Example:
        >>> step_down_max(torch.tensor([[3.0, 1.0, -1.0, 1.0], [0.5, 1.0, 1.0, -1.0]]))
        tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    values, exchanged = drawn[:, 0].double(), drawn[:, 1:].double()
    undefined, defined = values.isnan(), (~exchanged.isnan()).sum(dim=1)
    scale = exchanged.square().nanmean(dim=1).sqrt()
    # Equal runs do not differ after exchanges either; an infinite difference is infinite after each.
    usable = (scale > 0.0) & scale.isfinite()
    z = torch.where(usable, values / scale, 0.0).abs()
    statistics = torch.where(usable.unsqueeze(1), exchanged / scale.unsqueeze(1), 0.0).abs().nan_to_num(nan=-1.0)
    statistics[undefined] = -1.0  # it is not tested
    order = z.masked_fill(undefined, -1.0).argsort(descending=True, stable=True)
    # largest of each pair and all that follow
    largest = statistics[order].flip(0).cummax(dim=0).values.flip(0)
    at_least = (largest >= (z[order] * (1 - 1e-10) - 1e-12).unsqueeze(1)).sum(dim=1)
    # over the exchanges after which the pair is defined, so that no adjusted value is below its own p-value
    p_values = ((1.0 + at_least.double()) / (1.0 + defined[order])).clamp(max=1.0).cummax(dim=0).values
    adjusted = torch.empty_like(z)
    adjusted[order] = p_values
    return adjusted.masked_fill(undefined, torch.nan)
