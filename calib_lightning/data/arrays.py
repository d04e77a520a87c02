"""The user's own images in a file of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib_lightning.data.array_files import load_npz, npz_names, npz_stand_in
from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.card import Card
from calib_lightning.data.folder import OWN_SPLIT
from calib_lightning.data.source import Source
from calib_lightning.data.split import File, SplitSpec

_PARTS: tuple[File, ...] = ("train", "val", "test")


class ArraysDataModule(BenchmarkDataModule):
    """Images and labels in an ``.npz`` file.

    The file holds ``images`` and ``labels``, or ``train_images`` and ``train_labels`` and likewise ``val_`` and
    ``test_`` (like the files of MedMNIST); ``class_names`` is optional. Images are uint8 of shape ``(N, H, W)``,
    ``(N, H, W, C)`` or ``(N, C, H, W)`` with C = 1 or 3; labels are integers ``(N,)`` or ``(N, 1)`` from 0 on, or
    names. Sets without arrays are cut from the training images by ``split``.

    Args:
        file: The file.
        split: How the images are divided; by default 10 % validation, 10 % calibration, 20 % test, stratified by class.
        augment: Whether training images are shifted by up to 4 pixels and mirrored at random.
        mean: Mean of each channel, as a fraction; ``None`` uses 0.5.
        std: Standard deviation of each channel, as a fraction; ``None`` uses 0.5.
        num_classes: K, if the file does not have images of every class; ``None`` uses the largest label plus 1.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or its labels are not as described; ``setup`` checks the images.

    Example:
        ``ArraysDataModule("digits.npz")``
    """

    default_split: ClassVar[SplitSpec] = OWN_SPLIT
    card = Card(None, None, None, 0, "yours", "your file --data.file")

    def __init__(
        self,
        file: str | Path = "data.npz",
        split: SplitSpec | None = None,
        *,
        augment: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        self.file, self.augment = Path(file).expanduser().resolve(), augment
        if not self.file.is_file():
            raise FileNotFoundError(f"file is {str(self.file)!r}, which does not exist. Set it to your .npz file.")
        self._keys = npz_names(self.file)
        self._labels = self._find_labels()
        every = np.concatenate(list(self._labels.values()))
        if every.dtype.kind == "U":
            self.class_names = tuple(str(name) for name in np.unique(every))
            self._labels = {part: np.searchsorted(np.unique(every), label) for part, label in self._labels.items()}
        elif "class_names" in self._keys:
            names = load_npz(self.file, ["class_names"])["class_names"]
            self.class_names = tuple(str(name) for name in names.tolist())
        self.num_classes = num_classes or (len(self.class_names) if self.class_names else int(every.max()) + 1)
        if self.num_classes < 2:
            raise ValueError(f"{self.file} has {self.num_classes} class; it must have at least two. Check its labels.")
        if self.class_names is None and num_classes is None and int(every.min()) > 0:
            raise ValueError(
                f"The labels of {self.file} are {every.min()}..{every.max()}; they must start at 0. Save labels - "
                f"{every.min()}, or set num_classes={every.max() + 1} if the file has no image of class 0."
            )
        self.official_val = "val" in self._labels
        self.split = self.split.for_files(self._labels)
        self._given = mean, std

    @property
    def identity(self) -> str:
        """Name of the data, including the file."""
        return f"{super().identity} {self.file}"

    @property
    def image_channels(self) -> int:
        """C of the images."""
        part = next(iter(self._labels))
        return int(self._channels_first(part, npz_stand_in(self.file, self._key(part, "images"))).shape[1])

    def load_part(self, part: File) -> Source | None:
        """Read the images of one of the parts that the file has."""
        if part not in self._labels:
            return None
        image = self._read_images(part)
        if part == next(iter(self._labels)) or "mean" not in vars(self):  # without the first part, as a set of others
            mean, std = self._given
            self.mean, self.std = mean or (0.5,) * image.shape[1], std or (0.5,) * image.shape[1]
        if len(self.mean) != image.shape[1] or len(self.std) != image.shape[1]:
            raise ValueError(
                f"The {part} images of {self.file} have {image.shape[1]} channels, but there are {len(self.mean)} "
                f"means and {len(self.std)} standard deviations. Save all images with the same channels, and give one "
                "value per channel."
            )
        return Source(image, torch.from_numpy(self._labels[part].astype(np.int64)))

    def _key(self, part: File, what: str) -> str:
        """Name of an array; a file without parts holds training images."""
        return what if part == "train" and "images" in self._keys else f"{part}_{what}"

    def _find_labels(self) -> dict[File, NDArray[Any]]:
        """Labels (N,) of each part in the file."""
        parts = [part for part in _PARTS if self._key(part, "images") in self._keys]
        if not parts:
            raise ValueError(
                f"{self.file} holds {', '.join(self._keys) or 'nothing'}; it must hold images and labels, or "
                "train_images and train_labels (and val_, test_). Save it with numpy.savez(file, images=..., "
                "labels=...)."
            )
        for part in parts:
            if self._key(part, "labels") not in self._keys:
                raise ValueError(
                    f"{self.file} holds {self._key(part, 'images')} but no {self._key(part, 'labels')}. Save both."
                )
        held = load_npz(self.file, [self._key(part, "labels") for part in parts])
        return {part: self._checked_labels(key, label) for part, (key, label) in zip(parts, held.items(), strict=True)}

    def _checked_labels(self, key: str, label: NDArray[Any]) -> NDArray[Any]:
        shape = label.shape
        label = label[:, 0] if label.ndim == 2 and shape[1] == 1 else label
        remedy = "Save one label per image"
        if label.ndim == 2 and len(label) and label.dtype.kind in "iufb" and bool((label.sum(1) == 1).all()):
            remedy = "Save labels.argmax(1) of one-hot labels"
        elif label.dtype.kind == "f" and np.isfinite(label).all() and (label == np.floor(label)).all():
            remedy = "Save labels.astype(int)"
        if label.ndim != 1 or not len(label) or label.dtype.kind not in "iuU":
            raise ValueError(
                f"{key} of {self.file} is {label.dtype} of shape {shape}; it must hold integers or names, (N,). "
                f"{remedy}."
            )
        if label.dtype.kind in "iu" and label.min() < 0:
            raise ValueError(f"{key} of {self.file} holds {label.min()}; labels must be integers from 0 on. Map them.")
        return label

    def _read_images(self, part: File) -> Tensor:
        key = self._key(part, "images")
        image = load_npz(self.file, [key])[key]
        return torch.from_numpy(np.ascontiguousarray(self._channels_first(part, image)))

    def _channels_first(self, part: File, image: NDArray[Any]) -> NDArray[Any]:
        key, shape, rows = self._key(part, "images"), image.shape, len(self._labels[part])
        if image.ndim == 3:
            image = image[:, None]
        elif image.ndim == 4 and shape[3] in (1, 3):
            image = image.transpose(0, 3, 1, 2)
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(
                f"{key} of {self.file} has shape {shape}; it must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C = "
                "1 or 3. Reshape it."
            )
        if image.dtype != np.uint8:
            raise ValueError(
                f"{key} of {self.file} is {image.dtype}; it must be uint8, 0 to 255. Save fractions as (images * "
                "255).round().astype('uint8')."
            )
        if len(image) != rows:
            raise ValueError(
                f"{self.file} has {rows} labels for {len(image)} {part} images; it must have one label per image."
            )
        return image
