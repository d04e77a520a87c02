"""``calib score`` from its arguments to its exit code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calib_lightning.commands.score_arguments import Options, make_parser, parse

if TYPE_CHECKING:
    from calib_lightning.predictions.scoring import Report


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: Arguments after ``calib score``.

    Returns:
        Exit code: 0, or 1 if a file is at fault or a figure could not be drawn. A wrong command line ends with 2.

    Example:
        ``main(["predictions/test.npz", "--intervals"])``
    """
    parser = make_parser()
    options = parse(parser, argv)
    from calib_lightning.predictions.scoring import selected_metrics  # the import takes seconds

    try:
        selected_metrics(options.metrics, classes=2)
    except ValueError as error:
        parser.error(str(error))
    try:
        report = _write_report(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"calib: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0 if options.figures is None else _write_figures(options, options.figures, report)


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _write_report(options: Options) -> Report:
    from rich.console import Console

    from calib_lightning.predictions.scoring import score
    from calib_lightning.predictions.writing import as_json, as_markdown, as_text
    from calib_lightning.utils.files import check_writable, write_whole

    if options.output is not None:
        if options.output.is_dir():
            raise IsADirectoryError(f"--output {options.output}: is a folder; name a file")
        check_writable(options.output.parent, "--output")
    if options.figures is not None:
        check_writable(options.figures, "--figures")
    report = score(options)
    if options.format == "text":
        console = Console()
        text = as_text(report, options, console if console.is_terminal and options.output is None else None)
    else:
        text = {"json": as_json, "markdown": as_markdown}[options.format](report, options)
    if options.output is None:
        sys.stdout.write(text)
    else:
        write_whole(options.output, lambda file: file.write(text.encode()))
    if options.output is not None or options.format != "text":
        for note in report.notes:
            print(f"calib: note: {note}", file=sys.stderr)
    return report


def _write_figures(options: Options, folder: Path, report: Report) -> int:
    from calib_lightning.predictions.figures import write_figures

    sys.stdout.flush()
    code = 0
    for entry in report.sets:
        try:
            write_figures(folder, entry.name, entry.predictions, options.bins[0], entry.predictions.input)
        except Exception as error:  # the report is written, and the figures of the other sets may yet succeed
            print(f"calib: warning: no figures of {entry.name}: {one_line(error)}", file=sys.stderr)
            code = 1
    return code
