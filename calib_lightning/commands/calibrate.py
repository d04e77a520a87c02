"""``calib calibrate`` from its arguments to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from calib_lightning.commands.calibrate_arguments import Options, make_parser, parse
from calib_lightning.commands.score import one_line
from calib_lightning.utils.files import check_writable

if TYPE_CHECKING:
    from calib_lightning.predictions.calibrating import AnyCalibrator, Report


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
    from calib_lightning.posthoc.neural_clamping import NeuralClamping
    from calib_lightning.predictions.calibrating import all_calibrators, named_calibrators
    from calib_lightning.predictions.scoring import selected_metrics

    if options.list:
        print("\n".join(all_calibrators()))
        return 0
    try:
        calibrators = named_calibrators(options.calibrators)
        selected_metrics(options.metrics, classes=2)
    except ValueError as error:
        parser.error(one_line(error))
    for calibrator in calibrators:
        if isinstance(calibrator, NeuralClamping) and options.run is None:
            parser.error(f"{calibrator.name} needs the network and its images: give a RUN")
    try:
        report = _report(options, calibrators)
    except (ValueError, TypeError, OSError, RuntimeError, UnpicklingError) as error:
        print(f"calib: error: {one_line(error)}", file=sys.stderr)
        return 1
    for name, reason in report.failed.items():
        print(f"calib: error: {name}: {reason}", file=sys.stderr)
    return 1 if report.failed else 0


def _report(options: Options, calibrators: Sequence[AnyCalibrator]) -> Report:
    from rich.console import Console

    from calib_lightning.posthoc import Calibrator
    from calib_lightning.predictions.calibrating import calibrate
    from calib_lightning.predictions.calibration_sets import read_inputs
    from calib_lightning.predictions.calibration_writing import as_text, write_folder

    output = options.output
    if output is None and options.run is not None:
        output = options.run / "calibrate"
    if output is not None:
        output = output if output.name else output.resolve()
        check_writable(output.parent, "--output")
    more = any(not isinstance(calibrator, Calibrator) or calibrator.needs_features for calibrator in calibrators)
    inputs, network = read_inputs(options, features=more), None
    if more and options.run is not None:
        from calib_lightning.predictions.run_network import RunNetwork  # only now the trainer is needed

        network = RunNetwork(options.run)
        inputs = network.with_features(inputs)
    report = calibrate(options, calibrators, inputs, network)
    console = Console()
    sys.stdout.write(as_text(report, options, console if console.is_terminal else None))
    if output is None:
        print("Nothing was written; --output DIR keeps the fitted calibrators and the report.")
    else:
        folder = write_folder(report, options, output)
        print(f"The calibrators and the report are in {folder}; {_use_of(report)}")
    return report


def _use_of(report: Report) -> str:
    """How the fitted calibrators can be applied to other rows."""
    fitted = [entry.calibrator for entry in report.fitted.values()]
    use = "`calib score FILE --calibrator CAL.pt` applies one."
    if any(getattr(calibrator, "needs_features", False) for calibrator in fitted):
        use += " Those that need features read them from FILE too (--features-key)."
    if any(not hasattr(calibrator, "needs_features") for calibrator in fitted):
        use += " Neural Clamping needs images: load_clamping and CalibratedClassifier."
    return use
