"""``calib classify``: label, confidence and whether to abstain, for each image of a folder."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from calib_lightning.commands.options import parse
from calib_lightning.commands.running import check_output, reported

if TYPE_CHECKING:
    from calib_lightning.deploy.classifier import CalibratedClassifier
    from calib_lightning.deploy.export import ExportedClassifier

_DIGITS = 6  # as many as float32 and different runtimes agree on


@dataclass(frozen=True, kw_only=True)
class Options:
    """Label, confidence and whether to abstain, for each image of a folder.

    model files:
      .pt          of calib_lightning.deploy.save_classifier; nothing in it is executed. Networks other than timm models
                   and modules of calib_lightning need export_torch or export_onnx
      .onnx        of export_onnx; a graph and numbers, nothing else
      .pt2         of export_torch; reading one may execute what it holds: use files from people you trust only

    Images are .jpg, .png, .webp and .bmp files in DIR and the folders in it. Those that cannot be read are named, the
    others are classified, and the exit code is 1. Images are prepared as the model file says.

    Args:
        images: Folder of images.
        model: A calibrated classifier, see below.
        output: Write .csv or .json there, in place of a table in the terminal.
        batch_size: Images at once.
        threshold: Abstain where the confidence is below this fraction. Default: that of the model file.
        device: Where the network runs, such as cuda.
    """

    images: Path = field(metadata={"metavar": "DIR"})
    model: Path = field(metadata={"required": True})
    output: Path | None = None
    batch_size: int = 32
    threshold: float | None = None
    device: str = field(default="cpu", metadata={"metavar": "DEVICE"})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}; it must be >= 1. 32 is customary.")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"--threshold is {self.threshold}; it must be a fraction between 0 and 1, such as 0.8.")
        if self.output is not None and self.output.suffix.lower() not in (".csv", ".json"):
            raise ValueError(f"--output is {self.output}; its suffix must be .csv or .json. Rename it.")


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


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: Words after ``calib classify``.

    Returns:
        Exit code: 0, or 1 if the model or an image is at fault. A wrong command line ends with 2.

    Example:
        ``main(["photos", "--model", "classifier.pt"])``
    """
    options = parse(Options, "classify", argv)
    return reported(lambda: _classify(options))


def _classify(options: Options) -> int:
    from calib_lightning.deploy.images import find_images, read_batches  # the import takes seconds

    check_output(options.output)
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
        _say("note", f"not images: {', '.join(_within(path, options.images) for path in found.others)}")
    rows: list[Row] = []
    faults = dict.fromkeys(found.other_images, "is not read; convert it to .png")
    for batch in read_batches(found.images, model.preprocessing, options.batch_size):
        faults |= batch.faults
        if batch.paths:
            decision = model.predict(batch.image, options.threshold)
            answers = zip(*(part.tolist() for part in decision), strict=True)
            for path, (label, confidence, abstain) in zip(batch.paths, answers, strict=True):
                if math.isnan(confidence):
                    faults[path] = "the network returns nan for it; are the weights of the model finite?"
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
