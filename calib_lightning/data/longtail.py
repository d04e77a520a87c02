"""Training sets thinned out: long tails, drawn as in the official code of Cao et al. (LDAM-DRW, 2019), and subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from calib_lightning.utils.seeding import derive_seed

Profile = Literal["exponential", "step"]
"""How class sizes fall: along a geometric series in label order, or in one step at the middle class."""

_SUBSET = 2  # purpose that keeps this random stream apart


@dataclass(frozen=True, kw_only=True)
class Thinning:
    """Which training images are kept; held-out and test images are never thinned out.

    Args:
        imbalance: Smallest training class over the largest, in ``(0, 1]``; 1 keeps every image.
        profile: "exponential" (sizes fall geometrically in label order) or "step" (the second half of the classes
            is small).
        subset: Training images to keep, with class proportions unchanged; ``None`` keeps all.
        seed: Seed of every choice here, in ``[0, 2**32)``; it does not depend on the seed of the run.

    Raises:
        ValueError: If a value is outside its range.
    """

    imbalance: float = 1.0
    profile: Profile = "exponential"
    subset: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.imbalance <= 1:
            raise ValueError(
                f"imbalance={self.imbalance} is outside (0, 1]: it is the smallest class size over the largest;"
                " use 1 for no imbalance."
            )
        if self.profile not in get_args(Profile):
            raise ValueError(f"profile={self.profile!r} is unknown: use one of {', '.join(get_args(Profile))}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is outside [0, 2**32), what numpy's RandomState takes; choose another.")
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"subset={self.subset} keeps no image: give a number of at least 1, or null for all.")

    def thin(self, labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
        """Choose the images that are kept: first the long tail, then the subset.

        Args:
            labels: Labels ``(N,)`` int64 in ``0..K-1``, in file order.
            num_classes: K.

        Returns:
            Positions in ``labels``, int64, ascending. The long-tailed ones are those of the official code of Cao et al.
            (2019) for the seed.

        Raises:
            ValueError: If there are too few images.
        """
        counts = np.bincount(labels, minlength=num_classes).tolist()
        kept = long_tail_rows(labels, long_tail_counts(counts, self.imbalance, self.profile), self.seed)
        if self.subset is None:
            return kept
        if self.subset > len(kept):
            raise ValueError(
                f"subset={self.subset} is more than the {len(kept)} training images that are left after the held-out"
                f" sets and the imbalance: use at most {len(kept)}, or null for all."
            )
        quota = shares(np.bincount(labels[kept], minlength=num_classes), self.subset)
        random = random_state(derive_seed(self.seed, _SUBSET))
        rows = [random.permutation(np.flatnonzero(labels[kept] == label))[:size] for label, size in enumerate(quota)]
        chosen: NDArray[np.int64] = kept[np.sort(np.concatenate(rows))]
        return chosen


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


def shares(counts: NDArray[np.int64], size: int, order: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Divide a size among classes in proportion to their counts; none gets more than it has."""
    # largest remainder, in integers so that equal remainders are exactly equal; ties go to the first in the order
    order = np.arange(len(counts)) if order is None else order
    total = int(counts.sum())
    share = size * counts
    quota = share // total
    quota[order[np.argsort(-(share % total)[order], kind="stable")][: size - quota.sum()]] += 1
    return quota


def random_state(seed: int) -> np.random.RandomState:
    """Numpy's legacy generator, whose streams are frozen for good, from a seed of up to 64 bits."""
    return np.random.RandomState(np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32))
