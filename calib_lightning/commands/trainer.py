"""``calib fit | validate | test | predict`` from its arguments to its exit code; ``fit`` imports what takes seconds."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import traceback
from pathlib import Path

from calib_lightning.commands.help import trainer_help
from calib_lightning.commands.running import find_own_modules
from calib_lightning.utils.disk import disk_message
from calib_lightning.utils.stopping import Stopped

USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, pickle.UnpicklingError)

_BEGUN = ("config.yaml", "run.json", "checkpoints")
"""One of them is in the folder of every run that has begun."""


def main(argv: list[str]) -> int:
    """Run one of the trainer's commands.

    Args:
        argv: The arguments, the name of the command first.

    Returns:
        Exit code: 0, or 1 if the input was at fault. A wrong command line ends with 2.
    """
    command, options = argv[0], argv[1:]
    if {"-h", "--help"} & set(options):
        print(trainer_help(command))
        return 0
    if command == "predict" and any(word.partition("=")[0] == "--images" for word in options):
        print("calib: error: calib predict --images is now `calib classify DIR --model FILE`.", file=sys.stderr)
        return 2
    return _run([command, *("--help" if word == "--help_all" else word for word in options)])


def _run(argv: list[str]) -> int:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from calib_lightning.commands.fit import CalibCLI
    from calib_lightning.utils.config_search import resolve_configs
    from calib_lightning.utils.run_folder import forget_run_folder, leave_run_folder

    forget_run_folder()
    find_own_modules()
    try:
        try:
            CalibCLI(resolve_configs(argv))
        finally:
            leave_run_folder()
    except (*USER_ERRORS, MisconfigurationException) as error:
        _report(error)
        return 1
    except Stopped:
        _say_how_to_resume()
        raise
    return 0


def _folder_of_run() -> Path | None:
    """The folder of this process's run; one in which no run has begun is removed."""
    from calib_lightning.utils.run_folder import current_run_folder

    folder = current_run_folder()
    if folder is not None and _leads() and not any((folder / name).exists() for name in _BEGUN):
        shutil.rmtree(folder, ignore_errors=True)  # made by this process; at most a logger has started there
        return None
    return folder


def _say_how_to_resume() -> None:
    from calib_lightning.commands.fit_folder import resume_command

    folder = _folder_of_run()
    command = None if folder is None else resume_command(folder)
    if command is not None and _leads():
        print(f"Go on with: {command}", file=sys.stderr)


def _leads() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _report(error: Exception) -> None:
    """Say what is wrong in one line; the traceback goes to the run's folder, if a run has begun there."""
    from calib_lightning.commands.fit_folder import resume_command
    from calib_lightning.commands.hints import plain_message

    message, folder = plain_message(str(error)), _folder_of_run()
    message = disk_message(error, "--run_dir", None if folder is None else resume_command(folder)) or message
    if folder is None:
        print(f"calib: error: {message}", file=sys.stderr)
        return
    path = folder / "error.log"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
        told = f"full traceback: {path}"
    except OSError as other:  # the same full disk
        told = f"the full traceback could not be written to {path}: {other.strerror}"
    print(f"calib: error: {message}\n({told})", file=sys.stderr)
