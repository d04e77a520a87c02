"""Image files of a folder, read one batch after another; what cannot be read is told, not raised."""

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
    """What a folder holds; files whose name begins with a dot are not looked at.

    Attributes:
        images: Files with a suffix of ``SUFFIXES``, sorted.
        other_images: Images of other formats, which are not read.
        others: Everything else.
    """

    images: list[Path]
    other_images: list[Path]
    others: list[Path]


def find_images(folder: Path) -> Found:
    """List the files of a folder and of those in it; links to folders are not followed.

    Args:
        folder: The folder.

    Returns:
        The files, sorted by their path.

    Raises:
        NotADirectoryError: It is no folder.
        ValueError: It holds no image.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"--images {folder}: is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    known = Image.registered_extensions()
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    rest = [path for path in files if path.suffix.lower() not in SUFFIXES]
    if not images:
        raise ValueError(f"--images {folder}: holds no image; read are {', '.join(SUFFIXES)}")
    other_images = [path for path in rest if path.suffix.lower() in known]
    return Found(images, other_images, [path for path in rest if path.suffix.lower() not in known])


class ImageBatch(NamedTuple):
    """Some images.

    Attributes:
        paths: Files of the images that were read.
        image: The images ``(N, C, H, W)`` float32; N may be 0.
        faults: Files that could not be read, with the reason.
    """

    paths: list[Path]
    image: Tensor
    faults: dict[Path, str]


def read_batches(paths: Sequence[Path], prepare: Preprocessing, batch_size: int) -> Iterator[ImageBatch]:
    """Read image files.

    Args:
        paths: The files.
        prepare: How an image is prepared.
        batch_size: Files of one batch.

    Yields:
        Batches in the order of the files.
    """
    for start in range(0, len(paths), batch_size):
        read: list[Path] = []
        images: list[Tensor] = []
        faults: dict[Path, str] = {}
        for path in paths[start : start + batch_size]:
            try:
                # safe formats only: the decoders of rare ones are not for files of anybody
                images.append(prepare(load_upright(path, SAFE_FORMATS)))
                read.append(path)
            except UnidentifiedImageError:
                faults[path] = f"is no image of the formats {', '.join(SAFE_FORMATS)}"
            except Exception as error:  # what a decoder raises depends on where the file is damaged
                faults[path] = why_unreadable(error, SAFE_FORMATS)
        yield ImageBatch(read, torch.stack(images) if images else torch.empty(0, *prepare.shape), faults)
