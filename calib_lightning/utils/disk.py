"""What is said where a disk takes no more."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let errors of the system name the file that was to be written, as they do where it is opened."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def disk_message(error: Exception, option: str, resume: str | None = None) -> str | None:
    """Say which file could not be written, why, and what to do.

    Args:
        error: An error.
        option: Names another folder.
        resume: The command that goes on.

    Returns:
        The message; None if the disk is not at fault.
    """
    if not isinstance(error, OSError) or error.filename is None:
        return None
    path = Path(str(error.filename))
    causes = {
        errno.ENOSPC: f"no space is left on its disk ({_free(path)})",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: f"it would be larger than files may be here ({_limit()})",
        errno.EROFS: "its file system is read-only",
    }
    cause = causes.get(error.errno or 0)
    if cause is None:
        return None
    remedy = {
        errno.EFBIG: "Raise the limit",
        errno.EROFS: "Make it writable",
    }.get(error.errno or 0, "Free space")
    then = f", then go on with: {resume} (and {option}, for another folder)" if resume else ""
    return f"{path} cannot be written: {cause}. {remedy} or choose another folder with {option}{then}"


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB are free"
    except OSError:
        return "how much is free is unknown"


def _limit() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "a limit of the file system"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return "a limit of the file system"
    return f"ulimit -f: {limit / 2**20:.1f} MiB"
