"""What commands share: faults in one line, and where their output goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, NoReturn

from calib_lightning.utils.files import check_writable, write_whole

if TYPE_CHECKING:
    from calib_lightning.predictions.tables import Report

# torch raises AssertionError for a device that it was not built for
FAULTS = (ValueError, TypeError, OSError, RuntimeError, ImportError, AssertionError, UnpicklingError)
"""Errors of the input; anything else is a bug, and shows its traceback."""


def reported(work: Callable[[], int]) -> int:
    """Run a command; a fault of its input is told in one line and gives code 1."""
    try:
        return work()
    except FAULTS as error:
        print(f"calib: error: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def check_metrics(command: str, metrics: str | None) -> None:
    """End with code 2 if ``--metrics`` names an unknown one."""
    from calib_lightning.predictions.values import selected_metrics  # the import takes seconds

    try:
        selected_metrics(metrics, classes=2)
    except ValueError as error:
        wrong(command, f"--{error}")


def wrong(command: str, message: str) -> NoReturn:
    """End with code 2: the command line is at fault."""
    print(f"calib {command}: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_output(output: Path | None) -> None:
    """Refuse, before anything is computed, a file that cannot be written."""
    if output is None:
        return
    if output.is_dir():
        raise IsADirectoryError(f"--output {output}: is a folder; name a file")
    check_writable(output.parent, "--output")


def print_report(report: Report, style: str, output: Path | None) -> None:
    """Print a report or write it to a file; its notes go to stderr where the report is not for people."""
    from rich.console import Console

    if style == "text":
        console = Console()
        text = report.table(console if console.is_terminal and output is None else None)
    else:
        text = report.to_json() if style == "json" else report.to_markdown()
    if output is None:
        sys.stdout.write(text)
    else:
        write_whole(output, lambda file: file.write(text.encode()))
    if output is not None or style != "text":
        for note in report.notes:
            print(f"calib: note: {note}", file=sys.stderr)
