"""One process at a time writes to a run: a lock on its folder, which the kernel releases however the process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
import warnings
from pathlib import Path

NAME = ".lock"
"""File in the folder of a run that is being written; it says who writes."""


class RunLock:
    """A lock on the folder of a run, held from its creation to `release` or the end of this process.

    It is POSIX's lock on a file: the kernel drops it with the process, forked workers do not inherit it, and NFS has
    it. Where a file system has no locks a warning says so; on Windows there is none.

    Args:
        folder: The folder of the run.
        patience: Seconds to wait for a holder that is about to end.

    Raises:
        OSError: If the folder cannot be written.
        RuntimeError: If another process holds the lock; its host and number are named.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        self._path, self._process = folder / NAME, os.getpid()
        self._descriptor = None if sys.platform == "win32" else _locked(self._path, patience)

    def release(self) -> None:
        """Let others write to the folder; without effect in a forked process and the second time."""
        if self._descriptor is not None and os.getpid() == self._process:
            with contextlib.suppress(OSError):  # moved, or removed with the folder
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None


if sys.platform != "win32":
    import fcntl

    def _locked(path: Path, patience: float) -> int | None:
        """Descriptor of a file that this process has locked; None where locks are not supported."""
        end = time.monotonic() + patience
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    warnings.warn(
                        f"{path.parent} is on a file system without locks ({error.strerror}): make sure that no other "
                        "process writes to this run.",
                        stacklevel=4,
                    )
                    return None
                if time.monotonic() < end:
                    time.sleep(0.2)
                    continue
                raise RuntimeError(
                    f"The run folder {path.parent} is in use by {holder}; a run must be written by one process at a "
                    "time. Wait until that one ends, or stop it there; or begin a run of its own with --run_dir."
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)  # its holder has removed the file since it was opened
        with contextlib.suppress(OSError):  # a full disk: the lock holds, without a name
            os.ftruncate(descriptor, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} (since {since})\n".encode())
        return descriptor
