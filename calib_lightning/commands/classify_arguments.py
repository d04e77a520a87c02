"""The command line of ``calib predict --images``; nothing heavy is imported, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

_EPILOG = """\
model files:
  .pt          of calib_lightning.deploy.save_classifier; nothing in it is executed. Networks other than timm models
               and modules of calib_lightning need export_torch or export_onnx
  .onnx        of export_onnx; a graph and numbers, nothing else
  .pt2         of export_torch; reading one may execute what it holds: use files of people you trust only

Images are .jpg, .png, .webp and .bmp files in DIR and the folders in it. Those that cannot be read are named, the
others are predicted, and the exit code is 1. Images are prepared as the model file says.
"""


class Options(argparse.Namespace):
    """What the command line says; see ``calib predict --images --help``."""

    images: Path
    model: Path
    output: Path | None
    batch_size: int
    threshold: float | None
    device: str


def is_for_images(argv: list[str]) -> bool:
    """Tell ``calib predict --images`` from ``calib predict`` of the trainer.

    Args:
        argv: Arguments after ``calib``.

    Returns:
        Whether images are to be predicted.

    Example:
        >>> is_for_images(["predict", "--images", "photos", "--model", "classifier.pt"])
        True
    """
    return argv[:1] == ["predict"] and any(word.partition("=")[0] == "--images" for word in argv)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser.

    Returns:
        A parser whose faults end the process with code 2.
    """
    parser = argparse.ArgumentParser(
        "calib predict",
        description="Label, confidence and whether to abstain, for each image of a folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of images")
    parser.add_argument("--model", required=True, type=Path, metavar="FILE", help="a calibrated classifier, see below")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write .csv or .json there, in place of a table to the terminal"
    )
    parser.add_argument("--batch-size", type=_at_least_one, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--threshold",
        type=_fraction,
        metavar="C",
        help="abstain where the confidence is below this fraction (default: that of the model file)",
    )
    parser.add_argument("--device", default="cpu", help="where the network runs, such as cuda (default: cpu)")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> Options:
    """Read a command line.

    Args:
        parser: The parser of `make_parser`.
        argv: Arguments after ``calib predict``.

    Returns:
        The options.
    """
    if {"-h", "--help"} & set(argv):  # also right behind --images, which would else want its folder first
        argv = ["--help"]
    options = parser.parse_args(argv, namespace=Options())
    if options.output is not None and options.output.suffix.lower() not in (".csv", ".json"):
        parser.error(f"--output {options.output}: the suffix must be .csv or .json")
    return options


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1, such as 0.8")
    return value
