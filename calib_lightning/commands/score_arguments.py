"""The command line of ``calib score``; nothing heavy is imported, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Literal

DEFAULT_RESAMPLES = 1000
_FORMATS: dict[str, Literal["text", "json", "markdown"]] = {".txt": "text", ".json": "json", ".md": "markdown"}

_EPILOG = """\
files:
  .npz         arrays `logits` (with --input probs: `probs`) of shape (N, K), `labels` (N,) and, where there are any,
               `confidence` (N,) of a method that brings its own, `class_names` (K,) and `label_distribution` (N, K),
               shares of the classes such as people's votes; --scores-key and --labels-key name others. Files of
               `calib test` are of this kind.
  .pt, .pth    a dict of tensors with these names (class_names: a list), or one tensor (N, K) with --labels
  .npy         scores (N, K), with --labels
  .csv         one row a sample, comma between cells: K columns of scores and one of labels, the last one or, with a
               header, that named `label` (--labels-key). A header names the scores 0, 1, 2, ... or with one prefix,
               as z0, z1, z2, ...; a column `confidence` is as above, `index` and a first one without a name are left
               out, any other is refused.

Fractions are shown in percent where that is usual; JSON holds fractions at full precision, null where
undefined, "inf" where infinite.
"""


class FigureOptions(argparse.Namespace):
    """What the command line says about how files are read and which figures are computed."""

    input: Literal["logits", "probs"]
    scores_key: str | None
    labels_key: str | None
    features_key: str
    metrics: str | None
    bins: list[int]
    intervals: int | None
    level: float
    seed: int


class Options(FigureOptions):
    """What the command line says; see ``calib score --help``."""

    files: list[Path]
    labels: list[Path]
    calibrator: Path | None
    groups: Literal["class", "frequency"] | None
    train_counts: Path | None
    compare: Path | None
    seeds: bool
    figures: Path | None
    format: Literal["text", "json", "markdown"]
    output: Path | None


def make_parser() -> argparse.ArgumentParser:
    """Make the parser.

    Returns:
        A parser whose faults end the process with code 2.
    """
    parser = argparse.ArgumentParser(
        "calib score",
        description="Accuracy, calibration and refinement of saved predictions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="saved scores and labels, see below")
    data = parser.add_argument_group("what the files hold")
    add_input_arguments(data)
    data.add_argument(
        "--labels",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="labels from a .npy, .npz, .pt or .csv file; once for all, or once for each FILE in their order",
    )
    what = parser.add_argument_group("what is computed")
    what.add_argument(
        "--calibrator",
        type=Path,
        metavar="CAL",
        help="a file of `calib calibrate`: score what this calibrator makes of each FILE (not of --compare)",
    )
    add_figure_arguments(what, "all; without ovo_auroc for more than 200 classes")
    what.add_argument(
        "--intervals",
        nargs="?",
        const=DEFAULT_RESAMPLES,
        type=at_least_two,
        metavar="N",
        help=f"bootstrap intervals from N resamples ({DEFAULT_RESAMPLES} if not given)",
    )
    what.add_argument(
        "--groups", choices=["class", "frequency"], help="figures for each class, or for frequent and rare classes"
    )
    what.add_argument(
        "--train-counts",
        type=Path,
        metavar="FILE",
        help="training images of each class: K integers in a .csv, .npy or .json file; for --groups frequency",
    )
    what.add_argument(
        "--compare",
        type=Path,
        metavar="OTHER",
        help="difference of each FILE to another run on the same samples, with the p-value of a permutation test",
    )
    what.add_argument("--seeds", action="store_true", help="the files are runs of one method: mean ± std over them")
    out = parser.add_argument_group("what is written")
    out.add_argument("--format", choices=list(_FORMATS.values()), help="default: by the suffix of --output, or text")
    out.add_argument("--output", type=Path, metavar="FILE", help="write the report there (.txt, .json or .md)")
    out.add_argument("--figures", type=Path, metavar="DIR", help="write figures as PNG and SVG to DIR/<set>/")
    return parser


def add_input_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what says how files are read.

    Args:
        group: Gets the arguments.
    """
    group.add_argument(
        "--input", choices=["logits", "probs"], default="logits", help="what the scores are (default: logits)"
    )
    group.add_argument("--scores-key", metavar="NAME", help="name of the scores in .npz and .pt files")
    group.add_argument("--labels-key", metavar="NAME", help="name of the labels, or of their column")
    group.add_argument(
        "--features-key",
        default="features",
        metavar="NAME",
        help="name of the features (N, d) in .npz and .pt files, for calibrators that need them (default: features)",
    )


def add_figure_arguments(group: argparse._ArgumentGroup, metrics: str, default: str | None = None) -> None:
    """Add what says which figures are computed, but for the intervals.

    Args:
        group: Gets the arguments.
        metrics: What ``--metrics`` is by default, in words.
        default: The same as a value.
    """
    group.add_argument(
        "--metrics",
        default=default,
        metavar="WHICH",
        help=f"core, all, or keys with commas between them (default: {metrics})",
    )
    group.add_argument(
        "--bins",
        type=_bins,
        default=[15],
        metavar="M[,M...]",
        help="number of bins; several give each binned metric for each, as ece@10 (default: 15)",
    )
    group.add_argument("--level", type=_level, default=0.95, help="coverage of intervals (default: 0.95)")
    group.add_argument("--seed", type=_seed, default=0, help="seed of whatever is drawn at random (default: 0)")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> Options:
    """Read a command line.

    Args:
        parser: The parser of `make_parser`.
        argv: Arguments after ``calib score``.

    Returns:
        The options; they fit together.
    """
    options = parser.parse_args(_with_resamples(argv), namespace=Options())
    if len(options.labels) not in (0, 1, len(options.files)):
        parser.error(
            f"--labels was given {len(options.labels)} times for {len(options.files)} files: give it once for all of "
            "them, or once for each"
        )
    if (options.groups == "frequency") != (options.train_counts is not None):
        parser.error("--groups frequency and --train-counts FILE go together")
    if options.seeds and len(options.files) < 2:
        parser.error("--seeds needs two or more files, one of each run")
    if options.format is None:
        suffix = options.output.suffix.lower() if options.output else ".txt"
        if suffix not in _FORMATS:
            parser.error(f"--output {options.output}: the suffix is none of {', '.join(_FORMATS)}; say --format")
        options.format = _FORMATS[suffix]
    return options


def _with_resamples(argv: list[str]) -> list[str]:
    # argparse would take a file after a bare --intervals for the number of resamples.
    spelled = list(argv)
    for place, argument in enumerate(argv):
        follower = argv[place + 1] if place + 1 < len(argv) else ""
        if argument == "--intervals" and not re.fullmatch(r"-?\d+", follower):
            spelled[place] = f"--intervals={DEFAULT_RESAMPLES}"
    return spelled


def _bins(text: str) -> list[int]:
    try:
        bins = [int(part) for part in text.split(",")]
    except ValueError:
        bins = []
    if not bins or min(bins) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers >= 1, such as 15 or 10,15,20")
    return list(dict.fromkeys(bins))


def at_least_two(text: str) -> int:
    """Read a number of resamples."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 2")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text) or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from -2**63 to 2**63 - 1")
    return int(text)


def _level(text: str) -> float:
    try:
        level = float(text)
    except ValueError:
        level = 0.0
    if not 0.0 < level < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1, such as 0.95")
    return level
