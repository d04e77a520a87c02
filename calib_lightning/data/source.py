"""Labelled images from a benchmark's files, and sets made from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.data.sets import FileSet, ImageFiles, InMemorySet
from calib_lightning.data.transforms import Transform


class Source(NamedTuple):
    """Labelled images from a benchmark's files.

    Attributes:
        image: ``(N, C, H, W)`` uint8, in memory or mapped from a file; or N image files.
        label: ``(N,)`` int64 in ``0..K-1``; -1 for images of an out-of-distribution set.
        rows: Row ``(N,)`` int64 of each image in its file; ``None`` means ``0..N-1``.
    """

    image: Tensor | ImageFiles
    label: Tensor
    rows: Tensor | None = None


def check_source(name: str, source: Source, num_classes: int) -> None:
    """Reject images or labels that do not conform to `Source`; labels of "ood/<name>" must be -1."""
    image, label = source.image, source.label
    if isinstance(image, Tensor) and (image.dtype != torch.uint8 or image.ndim != 4):
        raise ValueError(
            f"The {name} images are {image.dtype} of shape {tuple(image.shape)}; they must be torch.uint8 of shape (N, "
            "C, H, W). Convert them where they are loaded."
        )
    if label.dtype != torch.int64 or label.shape != (len(image),):
        raise ValueError(
            f"The {name} labels are {label.dtype} of shape {tuple(label.shape)}; they must be torch.int64 of shape "
            f"({len(image)},). Convert them where they are loaded."
        )
    low, high = (-1, -1) if name.startswith("ood/") else (0, num_classes - 1)
    wrong = ((label < low) | (label > high)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"The label in row {row} of the {name} file is {int(label[row])}; it must be in {low}..{high}. Set "
            "num_classes to the number of classes, or map the labels where they are loaded."
        )


def first_rows(source: Source, rows: int | None) -> Source:
    """The first rows of a file; ``None`` takes all."""
    if rows is None or rows >= len(source.label):
        return source
    image = source.image[:rows] if isinstance(source.image, Tensor) else source.image[torch.arange(rows)]
    return Source(image, source.label[:rows], None if source.rows is None else source.rows[:rows])


def take(source: Source, index: Tensor | None, transform: Transform) -> InMemorySet | FileSet:
    """Make a set of the images at positions ``(N,)`` of a file; ``None`` takes all, without a copy."""
    image, label = (source.image, source.label) if index is None else (source.image[index], source.label[index])
    if index is None:
        index = torch.arange(len(label))
    rows = index if source.rows is None else source.rows[index]
    if isinstance(image, ImageFiles):
        return FileSet(image, label, rows, transform)
    return InMemorySet(image, label, rows, transform)
