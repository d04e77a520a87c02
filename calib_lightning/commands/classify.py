"""``calib predict --images DIR --model FILE`` from its arguments to its exit code."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from calib_lightning.commands.classify_arguments import Options, make_parser, parse
from calib_lightning.utils.files import check_writable

if TYPE_CHECKING:
    from calib_lightning.deploy.classifier import CalibratedClassifier
    from calib_lightning.deploy.export import ExportedClassifier

_DIGITS = 6  # as many as float32 and different runtimes agree on


class Row(NamedTuple):
    """What is said about one image.

    Attributes:
        file: Its path within the folder, with slashes.
        label: Name of the predicted class, or its number where names are not known.
        confidence: Confidence in it, a fraction.
        abstain: Whether the classifier abstains.
    """

    file: str
    label: str | int
    confidence: float
    abstain: bool


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: Arguments after ``calib predict``.

    Returns:
        Exit code: 0, or 1 if the model or an image is at fault. A wrong command line ends with 2.

    Example:
        ``main(["--images", "photos", "--model", "classifier.pt"])``
    """
    options = parse(make_parser(), argv)
    try:
        return _predict(options)
    # torch says AssertionError of a device that it was not built for
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, AssertionError) as error:
        print(f"calib: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1


def _predict(options: Options) -> int:
    from calib_lightning.deploy.images import find_images, read_batches  # the import takes seconds

    if options.output is not None:
        if options.output.is_dir():
            raise IsADirectoryError(f"--output {options.output}: is a folder; name a file")
        check_writable(options.output.parent, "--output")
    found = find_images(options.images)
    model = _model(options)
    if model.preprocessing is None:
        raise ValueError(
            f"{options.model}: does not say how images are prepared; save it with "
            "CalibratedClassifier(..., preprocessing=Preprocessing(...))"
        )
    if options.threshold is None and model.operating_point is None:
        _say("note", f"{options.model} has no operating threshold, so nothing abstains; give --threshold")
    if found.others:
        _say("note", f"no images: {', '.join(_within(path, options.images) for path in found.others)}")
    rows: list[Row] = []
    faults = dict.fromkeys(found.other_images, "is not read; convert it to .png")
    for batch in read_batches(found.images, model.preprocessing, options.batch_size):
        faults |= batch.faults
        if batch.paths:
            decision = model.predict(batch.image, options.threshold)
            answers = zip(*(part.tolist() for part in decision), strict=True)
            for path, (label, confidence, abstain) in zip(batch.paths, answers, strict=True):
                if math.isnan(confidence):
                    faults[path] = "the network gives no numbers for it; are the weights of the model finite?"
                    continue
                name = label if model.classes is None else model.classes[label]
                rows.append(Row(_within(path, options.images), name, round(confidence, _DIGITS), abstain))
    _write(rows, options.output)
    for path, reason in faults.items():
        _say("error", f"{_within(path, options.images)}: {reason}")
    return 1 if faults else 0


def _model(options: Options) -> CalibratedClassifier | ExportedClassifier:
    from calib_lightning.deploy.export import load_exported
    from calib_lightning.deploy.saving import load_classifier

    if options.model.suffix in (".onnx", ".pt2"):
        return load_exported(options.model, options.device)
    return load_classifier(options.model, device=options.device)


def _write(rows: list[Row], output: Path | None) -> None:
    from calib_lightning.utils.files import write_whole

    if output is None:
        _print_table(rows)
        return
    if output.suffix.lower() == ".json":
        text = json.dumps([row._asdict() for row in rows], indent=2, ensure_ascii=False) + "\n"
    else:
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows((row.file, row.label, row.confidence, str(row.abstain).lower()) for row in rows)
        text = buffer.getvalue()
    write_whole(output, lambda file: file.write(text.encode(errors="surrogateescape")))


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    options: dict[str, Any] = {"overflow": "fold"}
    table.add_column("file", **options)
    table.add_column("label", **options)
    table.add_column("confidence", justify="right")
    table.add_column("abstain")
    for row in rows:
        table.add_row(Text(row.file), Text(str(row.label)), f"{row.confidence:.4f}", "yes" if row.abstain else "no")
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)
    console.print(table)


def _within(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _say(kind: str, message: str) -> None:
    print(f"calib: {kind}: {message}", file=sys.stderr)
