"""``calib score`` from its arguments to its exit code."""

from __future__ import annotations

import sys

from calib_lightning.score.arguments import Options, make_parser, parse


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: Arguments after ``calib score``.

    Returns:
        Exit code: 0, or 1 if a file is at fault. A wrong command line ends with 2.

    Example:
        ``main(["predictions/iid.npz", "--intervals"])``
    """
    parser = make_parser()
    options = parse(parser, argv)
    from calib_lightning.score.scoring import selected_metrics  # the import takes seconds

    try:
        selected_metrics(options.metrics, classes=2)
    except ValueError as error:
        parser.error(str(error))
    try:
        _run(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"calib: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _run(options: Options) -> None:
    from rich.console import Console

    from calib_lightning.files import write_whole
    from calib_lightning.score.scoring import score
    from calib_lightning.score.writing import as_json, as_markdown, as_text

    report = score(options)
    if options.figures is not None:
        from calib_lightning.score.figures import write_figures

        for entry in report.sets:
            write_figures(options.figures, entry.name, entry.predictions, options.bins[0], options.input)
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
