"""The user's own images, in one folder per class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.card import Card
from calib_lightning.data.divided import DividedData
from calib_lightning.data.flat_folder import FlatFolder
from calib_lightning.data.folders import class_files
from calib_lightning.data.image_checks import SUFFIXES, looked_at, spread
from calib_lightning.data.sets import ImageFiles
from calib_lightning.data.source import Source
from calib_lightning.data.split import File, SplitSpec
from calib_lightning.utils.images import Frame, Header, read_header

OWN_SPLIT = SplitSpec(val=0.1, calibration=0.1, test=0.2)
"""Default split of the user's own data."""
_PARTS: dict[str, File] = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_PARTS |= {"val": "val", "valid": "val", "validation": "val"}
_STATISTICS = {1: ((0.5,), (0.5,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
_SIDE = 224  # for images of different sizes
_LOOKED_AT = 200


class FolderDataModule(BenchmarkDataModule):
    """Images in folders, ``root/<class>/...`` or ``root/{train,val,test}/<class>/...``; a folder is a class.

    Images may be grey, RGB, palettised or rotated by the camera; they are decoded on demand. Classes are numbered in
    the order of their sorted names. ``split`` divides whatever the folders do not; its sizes are ignored for sets that
    have a folder. A ``test`` folder alone is for evaluation.

    Args:
        root: The folder.
        split: How the images are divided; by default 10 % validation, 10 % calibration, 20 % test, stratified by class.
        batch_size: Batch size per process.
        num_workers: Worker processes that decode images.
        size: Side, or height and width, in pixels; ``None`` uses that of the images, or 224 if they differ.
        channels: 1 (grey) or 3 (RGB); ``None`` uses 1 if the images are grey.
        augment: Whether training images are randomly cropped (35 to 100 % of the area) and mirrored.
        mean: Mean of each channel, as a fraction; ``None`` uses ImageNet's for RGB and 0.5 for grey images.
        std: Standard deviation of each channel, likewise (0.5 for grey images).
        **others: ``shift``, ``ood`` and ``shift_rows`` of `BenchmarkDataModule`.

    Raises:
        FileNotFoundError: If the folder does not exist, or has no class folders.

    Example:
        ``FolderDataModule("photos", size=224)``
    """

    default_split: ClassVar[SplitSpec] = OWN_SPLIT
    crop_scale = (0.35, 1.0)
    card = Card(None, None, None, 0, "yours", "your folder --data.root")

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
        **others: Any,
    ) -> None:
        super().__init__(split, batch_size, num_workers, **others)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (RGB), or None to detect it.")
        self.root = Path(root).expanduser().resolve()
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size is {size}; it must be a number of pixels, or height and width, such as 224.")
        self.channels, self.augment, self._given = channels, augment, (mean, std)
        self.parts = self._find_parts()
        first = self.parts.get("train") or self.parts["test"]
        self.class_names: tuple[str, ...] = tuple(_folders(first))
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise FileNotFoundError(
                f"{first} has {self.num_classes} folders; it must have one for each of at least two classes. Give "
                "every class its own folder of images."
            )
        self.official_val = "val" in self.parts
        self.split = self.split.for_files(self.parts)

    def prepare_data(self) -> None:
        """Check every image file, or an even sample of 100,000.

        Raises:
            ValueError: If some cannot be read; the message names them.
        """
        paths = [folder / name for folder, names, _ in map(self._list, self.parts) for name in names]
        found = looked_at(self.root, paths)
        coloured = [path for path, channels in found.items() if channels == 3]
        if self.channels is None and coloured and self._channels(paths) == 1:
            raise ValueError(f"{coloured[0]} is in colour, but most images are grey. Set channels to 1 or 3.")
        super().prepare_data()

    @property
    def identity(self) -> str:
        """Name of the data, including the folder."""
        return f"{super().identity} {self.root}"

    @property
    def image_channels(self) -> int:
        """C of the images, from a sample of the files."""
        self._choose_frame()
        return self._frame.channels

    def setup(self, stage: str | None = None) -> None:
        """List the images, choose a common size and number of channels, and split; a second call has no effect."""
        if not self._sets:
            self._choose_frame()
        super().setup(stage)

    @classmethod
    def of_other_classes(cls, **settings: Any) -> DividedData:
        """Build data of images without labels: of class folders, or of a folder that has none."""
        root = Path(settings.get("root", "data")).expanduser()
        if root.is_dir() and len(_folders(root)) < 2:
            return FlatFolder(**settings)
        return super().of_other_classes(**settings)

    def load_for_evaluation(self) -> Source | None:
        """List the test images, or all images where there are no others."""
        self._choose_frame()
        return super().load_for_evaluation()

    def load_part(self, part: File) -> Source | None:
        """List the images of one of the parts that the folder has."""
        if part not in self.parts:
            return None
        folder, names, label = self._list(part)
        return Source(ImageFiles(folder, names, self._frame), label)

    def _list(self, part: File) -> tuple[Path, list[str], Tensor]:
        """Folder, names and labels of a part, whose classes must be among those of the first part."""
        folder = self.parts[part]
        present = _folders(folder)
        if unknown := [name for name in present if name not in self.class_names]:
            raise ValueError(
                f"{folder} has the class {unknown[0]!r}, which has no training images; it must be one of "
                f"{', '.join(self.class_names)}. Rename or remove the folder."
            )
        names, place = class_files(folder, present, SUFFIXES)
        return folder, names, torch.tensor([self.class_names.index(name) for name in present])[place]

    def _find_parts(self) -> dict[File, Path]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"root is {str(self.root)!r}; it must be a folder. Set it to the folder of the images."
            )
        found = _folders(self.root)
        parts: dict[File, Path] = {}
        for name in found:
            if (part := _PARTS.get(name.lower())) is not None:
                if part in parts:
                    raise ValueError(
                        f"{self.root} has two folders of {part} images, {parts[part].name} and {name}; it must have "
                        "one. Remove or merge one."
                    )
                parts[part] = self.root / name
        if not all(_folders(folder) for folder in parts.values()):
            return {"train": self.root}  # image folders: a class (of vehicles, say) may be called train
        if "train" not in parts and "test" not in parts:
            if parts:
                raise FileNotFoundError(f"{self.root} has the folders {', '.join(found)}, but none called train.")
            return {"train": self.root}
        if unread := [name for name in found if self.root / name not in parts.values()]:
            warnings.warn(f"folders of {self.root} other than train, val and test are ignored: {unread}", stacklevel=4)
        return parts

    def _channels(self, paths: Sequence[Path]) -> int:
        return max(header.channels for header in _headers(paths))

    def _choose_frame(self) -> None:
        """Choose size and channels from a sample of images, the same on all processes."""
        paths = [folder / name for folder, names, _ in map(self._list, self.parts) for name in names]
        sizes = {(header.height, header.width) for header in _headers(paths)}
        size = self.size or (sizes.pop() if len(sizes) == 1 else (_SIDE, _SIDE))
        channels = self.channels or self._channels(paths)
        self._frame = Frame(size, channels)
        mean, std = self._given
        self.mean, self.std = mean or _STATISTICS[channels][0], std or _STATISTICS[channels][1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{name} is {tuple(values)}; it must have {channels} values, one per channel.")


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _headers(paths: Sequence[Path]) -> list[Header]:
    """Headers of a sample of the files."""
    headers = []
    for path in (paths[row] for row in spread(len(paths), _LOOKED_AT)):
        try:
            headers.append(read_header(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Repair it, or remove it from the folder.") from error
    return headers
