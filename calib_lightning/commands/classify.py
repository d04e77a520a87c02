"""``calib classify``: label, confidence and whether to abstain, for each image of a folder."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from calib_lightning.commands.options import parse
from calib_lightning.commands.running import check_output, reported
from calib_lightning.utils.run_folder import calibrators_of, run_of

if TYPE_CHECKING:
    from calib_lightning.deploy.classifier import CalibratedClassifier
    from calib_lightning.deploy.exported import ExportedClassifier

_DIGITS = 6  # as many as float32 and different runtimes agree on


@dataclass(frozen=True, kw_only=True)
class Options:
    """Label, confidence and whether to abstain, for each image of a folder.

    models:
      RUN          the folder of a run of `calib fit` on images, or a checkpoint in it; --calibrator names one that
                   `calib calibrate RUN` has fitted
      .pt          from calib_lightning.deploy.save_classifier; no code in it is executed. For networks other than timm
                   models and modules of calib_lightning, use export_torch or export_onnx
      .onnx        from export_onnx; contains only a graph and numbers
      .pt2         from export_torch; loading it may execute code in it, so use only files from sources that you trust

    Images are .jpg, .png, .webp and .bmp files in DIR and its subfolders. Images that cannot be read are reported, the
    others are classified, and the exit code is 1. The model defines the preprocessing.

    Args:
        images: Folder of images.
        model: A run or a calibrated classifier; see below.
        calibrator: Of a RUN: the name of one of its calibrators, or a file. Default: none.
        output: Write a .csv or .json file instead of printing a table.
        batch_size: Number of images per batch.
        threshold: Abstain if the confidence is below this fraction. Default: the threshold in a model file.
        device: Device of the network, such as cuda.
    """

    images: Path = field(metadata={"metavar": "DIR"})
    model: Path = field(metadata={"required": True})
    calibrator: str | None = field(default=None, metadata={"metavar": "NAME"})
    output: Path | None = None
    batch_size: int = 32
    threshold: float | None = None
    device: str = field(default="cpu", metadata={"metavar": "DEVICE"})

    @property
    def is_run(self) -> bool:
        """Whether the model is a run or a checkpoint of one."""
        return self.model.is_dir() or self.model.suffix == ".ckpt"

    def __post_init__(self) -> None:
        if self.calibrator is not None and not self.is_run:
            if not self.model.exists():
                raise ValueError(
                    f"--model is {self.model}, which does not exist; it must be a run or a file of a model."
                )
            raise ValueError(f"--calibrator is for a RUN only; {self.model} has its own")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}; it must be >= 1. 32 is usual.")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"--threshold is {self.threshold}; it must be a fraction from 0 to 1, such as 0.8.")
        if self.output is not None and self.output.suffix.lower() not in (".csv", ".json"):
            raise ValueError(f"--output is {self.output}; its suffix must be .csv or .json. Rename it.")


class Row(NamedTuple):
    """The answer for one image: relative path, class name (or number), confidence, and whether to abstain."""

    file: str
    label: str | int
    confidence: float
    abstain: bool


def main(argv: Sequence[str]) -> int:
    """Run ``calib classify``; exit code 1 if the model or an image is invalid, 2 for a wrong command line."""
    options = parse(Options, "classify", argv)
    return reported(lambda: _classify(options))


def _classify(options: Options) -> int:
    from calib_lightning.deploy.images import find_images, read_batches  # the import takes seconds

    check_output(options)
    found = find_images(options.images)
    check_output(options, [*found.images, *found.other_images])
    model = _model(options)
    if model.preprocessing is None:
        raise ValueError(
            f"{options.model} has no preprocessing. Save a CalibratedClassifier(..., preprocessing=Preprocessing(...))."
        )
    if options.threshold is None and model.operating_point is None:
        _say("note", f"{options.model} has no threshold, so it never abstains; give --threshold")
    if found.others:
        _say("note", f"not images: {', '.join(_within(path, options.images) for path in found.others)}")
    rows: list[Row] = []
    faults = dict.fromkeys(found.other_images, "not a supported format; convert it to .png")
    for batch in read_batches(found.images, model.preprocessing, options.batch_size):
        faults |= batch.faults
        if batch.paths:
            decision = model.predict(batch.image, options.threshold)
            answers = zip(*(part.tolist() for part in decision), strict=True)
            for path, (label, confidence, abstain) in zip(batch.paths, answers, strict=True):
                if math.isnan(confidence):
                    faults[path] = "the output of the network is nan; check that the weights of the model are finite"
                    continue
                name = label if model.classes is None else model.classes[label]
                rows.append(Row(_within(path, options.images), name, round(confidence, _DIGITS), abstain))
    _write(rows, options.output)
    for path, reason in faults.items():
        _say("error", f"{_within(path, options.images)}: {reason}")
    return 1 if faults else 0


def _model(options: Options) -> CalibratedClassifier | ExportedClassifier:
    from calib_lightning.deploy.exported import load_exported
    from calib_lightning.deploy.saving import load_classifier

    if options.is_run:
        from calib_lightning.deploy.of_run import calibrator_file, classifier_of_run

        if options.calibrator is None:
            known = ", ".join(calibrators_of(run_of(options.model) or options.model)) or "none is fitted yet"
            _say("note", f"no calibrator: confidences are those of the network; --calibrator NAME takes one ({known})")
            return classifier_of_run(options.model, device=options.device)
        file = calibrator_file(options.model, options.calibrator)
        _say("note", f"calibrator: {file}")
        return classifier_of_run(options.model, file, options.device)
    if options.model.suffix in (".onnx", ".pt2"):
        return load_exported(options.model, options.device)
    return load_classifier(options.model, device=options.device)


def _write(rows: list[Row], output: Path | None) -> None:
    from calib_lightning.predictions.long_table import to_csv
    from calib_lightning.utils.files import write_whole

    if output is None:
        _print_table(rows)
        return
    if output.suffix.lower() == ".json":
        text = json.dumps([row._asdict() for row in rows], indent=2, ensure_ascii=False) + "\n"
    else:
        text = to_csv(row._asdict() for row in rows) or ",".join(Row._fields) + "\n"
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
