"""Entry point of ``calib`` and ``python -m calib_lightning``."""

from __future__ import annotations

import contextlib
import io
import pickle
import signal
import sys
import traceback
from pathlib import Path

USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, pickle.UnpicklingError)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        Exit code: 0 if the command succeeded, 1 if the input was at fault. A wrong command line ends with 2, a run that
        was told to stop by a signal with 143 (SIGTERM) or 130 (SIGINT).
    """
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow in a table must not end a run whose output is not UTF-8
    try:
        code = _without_trainer(arguments)
    except KeyboardInterrupt:
        print("calib: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return _with_trainer(arguments) if code is None else code


def _without_trainer(arguments: list[str]) -> int | None:
    """Run a command that needs no trainer, whose import takes seconds; ``None`` if it is another one."""
    if arguments[:1] == ["score"]:
        from calib_lightning.commands.score import main as score

        return score(arguments[1:])
    if arguments[:1] == ["calibrate"]:
        from calib_lightning.commands.calibrate import main as calibrate

        return calibrate(arguments[1:])
    if arguments[:1] == ["paper"]:
        from calib_lightning.commands.paper import main as paper

        return paper(arguments[1:])
    if arguments[:1] == ["predict"]:
        from calib_lightning.commands.classify_arguments import is_for_images

        if is_for_images(arguments):
            from calib_lightning.commands.classify import main as predict

            return predict(arguments[1:])
        if {"-h", "--help"} & set(arguments):
            print("For a folder of images and a calibrated classifier: calib predict --images DIR --model FILE.\n")
    return None


def _with_trainer(arguments: list[str]) -> int:
    from calib_lightning.commands.fit import CalibCLI
    from calib_lightning.utils.config_search import resolve_configs
    from calib_lightning.utils.run_folder import forget_run_folder

    forget_run_folder()
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # data modules of one's own are found by name, and hide no package
    try:
        CalibCLI(resolve_configs(arguments))
    except USER_ERRORS as error:
        _report(error)
        return 1
    return 0


def _report(error: Exception) -> None:
    """Say what is wrong in one line; the traceback goes to the run's folder, if a run has begun there."""
    from calib_lightning.commands.fit_parser import plain_message
    from calib_lightning.utils.run_folder import current_run_folder

    message, folder = plain_message(str(error)), current_run_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was begun: the name stays free
            folder = None
    if folder is None:
        print(f"calib: error: {message}", file=sys.stderr)
        return
    path = folder / "error.log"
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    print(f"calib: error: {message}\n(full traceback: {path})", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
