"""Which images of a benchmark's files are for training, validation, calibration and test."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from calib_lightning.data.longtail import Thinning, random_state, shares
from calib_lightning.utils.seeding import derive_seed

Rows = NDArray[np.int64]
"""Row numbers, int64."""
File = Literal["train", "val", "test"]
"""One of the files of a benchmark."""
Choice = Literal["balanced", "proportional", "shuffled", "last"]
"""How the rows of a held-out set are chosen; see `SplitSpec`."""

_HELD_OUT = 1  # separates this random stream from others


class Part(NamedTuple):
    """Positions ``rows (N,)``, int64 ascending, in one file."""

    file: File
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class SplitSpec(Thinning):
    """How a benchmark's files are divided: held-out sets first, then the long tail, then a subset of the rest.

    Sizes are numbers of images, or fractions of the source file. A held-out set is chosen

    - "balanced": equally many images of each class;
    - "proportional": with the class proportions of the file;
    - "shuffled": the first rows after shuffling the file with NumPy's ``RandomState(seed)``, regardless of classes, as
      in the code of Mukhoti et al. (2020), whose seed is 1;
    - "last": the last rows of the file, as in the code of Neural Clamping.

    Args:
        val: Images held out to select epochs and settings; 0 for none, or if the benchmark has a file for them.
        calibration: Images held out to fit post-hoc calibrators; 0 for none.
        test: Images held out for testing if the benchmark has no file for them; 1.0 makes all images test images.
        share: Whether the validation set is also the calibration set, as in many papers.
        calibration_from: Source file of the calibration images: "train", "val" or "test".
        choose: One of the four; ``None`` means "balanced", or "proportional" for the user's own data.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> splits = SplitSpec(val=2, calibration=2).draw(np.repeat([0, 1], 5), num_classes=2)
        >>> [len(splits[name]) for name in ("train", "val", "calibration")]
        [6, 2, 2]
    """

    val: int | float = 0
    calibration: int | float = 0
    test: int | float = 0
    share: bool = False
    calibration_from: File = "train"
    choose: Choice | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("val", "calibration", "test"):
            size = getattr(self, name)
            if size < 0:
                raise ValueError(f"{name} is {size}; it must be at least 0, the number of images to hold out.")
            if isinstance(size, float) and size >= 1 and not (name == "test" and size == 1):
                raise ValueError(f"{name} is {size}; it must be an integer number of images, or a fraction below 1.")
        for name, allowed in (("calibration_from", get_args(File)), ("choose", (*get_args(Choice), None))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(filter(None, allowed))}."
                )
        if self.share and self.calibration not in (0, self.val):
            raise ValueError(
                f"share is true, calibration is {self.calibration} and val is {self.val}; with share, the validation "
                "set is also the calibration set. Set calibration=0 and val above 0, or share=False."
            )

    def draw(self, train_labels: Rows, num_classes: int) -> dict[str, Rows]:
        """Divide the rows of a training file.

        Args:
            train_labels: Labels ``(N,)`` int64 in ``0..K-1``, in file order.
            num_classes: K.

        Returns:
            Rows of "train", "val", "calibration" and, if requested, "test": positions in ``train_labels``, int64,
            ascending.

        Raises:
            ValueError: If the file has too few images for a requested size.
        """
        none = np.empty(0, dtype=np.int64)
        parts = self.divide({"train": train_labels}, num_classes)
        return dict.fromkeys(("train", "val", "calibration"), none) | {k: part.rows for k, part in parts.items()}

    def for_files(self, files: Collection[File]) -> SplitSpec:
        """Return the settings for the user's own files, whose class sizes usually differ.

        Args:
            files: The available files.

        Returns:
            A copy without sizes of sets that have a file, and "proportional" unless ``choose`` is set.
        """
        val = self.val if "train" in files and "val" not in files else 0
        test = 0 if "test" in files else self.test
        return replace(self, val=val, test=test, choose=self.choose or "proportional")

    def divide(self, labels: Mapping[File, Rows], num_classes: int) -> dict[str, Part]:
        """Divide the rows of a benchmark's files.

        Args:
            labels: Labels ``(N,)`` int64 in ``0..K-1`` of each available file, in file order; "train" may be missing.
            num_classes: K.

        Returns:
            The non-empty sets among "train", "val", "calibration" and "test"; they are disjoint except with ``share``.

        Raises:
            ValueError: If a file has too few images, or the files and the settings are inconsistent.
        """
        if list(labels) == ["train"] and isinstance(self.test, float) and self.test == 1:
            return {"test": Part("train", np.arange(len(labels["train"])))}
        self._check_files(labels)
        cuts = {"val": self.val, "calibration": 0 if self.share else self.calibration, "test": self.test}
        parts: dict[str, Part] = {}
        for file, found in labels.items():
            ours = {name: size for name, size in cuts.items() if size and self._file_of(name) == file}
            sizes = {
                name: max(1, round(size * len(found))) if isinstance(size, float) else size
                for name, size in ours.items()
            }
            held_out = self._cut(found, sizes, num_classes, file)
            left = np.setdiff1d(np.arange(len(found)), np.concatenate([np.empty(0, np.int64), *held_out.values()]))
            if file == "train":
                left = left[self.thin(found[left], num_classes)]
            parts |= {name: Part(file, rows) for name, rows in {file: left, **held_out}.items() if len(rows)}
        if self.share and "val" in parts:
            parts["calibration"] = parts["val"]
        order = ("train", "val", "calibration", "test")
        return {name: parts[name] for name in order if name in parts}

    def _file_of(self, name: str) -> File:
        return self.calibration_from if name == "calibration" else "train"

    def _check_files(self, labels: Mapping[File, Rows]) -> None:
        if "train" not in labels:
            return
        for name in ("val", "test"):
            if name in labels and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but the data already has {len(labels[name])} {name} images. "
                    f"Leave split.{name} at 0."
                )
        if self.calibration and not self.share and self.calibration_from not in labels:
            raise ValueError(
                f"calibration_from is {self.calibration_from!r}; it must be one of the data's files: "
                f"{', '.join(labels)}."
            )
        if self.share and not self.val and "val" not in labels:
            raise ValueError(
                "share is true, but there are no validation images. Set split.val above 0, or share=False."
            )

    def _cut(self, labels: Rows, sizes: dict[str, int], num_classes: int, file: File) -> dict[str, Rows]:
        if not sizes:
            return {}
        if self.choose in (None, "balanced"):
            seed = derive_seed(self.seed, _HELD_OUT)
            # fixed positions, so that a set's rows do not depend on the other sets
            sizes = {"val": 0, "calibration": 0} | sizes
            cuts = cut_balanced(labels, sizes, num_classes=num_classes, seed=seed)
            return {name: rows for (name, size), rows in zip(sizes.items(), cuts, strict=True) if size}
        total = sum(sizes.values())
        if total >= len(labels):
            asked = " + ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"{asked} takes {total} of {len(labels)} images and leaves none. Hold out fewer.")
        if self.choose == "proportional":
            return self._proportional(labels, sizes, num_classes, kept=1 if file == "train" else 0)
        order = np.arange(len(labels))[::-1]
        if self.choose == "shuffled":
            order = np.arange(len(labels))
            np.random.RandomState(self.seed).shuffle(order)
        cuts = np.split(order, np.cumsum(list(sizes.values())))
        return {name: np.sort(rows) for name, rows in zip(sizes, cuts, strict=False)}

    def _proportional(self, labels: Rows, sizes: dict[str, int], num_classes: int, kept: int) -> dict[str, Rows]:
        random = random_state(derive_seed(self.seed, _HELD_OUT))
        # every class keeps its last training image
        order = [random.permutation(np.flatnonzero(labels == label))[kept:] for label in range(num_classes)]
        ties, cuts = random.permutation(num_classes), {}
        if sum(sizes.values()) > (free := sum(map(len, order))):
            asked = " + ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"{asked} leaves a class without images. Hold out at most {free} in total.")
        for name, size in sizes.items():
            quota = shares(np.array([len(rows) for rows in order]), size, ties)
            cuts[name] = np.sort(np.concatenate([rows[:taken] for rows, taken in zip(order, quota, strict=True)]))
            order = [rows[taken:] for rows, taken in zip(order, quota, strict=True)]
        return cuts


def cut_balanced(labels: Rows, sizes: dict[str, int], *, num_classes: int, seed: int) -> list[Rows]:
    """Cut disjoint, class-balanced sets of the given ``sizes`` from rows labelled ``0..K-1``.

    Every class gives ``size // K`` images to each set; the remainder goes to classes in a random order. Returns int64
    positions, ascending, for each set; every class must keep at least one image.
    """
    random = random_state(seed)
    order = random.permutation(num_classes)
    quotas, extra = np.zeros((len(sizes), num_classes), dtype=np.int64), 0
    for quota, size in zip(quotas, sizes.values(), strict=True):
        quota += size // num_classes
        # the next set continues where this one stopped, so that the sum over sets is balanced too
        quota[order[(extra + np.arange(size % num_classes)) % num_classes]] += 1
        extra += size % num_classes
    cuts: list[list[Rows]] = [[] for _ in sizes]
    for label in range(num_classes):
        # always shuffle the whole class, so that its size does not affect other classes
        rows = random.permutation(np.flatnonzero(labels == label))
        wanted = quotas[:, label]
        if wanted.sum() and wanted.sum() >= len(rows):
            asked = " + ".join(f"{name}={size}" for name, size in sizes.items() if size)
            fewest = int(np.bincount(labels, minlength=num_classes).min())
            raise ValueError(
                f"{asked} takes {wanted.sum()} of the {len(rows)} images of class {label} and leaves none. Hold out "
                f"fewer than {fewest * num_classes} images in total (fewer than {fewest} per class)."
            )
        for cut, part in zip(cuts, np.split(rows, np.cumsum(wanted))[:-1], strict=True):
            cut.append(part)
    return [np.sort(np.concatenate(cut)) for cut in cuts]
