"""One's own images in folders, one for each class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.folders import class_files
from calib_lightning.data.sets import ImageFiles
from calib_lightning.data.source import Source
from calib_lightning.data.split import File, SplitSpec
from calib_lightning.utils.images import Frame, Header, read_header

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
"""Endings of files that are read."""
OWN_SPLIT = SplitSpec(val=0.1, calibration=0.1, test=0.2)
"""How one's own data are divided where nothing else is said."""
_PARTS: dict[str, File] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_PARTS |= {"val": "val", "valid": "val", "validation": "val"}
_STATISTICS = {1: ((0.5,), (0.5,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
_SIDE = 224  # of images of different sizes
_LOOKED_AT, _CHECKED, _NAMED = 200, 100_000, 10
_NARROW = 100  # longer side over the shorter one


class FolderDataModule(BenchmarkDataModule):
    """Images in folders, ``root/<class>/...`` or ``root/{train,val,test}/<class>/...``; a folder is a class.

    Images may be grey, RGB, with a palette or turned by the camera; each is decoded when it is needed. Classes are
    numbered in the order of their sorted names. What is not divided by folders is divided by ``split``, whose sizes
    for sets that have a folder are not used. A ``test`` folder alone is for evaluation.

    Args:
        root: The folder.
        split: How the images are divided; by default 10 % validation, 10 % calibration, 20 % test, class by class.
        batch_size: Rows of one batch of one process.
        num_workers: Processes that decode images.
        size: Side, or height and width, in pixels; ``None`` takes that of the images, or 224 if they differ.
        channels: 1 (grey) or 3 (RGB); ``None`` takes 1 if the images are grey.
        augment: Whether a random part (35 to 100 %) of each training image is taken and mirrored half of the time.
        mean: Mean of each channel, as a fraction; ``None`` takes ImageNet's for RGB and 0.5 for grey images.
        std: Standard deviation of each channel, likewise (0.5 for grey images).

    Raises:
        FileNotFoundError: If there is no such folder, or no folder of a class in it.

    Example:
        ``FolderDataModule("photos", size=224)``
    """

    default_split: ClassVar[SplitSpec] = OWN_SPLIT
    crop_scale = (0.35, 1.0)

    def __init__(
        self,
        root: str | Path = "data",
        split: SplitSpec | None = None,
        batch_size: int = 32,
        num_workers: int = 2,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        augment: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(split, batch_size, num_workers)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (RGB). Leave it out to look.")
        self.root = Path(root).expanduser().resolve()
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size is {size}; it must be a number of pixels, or height and width. Use such as 224.")
        self.channels, self.augment, self._given = channels, augment, (mean, std)
        self.parts = self._find_parts()
        first = self.parts.get("train") or self.parts["test"]
        self.class_names: tuple[str, ...] = tuple(_folders(first))
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise FileNotFoundError(
                f"{first} has {self.num_classes} folders; a classifier needs two classes at least. Give every class a"
                " folder of its own with its images."
            )
        self.official_val = "val" in self.parts
        self.split = self.split.for_files(self.parts)

    def prepare_data(self) -> None:
        """Look at every image file (at 100,000 of them, if there are more).

        Raises:
            ValueError: If some cannot be read; the message names them.
        """
        paths = [folder / name for folder, names, _ in map(self._list, self.parts) for name in names]
        chosen = [paths[row] for row in _spread(len(paths), _CHECKED)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(_look, chosen))
        faults = [fault for fault in found if isinstance(fault, str)]
        if faults:
            more = f"\n  and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
            lines = "\n".join(f"  {fault}" for fault in faults[:_NAMED])
            raise ValueError(
                f"{len(faults)} of {len(chosen)} image files under {self.root} cannot be used:\n{lines}{more}\nRepair"
                " them, or take them out of the folder."
            )
        coloured = [path for path, header in zip(chosen, found, strict=True) if header == 3]
        if self.channels is None and coloured and self._channels(paths) == 1:
            raise ValueError(f"{coloured[0]} has colours, most images are grey; set channels to 1 or 3.")

    @property
    def identity(self) -> str:
        """Another folder is other data."""
        return f"{super().identity} {self.root}"

    def load_train(self) -> Source | None:
        """List the images that are trained on, and what is cut from them."""
        return self._load("train")

    def load_val(self) -> Source | None:
        """List the images of the validation folder."""
        return self._load("val")

    def load_test(self) -> Source | None:
        """List the images of the test folder."""
        return self._load("test")

    def setup(self, stage: str | None = None) -> None:
        """List the images, choose their common size and colours, and divide them; a second call does nothing."""
        if not self._sets:
            self._choose_frame()
        super().setup(stage)

    def _load(self, part: File) -> Source | None:
        if part not in self.parts:
            return None
        folder, names, label = self._list(part)
        return Source(ImageFiles(folder, names, self._frame), label)

    def _list(self, part: File) -> tuple[Path, list[str], Tensor]:
        """Folder, names and labels of a part, whose classes are among those of the first one."""
        folder = self.parts[part]
        present = _folders(folder)
        if unknown := [name for name in present if name not in self.class_names]:
            raise ValueError(
                f"{folder} has the class {unknown[0]!r}, which is not trained on; it must be one of"
                f" {', '.join(self.class_names)}. Rename the folder or take it out."
            )
        names, place = class_files(folder, present, SUFFIXES)
        return folder, names, torch.tensor([self.class_names.index(name) for name in present])[place]

    def _find_parts(self) -> dict[File, Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"root is {str(self.root)!r}; it must be a folder. Set it to that of the images.")
        found = _folders(self.root)
        parts: dict[File, Path] = {}
        for name in found:
            if (part := _PARTS.get(name.lower())) is not None:
                if part in parts:
                    raise ValueError(f"{self.root} has two folders of {part} images, {parts[part].name} and {name}.")
                parts[part] = self.root / name
        if not all(_folders(folder) for folder in parts.values()):
            return {"train": self.root}  # folders of images: a class of vehicles, say, may be called train
        if "train" not in parts and "test" not in parts:
            if parts:
                raise FileNotFoundError(f"{self.root} has a folder {', '.join(found)} but none called train.")
            return {"train": self.root}
        if unread := [name for name in found if self.root / name not in parts.values()]:
            warnings.warn(f"folders of {self.root} beside train, val and test are not read: {unread}", stacklevel=4)
        return parts

    def _channels(self, paths: Sequence[Path]) -> int:
        return max(header.channels for header in _headers(paths))

    def _choose_frame(self) -> None:
        """Look at some images; all processes look at the same ones."""
        paths = [folder / name for folder, names, _ in map(self._list, self.parts) for name in names]
        sizes = {(header.height, header.width) for header in _headers(paths)}
        size = self.size or (sizes.pop() if len(sizes) == 1 else (_SIDE, _SIDE))
        channels = self.channels or self._channels(paths)
        self._frame = Frame(size, channels)
        mean, std = self._given
        self.mean, self.std = mean or _STATISTICS[channels][0], std or _STATISTICS[channels][1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{name} is {tuple(values)}; it must have {channels} numbers, one for each channel.")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _spread(size: int, most: int) -> Sequence[int]:
    """Positions spread evenly over a list, all of them if there are not more than ``most``."""
    return range(size) if size <= most else [int(row) for row in np.linspace(0, size - 1, most)]


def _look(path: Path) -> str | int:
    """Number of channels of a file, or what is wrong with it."""
    try:
        header = read_header(path, upright=False)
    except ValueError as error:
        return f"{path}: {error}"
    longer, shorter = max(header.height, header.width), min(header.height, header.width)
    return (
        f"{path}: it is {header.width} x {header.height}, too long and narrow; crop it"
        if longer > _NARROW * shorter
        else header.channels
    )


def _headers(paths: Sequence[Path]) -> list[Header]:
    """Headers of some of the files."""
    headers = []
    for path in (paths[row] for row in _spread(len(paths), _LOOKED_AT)):
        try:
            headers.append(read_header(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Repair it, or take it out of the folder.") from error
    return headers
