"""Image files in one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NAMED = 5  # classes listed in an error


def class_files(root: Path, classes: Sequence[str], suffixes: Sequence[str]) -> tuple[list[str], Tensor]:
    """List the image files in the class folders and their subfolders, without opening files.

    Returns paths within ``root``, with slashes, by class and sorted within a class; and labels ``(N,)`` int64, indices
    of ``classes``. Hidden files and files with other suffixes are skipped; suffixes ignore case.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    found = [sorted(_files(root, name, endings)) if (root / name).is_dir() else [] for name in classes]
    if empty := [name for name, files in zip(classes, found, strict=True) if not files]:
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        raise FileNotFoundError(
            f"{root} has no images ({', '.join(endings)}) for {len(empty)} of {len(classes)} classes: "
            f"{', '.join(empty[:_NAMED])}{more}. Give each class a folder of its name with images, or remove the class."
        )
    label = np.repeat(np.arange(len(classes)), [len(files) for files in found])
    return [name for files in found for name in files], torch.from_numpy(label)


def check_counts(where: Path, classes: Sequence[str], label: Tensor, expected: int) -> None:
    """Reject labels ``(N,)`` that do not have ``expected`` images of each class; ``where`` is named in errors."""
    counts = torch.bincount(label, minlength=len(classes))
    wrong = (counts != expected).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{where} has {counts[wrong[0]]} images of the class {classes[wrong[0]]}; it must have {expected} of each "
            f"class ({len(wrong)} of {len(classes)} classes differ). Remove the unpacked folder and unpack the archive "
            "again."
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
            elif entry.is_dir(follow_symlinks=False):  # a link may point to another class, or to itself
                yield from _files(root, name, endings)
