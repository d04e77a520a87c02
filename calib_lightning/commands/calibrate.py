"""``calib calibrate``: fit calibrators to held-out predictions and evaluate them on every test set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_lightning.commands.options import parse
from calib_lightning.commands.running import check_headers, check_metrics, one_line, print_report, reported, wrong
from calib_lightning.predictions.settings import (
    CALIBRATION_METRICS,
    DEFAULT_CALIBRATOR,
    DEFAULT_RESAMPLES,
    Reading,
    Settings,
    keywords_of,
)
from calib_lightning.utils.files import check_writable

if TYPE_CHECKING:
    from calib_lightning.posthoc import Calibrator
    from calib_lightning.predictions.calibration_report import CalibrationReport


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files instead of a run.

    Args:
        calibration: Scores and labels to fit to.
        test: Scores and labels to evaluate on.
        labels: File of labels (.npy, .npz, .pt or .csv), once for --calibration, then once for each --test.
        ood: Scores of images of other classes; report how well the confidence tells them from those of the test set.
    """

    calibration: Path | None = None
    test: list[Path] = field(default_factory=list)
    labels: list[Path] = field(default_factory=list, metadata={"once": True})
    ood: list[Path] = field(default_factory=list, metadata={"once": True})


@dataclass(frozen=True, kw_only=True)
class Options(Files, Settings, Reading):
    """Fit calibrators to held-out predictions; compare accuracy, calibration and refinement before and after.

    data:
      RUN          a folder of `calib fit`: calibrators are fitted to predictions/calibration.npz and evaluated on every
                   other saved set except the validation set: of corruptions the report has means, of images of other
                   classes how well they are told from test. The network is loaded only if a calibrator needs images or
                   features.
      files        calibrators are fitted to --calibration and evaluated on every --test. Formats: calib score --help.
                   Test rows among the calibration rows are rejected.

    Calibrators are written as in Python, separated by commas:
      --calibrators "Temperature,VectorScaling,Sequential(Temperature(),OneVsRest(Isotonic()))"
    `calib list calibrators` lists all.

    The fitted calibrators and the report go to a new folder: RUN/calibrate for a run, --output for files.

    Args:
        run: Folder of a run. Without it, give --calibration and --test.
        calibrators: Comma-separated calibrators; may be repeated. Default: Temperature.
        seeds: Number of fits of every calibrator that has a seed, with seeds that follow one another; the report adds
            their mean and standard deviation.
        output: Folder for the calibrators and the report; a number is appended if it exists. Default: RUN/calibrate.
    """

    run: Path | None = field(default=None, metadata={"metavar": "RUN", "positional": True})
    calibrators: list[str] = field(default_factory=list, metadata={"metavar": "NAMES", "once": True})
    seeds: int = 1
    output: Path | None = field(default=None, metadata={"metavar": "DIR"})
    metrics: str | None = CALIBRATION_METRICS
    intervals: int | None = field(default=DEFAULT_RESAMPLES, metadata={"off": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        Reading.__post_init__(self)
        if self.seeds < 1:
            raise ValueError(f"--seeds is {self.seeds}; it must be >= 1")
        if self.run is not None:
            given = {
                "--calibration": self.calibration,
                "--test": self.test,
                "--labels": self.labels,
                "--ood": self.ood,
                "--scores_key": self.scores_key,
                "--labels_key": self.labels_key,
                "--input probs": self.input == "probs",
            }
            for option, value in given.items():
                if value:
                    raise ValueError(f"{option} is for files only; the run {self.run} has its own predictions")
        elif self.calibration is None or not self.test:
            raise ValueError("give a RUN, or --calibration FILE and --test FILE")
        if len(self.labels) not in (0, 1 + len(self.test)):
            raise ValueError(
                f"--labels is given {len(self.labels)} times; it must be given once for --calibration and once for "
                f"each of the {len(self.test)} test files, in this order"
            )


def main(argv: Sequence[str]) -> int:
    """Run ``calib calibrate``; exit code 1 if a file is invalid or a fit fails, 2 for a wrong command line."""
    if "--list" in argv:
        wrong("calibrate", "--list is now `calib list calibrators`")
    options = parse(Options, "calibrate", argv)
    if code := reported(lambda: _headers(options)):
        return code
    from calib_lightning.predictions.calibrating import named_calibrators

    try:
        calibrators = named_calibrators(options.calibrators or DEFAULT_CALIBRATOR)
        for calibrator in calibrators:
            if "network" in calibrator.needs and options.run is None:
                raise ValueError(f"{calibrator.name} needs the network and its images. Give a RUN.")
    except ValueError as error:
        wrong("calibrate", f"--calibrators: {one_line(error)}")
    return reported(lambda: _run(options, calibrators))


def _headers(options: Options) -> int:
    files = [options.calibration, *options.test] if options.calibration is not None else []
    check_headers(files, options.labels_key, "scores" if options.labels else "scores and labels")
    check_metrics("calibrate", options.metrics)
    return 0


def _run(options: Options, calibrators: Sequence[Calibrator]) -> int:
    from calib_lightning.predictions.calibrating import calibrate
    from calib_lightning.predictions.reading import read_predictions, unique_names

    output = options.run / "calibrate" if options.output is None and options.run is not None else options.output
    if output is not None:
        output = output if output.name else output.resolve()
        check_writable(output.parent, "--output")
    source: Any = options.run
    tests: Any = None
    if options.calibration is not None:
        labels: list[Path | None] = [*options.labels] or [None] * (1 + len(options.test))
        source = read_predictions(options.calibration, options, labels[0])
        files = zip(unique_names(options.test), options.test, labels[1:], strict=True)
        tests = {name: read_predictions(path, options, of_labels) for name, path, of_labels in files}
    report = calibrate(source, tests, calibrators, options.seeds, options.ood or None, **keywords_of(options))
    print_report(report, "text", None)
    if output is None:
        print("Nothing was written; --output DIR saves the fitted calibrators and the report.")
    else:
        print(f"The calibrators and the report are in {report.save(output)}; {_use_of(report, options.run)}")
    for name, reason in report.failed.items():
        print(f"calib: error: {name}: {reason}", file=sys.stderr)
    return 1 if report.failed else 0


def _use_of(report: CalibrationReport, run: Path | None) -> str:
    """How to apply the fitted calibrators to other rows and images."""
    needs = {need for calibrator in report.calibrators.values() for need in calibrator.needs}
    use = "`calib apply FILE --calibrator CAL.pt --output NEW` applies one to rows without labels."
    if "features" in needs:
        use += " Calibrators that need features read them from FILE (--features_key)."
    if "network" in needs:
        use += " Apply those that need the network with CalibratedClassifier in Python."
    if run is not None and report.calibrators:
        use += f" `calib classify DIR --model {run} --calibrator NAME` labels images."
    return use
