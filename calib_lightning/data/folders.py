"""Image files that lie in one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NAMED = 5  # classes that an error names


def class_files(root: Path, classes: Sequence[str], suffixes: Sequence[str]) -> tuple[list[str], Tensor]:
    """List the image files in the folders of the classes, and in folders within them.

    Each folder is read once and no file is touched. Other files are left out, and so are hidden ones.

    Args:
        root: Folder that holds the folders of the classes.
        classes: Names of these folders, in the order of the labels.
        suffixes: Endings of image files, such as ".jpg"; upper and lower case are the same.

    Returns:
        Paths within ``root``, with slashes, class by class and sorted within a class; and labels ``(N,)`` int64, the
        places of the classes in ``classes``.

    Raises:
        FileNotFoundError: If classes have no folder or no images; the message names them.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.jpg", "dog/2.JPG", "dog/1.jpg", "dog/notes.txt"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     (root / name).touch()
        >>> class_files(root, ["dog", "cat"], [".jpg"])
        (['dog/1.jpg', 'dog/2.JPG', 'cat/1.jpg'], tensor([0, 0, 1]))
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    found = [sorted(_files(root, name, endings)) if (root / name).is_dir() else [] for name in classes]
    if empty := [name for name, files in zip(classes, found, strict=True) if not files]:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        raise FileNotFoundError(
            f"{root} has no images ({', '.join(endings)}) of {len(empty)} of {len(classes)} classes:"
            f" {', '.join(empty[:_NAMED])}{more}. Give each a folder of its name with images, or take it out."
        )
    label = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    return [name for files in found for name in files], torch.from_numpy(label)


def check_counts(where: Path, classes: Sequence[str], label: Tensor, expected: int) -> None:
    """Refuse a set that has not the same known number of images of each class.

    Args:
        where: The folder or list that the images come from, for the message.
        classes: Names of the classes in the order of the labels.
        label: ``(N,)`` int64.
        expected: Images of each class.

    Raises:
        ValueError: The first class with another number, and how many there are.

    Example:
        >>> check_counts(Path("train"), ["cat", "dog"], torch.tensor([0, 0, 1, 1]), 2)
    """
    counts = torch.bincount(label, minlength=len(classes))
    wrong = (counts != expected).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where} has {counts[wrong[0]]} images of the class {classes[wrong[0]]}; each class must have {expected}"
            f" ({len(wrong)} of {len(classes)} classes have another number). Remove the"
            " unpacked folder and unpack the archive again."
        )


def _files(root: Path, folder: str, endings: tuple[str, ...]) -> Iterator[str]:
    """Paths within ``root`` of the image files of one folder."""
    with os.scandir(root / folder) as entries:
        for entry in entries:
            name = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if name.lower().endswith(endings) and entry.is_file():
                yield name
            elif entry.is_dir(follow_symlinks=False):  # a link may lead to another class, or to itself
                yield from _files(root, name, endings)
