"""Leaving a process that is told to stop, by an exception that lets it close its files and loggers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, NoReturn

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""What a process ends with that one of these signals has stopped, as shells count it."""

# seconds: launchers forward, within milliseconds, a signal that the process group has already received
_SAME_REQUEST = 1.0


class Stopped(SystemExit):
    """The process was told to stop by a signal; an uncaught one ends it quietly, with the exit code of the signal.

    Args:
        code: 143 (SIGTERM) or 130 (SIGINT).
    """

    code: int

    def __init__(self, code: int) -> None:
        super().__init__(code)

    def __str__(self) -> str:
        return signal.Signals(self.code - 128).name


class StopRequests:
    """Tells the first request to stop from its echo and from one that is repeated because nothing has happened."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._first: dict[int, float] = {}

    def read(self, signum: int) -> Literal["first", "echo", "again"]:
        """Say what a signal that has arrived is; a forked child (a loader's worker) dies of SIGTERM here.

        Args:
            signum: SIGTERM or SIGINT.

        Returns:
            ``first``; ``echo`` within a second after it; ``again`` later.
        """
        if os.getpid() != self._pid:  # it has inherited the handler
            if signum == signal.SIGTERM:
                die_of(signum)
            return "echo"
        now = time.monotonic()
        if signum not in self._first:
            self._first[signum] = now
            return "first"
        return "again" if now - self._first[signum] >= _SAME_REQUEST else "echo"

    def forget(self) -> None:
        """Take the next signal for the first one."""
        self._first.clear()


def die_of(signum: int) -> NoReturn:
    """End the process now; after SIGINT by an exception, as Python does."""
    if signum == signal.SIGTERM:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    raise Stopped(EXIT_CODES[signal.Signals(signum)])


def end_launched(processes: list[Any], signum: int) -> None:
    """Send a signal to the processes that Lightning's launcher watches, and let it forget them.

    Args:
        processes: The launcher's list; it is emptied, since the launcher would kill this process when they end.
        signum: The signal.
    """
    launched = processes.copy()
    processes.clear()
    for process in launched:
        process.send_signal(signum)


@contextmanager
def ending_launched(owner: Any) -> Iterator[None]:
    """Let `Stopped` end the processes that a trainer has launched, which Lightning does for KeyboardInterrupt alone.

    Args:
        owner: The object whose ``trainer`` it is; it may have none yet.
    """
    try:
        yield
    except Stopped:
        strategy = getattr(getattr(owner, "trainer", None), "strategy", None)
        end_launched(getattr(getattr(strategy, "launcher", None), "procs", []), signal.SIGKILL)
        raise


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT raise `Stopped` in the main thread, until the context ends; the second ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requests = StopRequests()

    def handle(signum: int, frame: FrameType | None) -> None:
        asked = requests.read(signum)
        if asked == "again":
            die_of(signum)
        if asked == "first":
            raise Stopped(EXIT_CODES[signal.Signals(signum)])

    # what is ignored stays so (a shell's background jobs); None was set outside Python and cannot be restored
    before: dict[signal.Signals, Any] = {signum: signal.getsignal(signum) for signum in EXIT_CODES}
    before = {signum: handler for signum, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
