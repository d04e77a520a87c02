"""Atomic file writing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from calib_lightning.utils.disk import naming


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically with ``write(file)``: temporary name in the same folder, flush, fsync, rename.

    A link stays, and the file that it leads to is replaced. What is neither new nor an ordinary file is an ``OSError``.
    """
    path = replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with naming(path), temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name(path: Path) -> Path:
    """A name beside a file, with host and number of the process that writes it."""
    return path.with_name(f".{path.name}{owner_suffix()}")


def owner_suffix() -> str:
    """The end of the names of temporary files and folders, by which `remove_leftovers` knows their writer."""
    return f".{socket.gethostname()}-{os.getpid()}.tmp"


def remove_leftovers(files: Iterable[Path]) -> None:
    """Remove temporary files and folders whose writer is dead.

    Of this machine's processes that is known; those of other machines, and what earlier versions of this package left,
    go when they are a day old.

    Args:
        files: The files and folders to look at; all others stay.
    """
    if os.name != "posix":  # elsewhere one cannot ask whether a process lives
        return
    here = re.compile(rf"\..+\.{re.escape(socket.gethostname())}-(\d+)\.tmp")
    for path in files:
        own = here.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # its writer has finished
            if not _is_alive(int(own[1])) if own else _TEMPORARY.fullmatch(path.name) and _is_old(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


_TEMPORARY = re.compile(r"\..+[.-]\d+\.tmp|stage-\d+-(best|last)\.tmp|\.unpacking-\w+")


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > 24 * 60 * 60


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def replaceable(path: Path) -> Path:
    """The file that a write to ``path`` makes or replaces, behind all links; devices, pipes and folders are refused."""
    try:
        target = path.resolve() if path.is_symlink() else path
        found = target.stat() if target.exists() else None
    except RuntimeError as error:  # from Python before 3.13, for links in a circle
        raise OSError(f"{path} is a link that leads to itself. Choose another file.") from error
    if found is None:
        return target
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path} is a folder; it must be a new or an ordinary file. Choose another file.")
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _SPECIAL if is_kind(found.st_mode)), "a special file")
        raise OSError(
            f"{path} is {kind}, which is not replaced; it must be a new or an ordinary file. Choose another file."
        )
    return target


_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_output_file(path: Path, option: str, inputs: Iterable[Path]) -> None:
    """Reject an output that cannot be written or must not be, before any computation; ``option`` is named in errors.

    Raises:
        OSError: The folder is not writable, or the file is neither new nor an ordinary one.
        ValueError: The file, under this name or another, is an input, or the standard output or error.
    """
    try:
        target = replaceable(path)
    except OSError as error:
        raise type(error)(f"{option}: {error}") from error
    check_writable(target.parent, option)
    if not target.exists():
        return
    check_no_input(path, option, inputs)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if os.path.samestat(os.fstat(stream), target.stat()):
                raise ValueError(
                    f"{option} is {path}, to which this command prints; it must be another file. Leave {option} out "
                    "to print."
                )


def check_no_input(path: Path, option: str, inputs: Iterable[Path]) -> None:
    """Raise ``ValueError`` if a file to be written is, under this name or another, an input."""
    if not path.exists():
        return
    for given in inputs:
        if given.exists() and given.samefile(path):
            raise ValueError(
                f"{option} is {path}, which this command reads ({given}); it must be another file. Choose a new name."
            )


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically and with the line ends that it has."""
    write_whole(path, lambda file: file.write(text.encode()))


def file_sha256(path: Path) -> str:
    """SHA-256 of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbered_folder(wanted: Path) -> Path:
    """Create and return a new folder: ``wanted``, or ``wanted-2``, ``wanted-3``, ... if it exists."""
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
    """Reject a folder that cannot be written, without creating anything; ``option`` is named in the error."""
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{option} is {path}, but {folder} is not a folder; choose another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} is {path}, but the folder {folder} is not writable; choose another folder")
