"""One's own images in a file of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib_lightning.data.array_files import load_npz
from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.folder import OWN_SPLIT
from calib_lightning.data.source import Source
from calib_lightning.data.split import File, SplitSpec

_PARTS: tuple[File, ...] = ("train", "val", "test")


class ArraysDataModule(BenchmarkDataModule):
    """Images and labels in an ``.npz`` file.

    The file holds ``images`` and ``labels``, or ``train_images`` and ``train_labels`` and likewise ``val_`` and
    ``test_`` (as those of MedMNIST do); ``class_names`` is optional. Images are uint8 of shape ``(N, H, W)``,
    ``(N, H, W, C)`` or ``(N, C, H, W)`` with C = 1 or 3; labels are whole numbers ``(N,)`` or ``(N, 1)`` from 0 on, or
    names. What has no arrays of its own is cut from the training images by ``split``.

    Args:
        file: The file.
        split: How the images are divided; by default 10 % validation, 10 % calibration, 20 % test, class by class.
        batch_size: Rows of one batch of one process.
        num_workers: Processes that prepare batches.
        augment: Whether training images are shifted by up to 4 pixels and mirrored at random.
        mean: Mean of each channel, as a fraction; ``None`` takes 0.5.
        std: Standard deviation of each channel, as a fraction; ``None`` takes 0.5.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or its arrays are not as said above.

    Example:
        ``ArraysDataModule("digits.npz")``
    """

    default_split: ClassVar[SplitSpec] = OWN_SPLIT

    def __init__(
        self,
        file: str | Path = "data.npz",
        split: SplitSpec | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        augment: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(split, batch_size, num_workers)
        self.file = Path(file).expanduser().resolve()
        self.augment = augment
        held = load_npz(self.file)
        self._labels = self._find_labels(held)
        names = held.get("class_names")
        every = np.concatenate(list(self._labels.values()))
        if every.dtype.kind == "U":
            self.class_names = tuple(str(name) for name in np.unique(every))
            self._labels = {part: np.searchsorted(np.unique(every), label) for part, label in self._labels.items()}
        elif names is not None:
            self.class_names = tuple(str(name) for name in names.tolist())
        self.num_classes = len(self.class_names) if self.class_names else int(every.max()) + 1
        if self.num_classes < 2:
            raise ValueError(f"{self.file} has {self.num_classes} class; it needs two at least. Look at its labels.")
        self.official_val = "val" in self._labels
        self.split = self.split.for_files(self._labels)
        self._images = {part: self._read_images(held[_key(held, part, "images")], part) for part in self._labels}
        channels = next(iter(self._images.values())).shape[1]
        self.mean, self.std = mean or (0.5,) * channels, std or (0.5,) * channels

    def load_train(self) -> Source | None:
        """The training images, and what is cut from them."""
        return self._load("train")

    def load_val(self) -> Source | None:
        """The validation images."""
        return self._load("val")

    def load_test(self) -> Source | None:
        """The test images."""
        return self._load("test")

    def _load(self, part: File) -> Source | None:
        if part not in self._labels:
            return None
        return Source(self._images[part], torch.from_numpy(self._labels[part].astype(np.int64)))

    def _find_labels(self, held: dict[str, NDArray[Any]]) -> dict[File, NDArray[Any]]:
        """Labels (N,) of each part that the file has."""
        parts = [part for part in _PARTS if _key(held, part, "images") in held]
        if not parts:
            raise ValueError(
                f"{self.file} holds {', '.join(held) or 'nothing'}; it must hold images and labels, or train_images and"
                " train_labels (and val_, test_). Save it with numpy.savez(file, images=..., labels=...)."
            )
        found: dict[File, NDArray[Any]] = {}
        for part in parts:
            key = _key(held, part, "labels")
            if key not in held:
                raise ValueError(f"{self.file} holds {_key(held, part, 'images')} but no {key}. Save both.")
            label = held[key]
            label = label[:, 0] if label.ndim == 2 and label.shape[1] == 1 else label
            rows = len(held[_key(held, part, "images")])
            if label.shape != (rows,) or label.dtype.kind not in "iuU":
                raise ValueError(
                    f"{key} of {self.file} are {label.dtype} of shape {held[key].shape}; they must be whole numbers or"
                    f" names, one for each of {rows} images. Save labels.astype(int), one-hot ones as argmax(1)."
                )
            found[part] = label
        return found

    def _read_images(self, image: NDArray[Any], part: File) -> Tensor:
        shape = image.shape
        if image.ndim == 3:
            image = image[:, None]
        elif image.ndim == 4 and shape[3] in (1, 3):
            image = image.transpose(0, 3, 1, 2)
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(
                f"the {part} images of {self.file} are {image.dtype} of shape {shape}; they must be uint8 of shape"
                " (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3. Save fractions as"
                " (images * 255).round().astype('uint8')."
            )
        return torch.from_numpy(np.ascontiguousarray(image))


def _key(held: dict[str, NDArray[Any]], part: File, what: str) -> str:
    """Name of an array; a file without parts holds training images."""
    return what if part == "train" and "images" in held else f"{part}_{what}"
