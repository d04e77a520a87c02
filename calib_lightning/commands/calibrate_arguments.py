"""The command line of ``calib calibrate``; nothing heavy is imported, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from calib_lightning.commands.score_arguments import (
    DEFAULT_RESAMPLES,
    FigureOptions,
    add_figure_arguments,
    add_input_arguments,
    at_least_two,
)

DEFAULT_CALIBRATOR = "Temperature"
DEFAULT_METRICS = "accuracy,nll,brier,ece,aece_official,classwise_ece,correctness_auroc,entropy"

_EPILOG = """\
what is fitted on what:
  RUN          a folder of `calib fit`: fitted on predictions/calibration.npz, measured on every other set that was
               saved but the validation set. The network is loaded only where a calibrator needs images or features.
  files        fitted on --calibration, measured on every --test. They are read as by `calib score`; see its --help.
               A calibrator is never fitted on rows that it is measured on.

Calibrators are written as in Python, with commas between them, such as
  --calibrators "Temperature,VectorScaling,Sequential(Temperature(),OneVsRest(Isotonic()))"

For a RUN, the fitted calibrators and the report go to a new folder RUN/calibrate; for files, to --output.
"""


class Options(FigureOptions):
    """What the command line says; see ``calib calibrate --help``."""

    run: Path | None
    calibration: Path | None
    test: list[Path]
    labels: list[Path]
    calibrators: list[str]
    list: bool
    output: Path | None


def make_parser() -> argparse.ArgumentParser:
    """Make the parser.

    Returns:
        A parser whose faults end the process with code 2.
    """
    parser = argparse.ArgumentParser(
        "calib calibrate",
        description="Fit calibrators to held-out predictions; accuracy, calibration and refinement before and after.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a run, or see --calibration")
    parser.add_argument(
        "--calibrators",
        action="append",
        metavar="NAMES",
        help=f"calibrators with commas between them; may be given several times (default: {DEFAULT_CALIBRATOR})",
    )
    parser.add_argument("--list", action="store_true", help="name all calibrators and end")
    data = parser.add_argument_group("files in place of a run")
    data.add_argument("--calibration", type=Path, metavar="FILE", help="scores and labels to fit to")
    data.add_argument(
        "--test",
        action="extend",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="scores and labels to measure on",
    )
    data.add_argument(
        "--labels",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="labels from a .npy, .npz, .pt or .csv file: one for --calibration, then one for each --test",
    )
    add_input_arguments(data)
    what = parser.add_argument_group("what is computed")
    add_figure_arguments(what, DEFAULT_METRICS, DEFAULT_METRICS)
    what.add_argument(
        "--intervals",
        type=at_least_two,
        default=DEFAULT_RESAMPLES,
        metavar="N",
        help=f"number of resamples of the bootstrap intervals (default: {DEFAULT_RESAMPLES})",
    )
    what.add_argument(
        "--no-intervals", action="store_const", const=None, dest="intervals", help="figures without intervals"
    )
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the calibrators and the report; a number is added where it exists (default: RUN/calibrate)",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> Options:
    """Read a command line.

    Args:
        parser: The parser of `make_parser`.
        argv: Arguments after ``calib calibrate``.

    Returns:
        The options; they fit together.
    """
    options = parser.parse_args(argv, namespace=Options())
    if options.list:
        return options
    if options.run is not None:
        given = {
            "--calibration": options.calibration,
            "--test": options.test,
            "--labels": options.labels,
            "--scores-key": options.scores_key,
            "--labels-key": options.labels_key,
            "--input probs": options.input == "probs",
        }
        for option, value in given.items():
            if value:
                parser.error(f"{option} is for files; of the run {options.run} its own predictions are taken")
    elif options.calibration is None or not options.test:
        parser.error("give a RUN, or --calibration FILE and --test FILE")
    if len(options.labels) not in (0, 1 + len(options.test)):
        parser.error(
            f"--labels was given {len(options.labels)} times: give it once for --calibration and once for each of the "
            f"{len(options.test)} test files, in this order"
        )
    return options


def split_names(text: str) -> list[str]:
    """Divide calibrators at the commas that are not within brackets.

    Args:
        text: What ``--calibrators`` was given.

    Returns:
        One text a calibrator.

    Raises:
        ValueError: It cannot be read.

    Example:
        >>> split_names("Temperature, Sequential(Temperature(), OneVsRest(Isotonic()))")
        ['Temperature', 'Sequential(Temperature(), OneVsRest(Isotonic()))']
    """
    try:
        written = ast.parse(f"[{text.strip()}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        written = None
    if not isinstance(written, ast.List) or not written.elts:
        raise ValueError(
            f"--calibrators {text!r:.200} cannot be read; write names with commas between them, such as "
            '"Temperature,VectorScaling"; --list names them all'
        )
    return [ast.unparse(item) for item in written.elts]
