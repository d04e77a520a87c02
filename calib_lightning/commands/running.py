"""Functions that commands share: errors in one line, and output of reports."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from calib_lightning.predictions.csv_header import Holds, columns_of
from calib_lightning.utils.disk import disk_message
from calib_lightning.utils.files import check_output_file, write_whole

if TYPE_CHECKING:
    from calib_lightning.predictions.tables import Report

F = TypeVar("F", bound=str)

# torch raises AssertionError for a device that its build does not support
FAULTS = (ValueError, TypeError, OSError, RuntimeError, ImportError, AssertionError, UnpicklingError)
"""Errors of the input; any other error is a bug, shown with its traceback."""


def reported(work: Callable[[], int]) -> int:
    """Run a command; an error of its input is printed in one line, with exit code 1."""
    try:
        return work()
    except FAULTS as error:
        print(f"calib: error: {disk_message(error, '--output') or as_options(one_line(error))}", file=sys.stderr)
        return 1


def as_options(message: str) -> str:
    """Spell the settings of a reading, which the library names as in Python, as options of the command line."""
    message = re.sub(r"(?<![\w-])input=(logits|probs)\b", r"--input \1", message)
    return re.sub(r"(?<![\w-])(scores_key|labels_key|features_key|max_gb)\b", r"--\1", message)


def check_headers(files: Iterable[Path], labels_key: str | None, holds: Holds) -> None:
    """Raise ``ValueError`` for a wrong header of a CSV file, before the seconds that the import of torch takes."""
    for path in files:
        if path.suffix.lower() == ".csv" and path.is_file():
            columns_of(path, labels_key, holds)


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def find_own_modules() -> None:
    """Let modules of the working directory be found by name; they hide no package."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def check_metrics(command: str, metrics: str | None) -> None:
    """Exit with code 2 if a metric is unknown."""
    from calib_lightning.predictions.values import selected_metrics  # the import takes seconds

    try:
        selected_metrics(metrics, classes=2)
    except ValueError as error:
        wrong(command, f"--{error}")


def wrong(command: str, message: str) -> NoReturn:
    """Exit with code 2 because of a wrong command line."""
    print(f"calib {command}: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_output(options: Any, found: Iterable[Path] = ()) -> None:
    """Reject an ``--output`` that cannot be written, or is an input, before any computation.

    Inputs are the files that other options name, and those ``found`` by them.
    """
    if options.output is not None:
        check_output_file(options.output, "--output", [*named_files(options), *found])


def named_files(options: Any) -> list[Path]:
    """The files that options name, other than outputs."""
    given = [getattr(options, entry.name) for entry in fields(options) if entry.name not in ("output", "figures")]
    every = [item for value in given for item in (value if isinstance(value, list) else [value])]
    return [item for item in every if isinstance(item, Path)]


def style_of(output: Path | None, style: F | None, formats: Mapping[str, F]) -> F:
    """The format of a report: the one that is given, else that of the suffix of its file."""
    suffix = output.suffix.lower() if output else ".txt"
    if style is None and suffix not in formats:
        raise ValueError(f"--output is {output}; its suffix must be one of {', '.join(formats)}. Or set --format.")
    return style or formats[suffix]


def print_report(report: Report, style: str, output: Path | None) -> None:
    """Print a report or write it to a file; unless the text is printed, its notes also go to stderr."""
    from rich.console import Console

    if style == "text":
        console = Console()
        text = report.table(console if console.is_terminal and output is None else None)
    else:
        text = getattr(report, f"to_{style}")()
    if output is None:
        sys.stdout.write(text)
    else:
        write_whole(output, lambda file: file.write(text.encode()))
    if output is not None or style != "text":
        for note in report.notes:
            print(f"calib: note: {note}", file=sys.stderr)
