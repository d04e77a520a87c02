"""Files that are either whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file under a temporary name in its own folder, flush it to the disk, then rename it.

    Args:
        path: The file to write or replace; its folder is made where it is missing.
        write: Called with the open file.

    Raises:
        OSError: If the disk is full or the folder cannot be written; ``path`` is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def numbered_folder(wanted: Path) -> Path:
    """Make a new folder: ``wanted``, or ``wanted-2``, ``wanted-3``, ... where that exists.

    Args:
        wanted: Path of the folder; missing folders above it are made.

    Returns:
        Path of the folder that was made.

    Raises:
        OSError: If the folder cannot be made (read-only parent, no space).
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def check_writable(path: Path, option: str) -> None:
    """Refuse a folder that surely cannot be written; nothing is made yet, so that a fault leaves no trace.

    Args:
        path: The folder; it need not exist.
        option: What named it, for the message.

    Raises:
        OSError: It or the folder above is a file, or may not be written to.
    """
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{option} {path}: {folder} is not a folder; name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {path}: the folder {folder} cannot be written; name another")
