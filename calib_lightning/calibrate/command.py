"""``calib calibrate`` from its arguments to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from calib_lightning.calibrate.arguments import Options, make_parser, parse
from calib_lightning.score.command import check_writable, one_line

if TYPE_CHECKING:
    from calib_lightning.calibrate.calibrating import Report
    from calib_lightning.posthoc import Calibrator


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: Arguments after ``calib calibrate``.

    Returns:
        Exit code: 0, or 1 if a file is at fault or a calibrator could not be fitted. A wrong command line ends with 2.

    Example:
        ``main(["--calibration", "val.npz", "--test", "test.npz", "--calibrators", "Temperature,VectorScaling"])``
    """
    parser = make_parser()
    options = parse(parser, argv)
    # These imports take seconds.
    from calib_lightning.calibrate.calibrating import all_calibrators, named_calibrators
    from calib_lightning.score.scoring import selected_metrics

    if options.list:
        print("\n".join(all_calibrators()))
        return 0
    try:
        calibrators = named_calibrators(options.calibrators)
        selected_metrics(options.metrics, classes=2)
    except ValueError as error:
        parser.error(one_line(error))
    try:
        report = _report(options, calibrators)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"calib: error: {one_line(error)}", file=sys.stderr)
        return 1
    for name, reason in report.failed.items():
        print(f"calib: error: {name}: {reason}", file=sys.stderr)
    return 1 if report.failed else 0


def _report(options: Options, calibrators: Sequence[Calibrator]) -> Report:
    from rich.console import Console

    from calib_lightning.calibrate.calibrating import calibrate
    from calib_lightning.calibrate.reading import read_inputs
    from calib_lightning.calibrate.writing import as_text, write_folder

    output = options.output
    if output is None and options.run is not None:
        output = options.run / "calibrate"
    if output is not None:
        output = output.resolve()
        check_writable(output.parent, "--output")
    inputs = read_inputs(options, features=any(calibrator.needs_features for calibrator in calibrators))
    report = calibrate(options, calibrators, inputs)
    console = Console()
    sys.stdout.write(as_text(report, options, console if console.is_terminal else None))
    if output is None:
        print("Nothing was written; --output DIR keeps the fitted calibrators and the report.")
    else:
        folder = write_folder(report, options, output)
        print(
            f"The calibrators and the report are in {folder}; calib score FILE --calibrator {folder}/NAME.pt uses one."
        )
    return report
