"""Corruptions of a benchmark's own test images, where no archive of corrupted images is at hand."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from calib_lightning.data.array_files import load_npy, mapped
from calib_lightning.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    Table,
    check_corruption,
    corrupt,
    frost_photographs,
    table_for,
    unavailable,
)
from calib_lightning.data.divided import DividedData
from calib_lightning.data.sets import FileSet, InMemorySet
from calib_lightning.data.transforms import Compose, Normalize
from calib_lightning.data.web_files import locked
from calib_lightning.utils.files import remove_leftovers, write_whole

GENERATED = "generated"
"""The name under which these sets appear: never that of an archive, whose means they do not equal."""
_VERSION = 1
"""Part of the names of the stored files; raised when the same row is corrupted differently."""
_AT_ONCE = 500
_KEPT = 2**29  # bytes of corrupted images that are kept in memory where they cannot be stored


class Corrupt(nn.Module):
    """A corruption as a transform of uint8 batches.

    Args:
        corruption: One of `CORRUPTIONS`.
        severity: 1 to 5.
        rows: Row ``(N,)`` int64 of each image of the set in its file, which seeds it.
        table: The constants.
        seed: Seed of all random draws.
        frost: Photographs of frost; ``None`` if they are not needed.
    """

    def __init__(
        self,
        corruption: str,
        severity: int,
        rows: Tensor,
        table: Table,
        seed: int = 0,
        frost: Sequence[np.ndarray] | None = None,
    ) -> None:
        super().__init__()
        self.corruption, self.severity, self.rows = corruption, severity, rows
        self.table, self.seed, self.frost = table, seed, frost

    def forward(self, image: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Return corrupted images.

        Args:
            image: ``(N, C, H, W)`` uint8.
            index: Positions ``(N,)`` int64 in the set.
            epoch: Unused: an image is always corrupted in the same way.

        Returns:
            ``(N, C, H, W)`` uint8.
        """
        return corrupt(
            image, self.corruption, self.severity, self.rows[index], table=self.table, seed=self.seed, frost=self.frost
        )


class GeneratedShift:
    """Test images corrupted here, as in CIFAR-C and ImageNet-C (Hendrycks and Dietterich, ICLR 2019).

    The sets are ``shift/generated/<corruption>_<severity>``. Their images are not those of the archives, of which
    random draws, JPEG versions and frost photographs differ; so their means are never called CIFAR-C or ImageNet-C.

    Images in memory are corrupted once and stored under the data's root; image files are corrupted as they are read.

    Args:
        corruptions: Some of `CORRUPTIONS`; ``None`` means all 19.
        severities: Some of 1 to 5; ``None`` means all.
        table: Constants: "cifar" (for images of 32 pixels) or "imagenet" (224); ``None`` chooses by the images' size.
        seed: With the row of an image it determines every draw.
        frost: Folder of photographs for "frost", which alone needs any; ``None`` uses those of the extra
            ``corruptions``.

    Raises:
        ValueError: If a value is unknown.

    Example:
        >>> GeneratedShift(corruptions="fog", severities=(1, 5)).severities
        (1, 5)
    """

    def __init__(
        self,
        corruptions: Sequence[str] | str | None = None,
        severities: Sequence[int] | int | None = None,
        table: Table | None = None,
        seed: int = 0,
        frost: str | Path | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed is {seed!r}; it must be a whole number, at least 0.")
        self.corruptions: tuple[str, ...] = _tuple(CORRUPTIONS if corruptions is None else corruptions)
        self.severities: tuple[int, ...] = _tuple(SEVERITIES if severities is None else severities)
        for what, values in (("corruptions", self.corruptions), ("severities", self.severities)):
            if not values:
                raise ValueError(f"{what} is empty; it must name at least one, or be null for all.")
            if len(set(values)) < len(values):
                raise ValueError(f"{what} is {list(values)}; each must be named once.")
        for corruption in self.corruptions:
            for severity in self.severities:
                if severity is None:
                    raise ValueError(f"severities is {list(self.severities)}; each must be one of 1, 2, 3, 4, 5.")
                check_corruption(corruption, severity, table)
        self.table, self.seed = table, seed
        self.frost = None if frost is None else Path(frost).expanduser()
        self.note = ""

    def prepare_data(self) -> None:
        """Refuse what cannot be generated here.

        Raises:
            ValueError: If a corruption needs what is not installed; the message says what to do.
        """
        missing = unavailable(self.corruptions, self.frost)
        if missing:
            reasons = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in missing.items())
            others = [name for name in self.corruptions if name not in missing]
            without = f" Without: {{name: {GENERATED}, corruptions: [{', '.join(others)}]}}." if others else ""
            raise ValueError(f"{GENERATED} lacks what it needs: {reasons}.{without}")

    def sets(
        self, owner: DividedData, name: str, rows: int | None, normalize: Normalize
    ) -> dict[str, InMemorySet | FileSet]:
        """Corrupt the test images.

        Args:
            owner: Data with a test set.
            name: What the names of the sets begin with, such as ``shift/generated``.
            rows: How many of its first images; ``None`` for all.
            normalize: What follows.

        Returns:
            A set for each corruption and severity.

        Raises:
            ValueError: If there is no test set, its images are too small, or a corruption needs what is not installed.
        """
        if "test" not in owner.set_names:
            raise ValueError(f"shift has {GENERATED!r}, but {type(owner).__name__} has no test set to corrupt.")
        self.prepare_data()
        clean = _first(owner.set_of("test"), rows)
        _, height, width = owner.image_facts["shape"]
        table = self.table or table_for(height, width)
        kinds, steps = len(self.corruptions), len(self.severities)
        self.note = (
            f"{kinds} corruption{'s'[: kinds > 1]} x {steps} severit{'ies' if steps > 1 else 'y'} of "
            f"{len(clean):,} test images, constants {table!r}, seed {self.seed}; not the archive's images"
        )
        frost = frost_photographs(self.frost) if "frost" in self.corruptions else None
        made = {
            pair: Corrupt(*pair, clean.rows, table, self.seed, frost if pair[0] == "frost" else None)
            for pair in self._pairs()
        }
        found: dict[tuple[str, int], InMemorySet | FileSet]
        folder = None if isinstance(clean, FileSet) else self._folder(owner, clean, table, made)
        if folder is not None and isinstance(clean, InMemorySet):
            stored = _stored(folder, clean, made)
            found = {pair: replace(clean, image=image, transform=normalize) for pair, image in stored.items()}
        elif isinstance(clean, InMemorySet) and clean.image.numel() * len(made) <= _KEPT:
            bytes_of = {pair: _corrupted(clean, step) for pair, step in made.items()}
            found = {pair: replace(clean, image=image, transform=normalize) for pair, image in bytes_of.items()}
        else:
            first = clean.fetch(torch.arange(1), 0)
            for step in made.values():  # what cannot be done is said now, not after the training
                step(first.image, first.index, 0)
            found = {pair: replace(clean, transform=Compose(step, normalize)) for pair, step in made.items()}
        return {f"{name}/{corruption}_{severity}": each for (corruption, severity), each in found.items()}

    def _pairs(self) -> list[tuple[str, int]]:
        return [(corruption, severity) for corruption in self.corruptions for severity in self.severities]

    def _folder(
        self, owner: DividedData, clean: InMemorySet, table: Table, made: dict[tuple[str, int], Corrupt]
    ) -> Path | None:
        """Where the corrupted images of these test images are stored; ``None`` where nothing can be written."""
        root = getattr(owner, "file_options", {}).get("root")
        if root is None or not root.is_dir():
            return None
        digest = hashlib.sha256(f"{_VERSION} {table} {self.seed} {tuple(clean.image.shape)}".encode())
        clean.fingerprint(digest)
        digest.update(clean.rows.numpy().astype("<i8").tobytes())
        name = type(owner).__name__.removesuffix("DataModule").lower()
        folder: Path = root / GENERATED / f"{name}-{table}-{len(clean)}-{digest.hexdigest()[:12]}"
        there = next(path for path in (folder, *folder.parents) if path.exists())
        writable = there.is_dir() and os.access(there, os.W_OK) and there.stat().st_mode & stat.S_IWUSR  # also of root
        complete = all(_file(folder, pair, step).is_file() for pair, step in made.items())
        return folder if complete or writable else None


