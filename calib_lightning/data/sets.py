"""Sets that a loader reads batches from: images in memory, image files, or features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from calib_lightning.data.transforms import Transform
from calib_lightning.data.views import crop_boxes
from calib_lightning.types import Batch
from calib_lightning.utils.images import FILTERS, Frame, in_colours, pixels_of, read_image
from calib_lightning.utils.seeding import derive_seed, row_uniform

_VIEW, _FILE_CROP = 5, 6  # separate these random streams from others
_CROP_DRAWS = 23  # for `crop_boxes` and mirroring
_AT_ONCE = 8  # files per chunk


class BatchSet(Protocol):
    """A labelled set that returns a batch for any of its positions."""

    @property
    def label(self) -> Tensor:
        """Labels ``(N,)`` int64."""
        ...

    def __len__(self) -> int: ...

    def fetch(self, index: Tensor, epoch: int) -> Batch:
        """Read one batch: positions ``(B,)`` int64 in ``0..N-1``, and the epoch for random transforms."""
        ...


@dataclass(frozen=True)
class InMemorySet:
    """Images held in memory as bytes, read and transformed in batches.

    Args:
        image: ``(N, C, H, W)`` uint8.
        label: ``(N,)`` int64.
        rows: ``(N,)`` int64, the row of each image in its source file.
        transform: Applied to each batch; ``None`` returns the bytes.
    """

    image: Tensor
    label: Tensor
    rows: Tensor
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.label)

    def fetch(self, index: Tensor, epoch: int) -> Batch:
        """Read one batch.

        Args:
            index: Positions ``(B,)`` int64 in ``0..N-1``; they become ``Batch.index``.
            epoch: Epoch number, for transforms that draw random numbers.

        Returns:
            The batch, in the order of ``index``.
        """
        image = self.image.index_select(0, index)
        if self.transform is not None:
            image = self.transform(image, index, epoch)
        return Batch(image, self.label.index_select(0, index), index)

    def fingerprint(self, digest: Any) -> None:
        """Add the images to a hash."""
        digest.update(self.image.contiguous().numpy().tobytes())


class ImageFiles:
    """Image files that are decoded on demand; only their names are kept in memory.

    Args:
        root: Folder of the files.
        names: Their paths within it, with slashes.
        frame: Their common size and channels.
    """

    def __init__(self, root: Path, names: Sequence[str] | np.ndarray[Any, np.dtype[np.bytes_]], frame: Frame) -> None:
        # one block of bytes: reference counts would make each worker copy a list of strings
        self.names = names if isinstance(names, np.ndarray) else np.array([os.fsencode(name) for name in names])
        self.root, self.frame = root, frame

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Tensor) -> ImageFiles:
        return ImageFiles(self.root, self.names[index.numpy()], self.frame)

    def path(self, position: int) -> Path:
        """The file at a position."""
        return self.root / os.fsdecode(self.names[position])

    def read(self, position: int) -> Tensor:
        """Decode one file.

        Args:
            position: Its position.

        Returns:
            ``(C, H, W)`` uint8.

        Raises:
            ValueError: If the file cannot be read; the message names it.
        """
        image = self.open(position)
        try:
            return self.frame(image)
        except ValueError as error:
            raise ValueError(f"{self.path(position)}: {error}") from error

    def open(self, position: int) -> Image.Image:
        """Read one file with the frame's channels, at full size.

        Args:
            position: Its position.

        Returns:
            The image.

        Raises:
            ValueError: If the file cannot be read; the message names it.
        """
        path = self.path(position)
        image = read_image(path)
        try:
            return in_colours(image, self.frame.channels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class FileCrop:
    """A random crop of each image file, resized to the frame's size and mirrored with probability 1/2.

    Area (``scale``, as fractions), shape and position are drawn as in torchvision's ``RandomResizedCrop``, from the
    file's own pixels; ``seed``, epoch and row determine every draw.
    """

    scale: tuple[float, float]
    seed: int

    def read(self, files: ImageFiles, index: Tensor, epoch: int) -> list[Tensor]:
        """Decode files, each with its own crop."""
        draw = row_uniform(index, _CROP_DRAWS, seed=derive_seed(self.seed, epoch, _FILE_CROP))
        height, width = files.frame.size
        parts = []
        # in chunks: few calls to draw boxes, and few full-size photographs in memory
        for start in range(0, len(index), _AT_ONCE):
            mine = draw[start : start + _AT_ONCE]
            images = [files.open(position) for position in index[start : start + _AT_ONCE].tolist()]
            sizes = torch.tensor([(image.height, image.width) for image in images]).view(-1, 2)
            boxes = crop_boxes(mine, sizes[:, 0], sizes[:, 1], self.scale).tolist()
            for image, (top, left, tall, wide), mirror in zip(images, boxes, (mine[:, -1] < 0.5).tolist(), strict=True):
                part = image.crop((left, top, left + wide, top + tall))
                pixels = pixels_of(part.resize((width, height), FILTERS[files.frame.interpolation]))
                parts.append(pixels.flip(-1) if mirror else pixels)
        return parts


@dataclass(frozen=True)
class FileSet:
    """Image files, decoded and transformed in batches.

    Args:
        image: The files.
        label: ``(N,)`` int64.
        rows: ``(N,)`` int64, the row of each file in its source list.
        transform: Applied to each batch of bytes ``(B, C, H, W)``; ``None`` returns the bytes.
        crop: A random crop of each file instead of the frame's central crop; ``None`` for evaluation.
    """

    image: ImageFiles
    label: Tensor
    rows: Tensor
    transform: Transform | None = None
    crop: FileCrop | None = None

    def __len__(self) -> int:
        return len(self.label)

    def fetch(self, index: Tensor, epoch: int) -> Batch:
        """Decode one batch.

        Args:
            index: Positions ``(B,)`` int64 in ``0..N-1``; they become ``Batch.index``.
            epoch: Epoch number, for transforms that draw random numbers.

        Returns:
            The batch, in the order of ``index``.

        Raises:
            ValueError: If a file cannot be read; the message names it.
        """
        if self.crop is not None:
            images = self.crop.read(self.image, index, epoch)
        else:
            images = [self.image.read(position) for position in index.tolist()]
        frame = self.image.frame
        image = torch.stack(images) if images else torch.empty(0, frame.channels, *frame.size, dtype=torch.uint8)
        if self.transform is not None:
            image = self.transform(image, index, epoch)
        return Batch(image, self.label.index_select(0, index), index)

    def fingerprint(self, digest: Any) -> None:
        """Add the images to a hash: names, sizes and times of the files, which are not read."""
        digest.update(repr(self.image.frame).encode())
        for position in range(len(self)):
            path = self.image.path(position)
            state = path.stat()
            digest.update(f"{path} {state.st_size} {state.st_mtime_ns}".encode())


@dataclass(frozen=True)
class FeatureSet:
    """Stored features ``(N, V, d)`` of V fixed views per image, of which each epoch draws one per row."""

    features: Tensor
    label: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.label)

    def fetch(self, index: Tensor, epoch: int) -> Batch:
        """Read features ``(B, d)`` at positions ``(B,)`` int64; epoch and position determine the view."""
        row, views = index.to(self.features.device), self.features.shape[1]
        if views == 1:
            features = self.features.select(1, 0).index_select(0, row)
        else:
            draw = row_uniform(index, 1, seed=derive_seed(self.seed, epoch, _VIEW))[:, 0]
            features = self.features[row, (draw * views).long().to(row.device)]
        return Batch(features, self.label.index_select(0, index), index)
