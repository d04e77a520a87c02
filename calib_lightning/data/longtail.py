"""Reduced training sets: long tails, drawn as in the official code of Cao et al. (LDAM-DRW, 2019), and subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from calib_lightning.utils.seeding import derive_seed

Profile = Literal["exponential", "step"]
"""How class sizes decrease: geometrically in label order, or in one step at the middle class."""

_SUBSET = 2  # separates this random stream from others


@dataclass(frozen=True, kw_only=True)
class Thinning:
    """Which training images are kept; held-out and test images are never reduced.

    Args:
        imbalance: Size ratio of the smallest to the largest training class, in ``(0, 1]``; 1 keeps every image.
        profile: "exponential" (sizes decrease geometrically in label order) or "step" (the second half of the classes
            is small).
        subset: Number of training images to keep, with unchanged class proportions; ``None`` keeps all.
        seed: Seed of every choice here, in ``[0, 2**32)``; independent of the seed of the run.

    Raises:
        ValueError: If a value is out of range.
    """

    imbalance: float = 1.0
    profile: Profile = "exponential"
    subset: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.imbalance <= 1:
            raise ValueError(
                f"imbalance is {self.imbalance}; it must be in (0, 1], the size ratio of the smallest to the largest "
                "class. 1 means no imbalance."
            )
        if self.profile not in get_args(Profile):
            raise ValueError(f"profile is {self.profile!r}; it must be one of {', '.join(get_args(Profile))}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2**32), the range of NumPy's RandomState.")
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"subset is {self.subset}; it must be at least 1, or null for all images.")

    def thin(self, labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
        """Return the positions, int64 ascending, of the images to keep: first the long tail, then the subset.

        The long tail equals that of the official code of Cao et al. (2019) for the seed.
        """
        counts = np.bincount(labels, minlength=num_classes).tolist()
        kept = long_tail_rows(labels, long_tail_counts(counts, self.imbalance, self.profile), self.seed)
        if self.subset is None:
            return kept
        if self.subset > len(kept):
            raise ValueError(
                f"subset is {self.subset}; it must be at most {len(kept)}, the training images left after the held-out "
                "sets and the imbalance, or null for all."
            )
        quota = shares(np.bincount(labels[kept], minlength=num_classes), self.subset)
        random = random_state(derive_seed(self.seed, _SUBSET))
        rows = [random.permutation(np.flatnonzero(labels[kept] == label))[:size] for label, size in enumerate(quota)]
        chosen: NDArray[np.int64] = kept[np.sort(np.concatenate(rows))]
        return chosen


def long_tail_counts(counts: Sequence[int], imbalance: float, profile: Profile = "exponential") -> list[int]:
    """Class sizes of a long-tailed set (Cui et al., CVPR 2019; Buda et al., Neural Networks 2018).

    With the largest count ``n_max`` and k in label order, "exponential" gives ``int(n_max * f ** (k / (K - 1)))``;
    "step" gives ``n_max`` to the first ``K // 2`` classes and ``int(n_max * f)`` to the rest.

    Args:
        counts: Images available in each of the K classes.
        imbalance: f, the size ratio of the smallest to the largest class, in ``(0, 1]``.
        profile: "exponential" or "step".

    Returns:
        Images to keep per class, never more than the class has.

    Raises:
        ValueError: If a non-empty class would keep no images.

    Example:
        >>> long_tail_counts([5000] * 10, 0.01)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]

    Deviations:
        With an odd number of classes, the official step profile drops the last class; here it is a small class.
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
                f"imbalance is {imbalance}, which keeps no image of class {label}; the largest class has {largest} "
                f"images, so it must be at least {1 / largest:.3g}."
            )
        kept.append(min(wanted, available))
    return kept


def long_tail_rows(labels: NDArray[np.int64], counts: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Choose the images of a long-tailed set, identical to the official code with that seed.

    NumPy's legacy generator is seeded once; for each class in label order, its positions in file order are shuffled and
    the first ones are kept.

    Args:
        labels: Labels ``(N,)`` int64 in file order.
        counts: Images to keep per class.
        seed: Seed of NumPy's ``RandomState``.

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
    """Divide a size among classes in proportion to their counts; no class gets more than it has."""
    # largest remainder, in integers so that equal remainders compare equal; ties go to the first in the order
    order = np.arange(len(counts)) if order is None else order
    total = int(counts.sum())
    share = size * counts
    quota = share // total
    quota[order[np.argsort(-(share % total)[order], kind="stable")][: size - quota.sum()]] += 1
    return quota


def random_state(seed: int) -> np.random.RandomState:
    """NumPy's legacy generator, whose streams never change, from a seed of up to 64 bits."""
    return np.random.RandomState(np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32))