def _tuple(values: Any) -> tuple[Any, ...]:
    """Several values; one stands for itself."""
    if not isinstance(values, str | int | list | tuple):
        raise ValueError(
            f"corruptions or severities are {values!r}; they must be a list, such as [fog, snow] or [1, 5]."
        )
    return (values,) if isinstance(values, str | int) else tuple(values)


def _first(data: InMemorySet | FileSet, rows: int | None) -> InMemorySet | FileSet:
    """The first images of a set, as bytes."""
    if rows is None or rows >= len(data):
        return replace(data, transform=None)
    image = data.image[:rows] if isinstance(data, InMemorySet) else data.image[torch.arange(rows)]
    return replace(data, image=image, label=data.label[:rows], rows=data.rows[:rows], transform=None)  # type: ignore[arg-type]


def _stored(folder: Path, clean: InMemorySet, made: dict[tuple[str, int], Corrupt]) -> dict[tuple[str, int], Tensor]:
    """Corrupted images ``(N, C, H, W)``, mapped from files that are written where they are missing."""
    paths = {pair: _file(folder, pair, step) for pair, step in made.items()}
    if not all(path.is_file() for path in paths.values()):
        with locked(folder):
            if folder.is_dir():
                remove_leftovers(folder.iterdir())
            missing = [pair for pair, path in paths.items() if not path.is_file()]
            for pair in _with_progress(missing):
                image = _corrupted(clean, made[pair]).numpy()
                write_whole(paths[pair], partial(np.save, arr=image))
    found = {}
    for pair, path in paths.items():
        image = load_npy(path, mmap=True)
        if image.shape != tuple(clean.image.shape) or image.dtype != np.uint8:
            raise ValueError(
                f"{path} holds {image.dtype} of shape {image.shape}; it must hold uint8 of shape "
                f"{tuple(clean.image.shape)}. Delete it to generate it again."
            )
        found[pair] = mapped(image)
    return found


def _file(folder: Path, pair: tuple[str, int], step: Corrupt) -> Path:
    """The file of one corruption and severity; frost has the photographs in its name."""
    own = hashlib.sha256(b"".join(photograph.tobytes() for photograph in step.frost or ())).hexdigest()[:8]
    return folder / f"{pair[0]}_{pair[1]}{f'-{own}' if step.frost else ''}.npy"


def _corrupted(clean: InMemorySet, step: Corrupt) -> Tensor:
    """All images of a set, corrupted ``(N, C, H, W)``."""
    index = torch.arange(len(clean))
    return torch.cat([step(clean.image.index_select(0, part), part, 0) for part in torch.split(index, _AT_ONCE)])


def _with_progress(missing: Sequence[tuple[str, int]]) -> Iterable[tuple[str, int]]:
    bar: Iterable[tuple[str, int]] = tqdm(missing, desc="Corruptions", unit="set", disable=None)
    return bar
