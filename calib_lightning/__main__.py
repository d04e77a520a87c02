"""Entry point of ``calib`` and ``python -m calib_lightning``."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys

from calib_lightning.commands.help import overview
from calib_lightning.commands.names import COMMANDS, TRAINER, with_underscores
from calib_lightning.utils.names import did_you_mean
from calib_lightning.utils.stopping import Stopped, stopped_by_signals


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        Exit code: 0 if the command succeeded, 1 if the input was at fault. A wrong command line ends with 2, a command
        that was told to stop by a signal with 143 (SIGTERM) or 130 (SIGINT).
    """
    arguments = with_underscores(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow in a table must not end a run whose output is not UTF-8
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        asked = did_you_mean(name, COMMANDS)
        print(f"calib: error: there is no command {name!r}.{asked} calib --help lists them.", file=sys.stderr)
        return 2
    module = COMMANDS[name].module
    try:
        with stopped_by_signals():
            code: int = importlib.import_module(module).main(arguments if module == TRAINER else arguments[1:])
    except Stopped as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one says it
            print(f"calib: stopped by {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("calib: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return code


if __name__ == "__main__":
    sys.exit(main())
