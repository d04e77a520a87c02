"""Image files of a folder, read in batches; unreadable files are reported, not raised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from calib_lightning.deploy.preprocessing import Preprocessing
from calib_lightning.utils.images import SAFE_FORMATS, load_upright, why_unreadable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Found(NamedTuple):
    """Files of a folder: images with a suffix of ``SUFFIXES``, images of other formats (not read), and the rest."""

    images: list[Path]
    other_images: list[Path]
    others: list[Path]


def find_images(folder: Path) -> Found:
    """List a folder recursively, sorted by path; hidden files and links to folders are ignored."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the folder of the images.")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    known = Image.registered_extensions()
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    rest = [path for path in files if path.suffix.lower() not in SUFFIXES]
    if not images:
        raise ValueError(f"{folder} has no images; it must have {', '.join(SUFFIXES)} files.")
    other_images = [path for path in rest if path.suffix.lower() in known]
    return Found(images, other_images, [path for path in rest if path.suffix.lower() not in known])


class ImageBatch(NamedTuple):
    """The files that were read, their images ``(N, C, H, W)`` float32 (N may be 0), and why others were not."""

    paths: list[Path]
    image: Tensor
    faults: dict[Path, str]


def read_batches(paths: Sequence[Path], prepare: Preprocessing, batch_size: int) -> Iterator[ImageBatch]:
    """Read image files in batches of ``batch_size`` files, in their order."""
    for start in range(0, len(paths), batch_size):
        read: list[Path] = []
        images: list[Tensor] = []
        faults: dict[Path, str] = {}
        for path in paths[start : start + batch_size]:
            try:
                # only these formats: the decoders of rare ones are not safe for untrusted files
                images.append(prepare(load_upright(path, SAFE_FORMATS)))
                read.append(path)
            except UnidentifiedImageError:
                faults[path] = f"not an image in one of the formats {', '.join(SAFE_FORMATS)}"
            except Exception as error:  # the exception depends on where the file is damaged
                faults[path] = why_unreadable(error, SAFE_FORMATS)
        yield ImageBatch(read, torch.stack(images) if images else torch.empty(0, *prepare.shape), faults)
