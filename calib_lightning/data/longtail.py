"""Long-tailed training sets, drawn as in the official code of Cao et al. (LDAM-DRW, NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Profile = Literal["exponential", "step"]
"""How class sizes fall: along a geometric series in label order, or in one step at the middle class."""


def long_tail_counts(counts: Sequence[int], imbalance: float, profile: Profile = "exponential") -> list[int]:
    """Sizes of the classes of a long-tailed set (Cui et al., CVPR 2019; Buda et al., Neural Networks 2018).

    With ``n_max`` the largest count and k in label order, "exponential" gives ``int(n_max * f ** (k / (K - 1)))``;
    "step" gives ``n_max`` to the first ``K // 2`` classes and ``int(n_max * f)`` to the rest.

    Args:
        counts: Images available in each of the K classes.
        imbalance: f, the smallest class size over the largest, in ``(0, 1]``.
        profile: "exponential" or "step".

    Returns:
        Images to keep of each class, never more than the class has.

    Raises:
        ValueError: If a class that has images would keep none.

    Example:
        >>> long_tail_counts([5000] * 10, 0.01)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]

    Deviations:
        With an odd number of classes the official step profile drops the last class; here it is a small one.
    """
    largest, last = max(counts), max(len(counts) - 1, 1)
    kept = []
    for label, available in enumerate(counts):
        if profile == "exponential":
            wanted = int(largest * imbalance ** (label / last))
        else:
            wanted = largest if label < len(counts) // 2 else int(largest * imbalance)
        if available and not wanted:
            raise ValueError(
                f"imbalance={imbalance} keeps no image of class {label}: the largest class has {largest} images, so"
                f" imbalance must be at least {1 / largest:.3g}. Raise `imbalance`."
            )
        kept.append(min(wanted, available))
    return kept


def long_tail_rows(labels: NDArray[np.int64], counts: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Choose the images of a long-tailed set, the same ones as the official code with that seed.

    Numpy's legacy generator is seeded once; classes are visited in label order, the positions of each in file order
    are shuffled, and the first ones are kept.

    Args:
        labels: Labels ``(N,)`` int64 in file order.
        counts: Images to keep of each class.
        seed: Seed of numpy's ``RandomState``.

    Returns:
        Positions in ``labels``, int64, ascending.
    """
    random = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        rows = np.flatnonzero(labels == label)
        random.shuffle(rows)
        kept.append(rows[:count])
    return np.sort(np.concatenate(kept))
