"""``calib ...`` in a process of its own that need not import torch and Lightning again."""

import contextlib
import os
import signal
import time
from pathlib import Path

from tests.ddp.pool import PROCESSES


class Forked:
    """A running command, forked from a process that has imported everything; its own process group, as in a shell.

    What it prints is kept in ``folder / "printed.txt"``.
    """

    def __init__(self, folder: Path, *argv: str) -> None:
        self._printed = folder / "printed.txt"
        self._printed.touch()
        self._process = PROCESSES.Process(target=_run, args=(folder, self._printed, argv))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, a negative number after a signal; None while it runs."""
        return self._process.exitcode

    def wait_for(self, condition, seconds: float = 180.0) -> None:
        """Wait until ``condition()`` holds; fail if the process ends before or nothing happens."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.returncode is None, self.printed()
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.05)

    def printed(self) -> str:
        return self._printed.read_text()

    def ended(self, seconds: float = 60.0) -> str:
        """Wait for the end; what it has printed, and the errors."""
        self._process.join(seconds)
        assert self.returncode is not None, f"still running after {seconds} s: {self.printed()}"
        return self.printed()

    def kill(self) -> None:
        """End it and its group, whatever it does: a test that fails must not wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _run(folder: Path, printed: Path, argv: tuple[str, ...]) -> None:
    os.setsid()
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.pop("PL_GLOBAL_SEED", None)
    import torch

    from calib_lightning.__main__ import main

    torch.set_num_threads(1)
    raise SystemExit(main(list(argv)))
