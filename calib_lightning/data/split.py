"""Which images of a training file are for training, validation and calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from calib_lightning.data.longtail import Profile, long_tail_counts, long_tail_rows
from calib_lightning.seeding import derive_seed

Rows = NDArray[np.int64]
"""Row numbers, int64."""

_HELD_OUT, _SUBSET = 1, 2  # purposes that keep the random streams apart


@dataclass(frozen=True)
class SplitSpec:
    """How a training file is divided: held-out sets first, then the long tail, then a smaller share of what is left.

    Validation and calibration sets are class-balanced and do not overlap. The imbalance applies to the training
    images only, so both held-out sets stay balanced like the test set.

    Args:
        val: Images held out to choose epochs and settings; 0 for none.
        calibration: Images held out to fit post-hoc calibrators; 0 for none.
        imbalance: Smallest training class over the largest, in ``(0, 1]``; 1 keeps every image.
        profile: "exponential" (sizes fall geometrically in label order) or "step" (the second half of the classes
            is small).
        seed: Seed of every choice here, in ``[0, 2**32)``; it does not depend on the seed of the run.
        subset: Training images to keep, with class proportions unchanged; ``None`` keeps all.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> splits = SplitSpec(val=2, calibration=2).draw(np.repeat([0, 1], 5), num_classes=2)
        >>> [len(splits[name]) for name in ("train", "val", "calibration")]
        [6, 2, 2]
    """

    val: int = 0
    calibration: int = 0
    imbalance: float = 1.0
    profile: Profile = "exponential"
    seed: int = 0
    subset: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("val", self.val), ("calibration", self.calibration)):
            if size < 0:
                raise ValueError(f"{name}={size} is negative: give the number of images to hold out, 0 for none.")
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

    def draw(self, train_labels: NDArray[np.int64], num_classes: int) -> dict[str, Rows]:
        """Divide the rows of a training file.

        With nothing held out, the long-tailed rows are those of the official code of Cao et al. (2019) for the seed.

        Args:
            train_labels: Labels ``(N,)`` int64 in ``0..K-1``, in file order.
            num_classes: K.

        Returns:
            Rows of "train", "val" and "calibration": positions in ``train_labels``, int64, ascending, disjoint.

        Raises:
            ValueError: If the file has too few images for a requested size.
        """
        labels = np.asarray(train_labels)
        seed = derive_seed(self.seed, _HELD_OUT)
        val, calibration = cut_balanced(
            labels, {"val": self.val, "calibration": self.calibration}, num_classes=num_classes, seed=seed
        )
        left = np.setdiff1d(np.arange(len(labels)), np.concatenate([val, calibration]), assume_unique=True)
        counts = np.bincount(labels[left], minlength=num_classes).tolist()
        left = left[long_tail_rows(labels[left], long_tail_counts(counts, self.imbalance, self.profile), self.seed)]
        if self.subset is not None:
            left = left[self._subset(labels[left], self.subset, num_classes)]
        return {"train": left, "val": val, "calibration": calibration}

    def _subset(self, labels: Rows, size: int, num_classes: int) -> Rows:
        total = len(labels)
        if size > total:
            raise ValueError(
                f"subset={size} is more than the {total} training images that are left after the held-out sets and the"
                f" imbalance: use at most {total}, or null for all."
            )
        # largest remainder, in integers so that equal remainders are exactly equal; ties go to the lower class
        share = size * np.bincount(labels, minlength=num_classes)
        counts = share // total
        counts[np.argsort(-(share % total), kind="stable")[: size - counts.sum()]] += 1
        random = _random_state(derive_seed(self.seed, _SUBSET))
        kept = [random.permutation(np.flatnonzero(labels == label))[:count] for label, count in enumerate(counts)]
        return np.sort(np.concatenate(kept))


def cut_balanced(labels: Rows, sizes: dict[str, int], *, num_classes: int, seed: int) -> list[Rows]:
    """Cut disjoint, class-balanced sets from labelled rows.

    Every class gives ``size // K`` images to each set; what is left over goes to classes in a random order.

    Args:
        labels: Labels ``(N,)`` int64 in ``0..K-1``.
        sizes: Images in each set, by the set's name.
        num_classes: K.
        seed: Seed, in ``[0, 2**63)``.

    Returns:
        For each set its positions in ``labels``, int64, ascending.

    Raises:
        ValueError: If a class would have no image left after the cuts.
    """
    random = _random_state(seed)
    order = random.permutation(num_classes)
    quotas, extra = np.zeros((len(sizes), num_classes), dtype=np.int64), 0
    for quota, size in zip(quotas, sizes.values(), strict=True):
        quota += size // num_classes
        # the next set goes on where this one stopped, so that the sum over the sets is balanced too
        quota[order[(extra + np.arange(size % num_classes)) % num_classes]] += 1
        extra += size % num_classes
    cuts: list[list[Rows]] = [[] for _ in sizes]
    for label in range(num_classes):
        # a class is shuffled whole, whatever is cut from it: another size does not change the other classes
        rows = random.permutation(np.flatnonzero(labels == label))
        wanted = quotas[:, label]
        if wanted.sum() and wanted.sum() >= len(rows):
            asked = " + ".join(f"{name}={size}" for name, size in sizes.items() if size)
            fewest = int(np.bincount(labels, minlength=num_classes).min())
            raise ValueError(
                f"{asked} takes {wanted.sum()} images of class {label}, which has {len(rows)}, and leaves none to train"
                f" on: hold out fewer than {fewest * num_classes} images in all (fewer than {fewest} a class)."
            )
        for cut, part in zip(cuts, np.split(rows, np.cumsum(wanted))[:-1], strict=True):
            cut.append(part)
    return [np.sort(np.concatenate(cut)) for cut in cuts]


def _random_state(seed: int) -> np.random.RandomState:
    """Numpy's legacy generator, whose streams are frozen for good, from a seed of up to 64 bits."""
    return np.random.RandomState(np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32))
