"""``calib apply``: calibrated probabilities of rows without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calib_lightning.commands.options import parse
from calib_lightning.commands.running import check_headers, check_output, reported
from calib_lightning.predictions.settings import Reading


@dataclass(frozen=True, kw_only=True)
class Options(Reading):
    """Write a file of scores again, with calibrated probabilities in place of the scores.

    Labels are not needed. Labels, ids and other columns or arrays of FILE stay as they are. Formats: calib score
    --help. A .csv file is written with its own columns, any other as .npz with an array `probs`; `calib score --input
    probs` reads both.

    Args:
        file: Saved scores.
        calibrator: File of `calib calibrate`.
        output: The file to write, .csv for a .csv file, else .npz; an existing one is replaced, but never FILE.
    """

    file: Path = field(metadata={"metavar": "FILE"})
    calibrator: Path = field(metadata={"required": True, "metavar": "CAL"})
    output: Path = field(metadata={"required": True})


def main(argv: Sequence[str]) -> int:
    """Run ``calib apply``; exit code 1 if a file is invalid, 2 for a wrong command line."""
    options = parse(Options, "apply", argv)
    return reported(lambda: _run(options))


def _run(options: Options) -> int:
    check_output(options)
    check_headers([options.file], options.labels_key, "scores")
    from calib_lightning.predictions.applying import apply_to_file

    after = apply_to_file(options.calibrator, options.file, options.output, options)
    rows, classes = after.scores.shape
    for note in after.origin.notes:
        print(f"Note: {note}.")
    what = f"calibrated probabilities of {rows:,} rows and {classes:,} classes, by {after.origin.calibrator}"
    print(f"{options.output}: {what}")
    return 0
