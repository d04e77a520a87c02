"""The sets that calibrators are fitted to and measured on, read and kept apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calib_lightning.commands.calibrate_arguments import Options
from calib_lightning.metrics.functional.rows import seem_probs
from calib_lightning.predictions.reading import Names, Predictions, read_features, read_predictions
from calib_lightning.predictions.report import SHARED
from calib_lightning.predictions.scoring import REPLACED_CONFIDENCE, input_notes, unique_names, with_logits
from calib_lightning.utils.run_folder import run_of

_SAMPLED_ROWS, _SAMPLED_CLASSES = 200, 8


class Source(NamedTuple):
    """A set and where it comes from.

    Attributes:
        name: Name of the set.
        files: The files that it was read from, first that of the scores.
        predictions: What they hold, checked.
        features: ``(N, d)`` where a calibrator needs them.
    """

    name: str
    files: list[Path]
    predictions: Predictions
    features: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Logits ``(N, K)``, also of probabilities."""
        return with_logits(self.predictions).scores


class Inputs(NamedTuple):
    """Everything that was read.

    Attributes:
        calibration: The rows that calibrators are fitted to.
        tests: The sets that they are measured on.
        notes: What a reader of the figures should know.
    """

    calibration: Source
    tests: list[Source]
    notes: list[str]


def read_inputs(options: Options, features: bool) -> Inputs:
    """Read and check all files, and refuse a fit on test rows.

    Args:
        options: The command line.
        features: Whether features are read from the files; those of a run come from its network.

    Returns:
        The sets.

    Raises:
        ValueError: A fault of a file, or rows that must not be fitted on.
        TypeError: A dtype that is not allowed.
        OSError: A file cannot be read.
    """
    if options.run is None:
        calibration, tests = _from_files(options)
        run = run_of(calibration.files[0])
        _check_held_out(calibration.files[0], run)
    else:
        calibration, tests = _from_run(options.run)
        run = options.run
    if len(calibration.predictions.labels) == 0:
        raise ValueError(f"{calibration.files[0]}: holds no rows; a calibrator is fitted to held-out rows")
    notes = [] if run is None else list(_run_notes(run))
    for source in (calibration, *tests):
        if source.predictions.confidence is not None:
            notes.append(f"{source.name}: {REPLACED_CONFIDENCE}")
        notes += [f"{source.name}: {note}" for note in input_notes(source.predictions)]
    for test in tests:
        notes += _check_apart(calibration, test)
    if features and options.run is None:
        key = options.features_key
        calibration, *tests = [
            source._replace(features=read_features(source.files[0], key, len(source.predictions.labels)))
            for source in (calibration, *tests)
        ]
        _check_widths(calibration, tests)
    return Inputs(calibration, tests, list(dict.fromkeys(notes)))


def read_record(run: Path) -> dict[str, Any]:
    """Read what a run wrote down about itself.

    Args:
        run: Its folder.

    Returns:
        The content of ``run.json``.

    Raises:
        ValueError: It is no run folder, or the file is damaged.
    """
    path = run / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{run}: is no folder of `calib fit`, as it has no run.json; for other predictions say --calibration FILE "
            "--test FILE"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: is damaged (no object)")
    return record


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_files(options: Options) -> tuple[Source, list[Source]]:
    assert options.calibration is not None
    paths = [options.calibration, *options.test]
    labels: list[Path | None] = list(options.labels) or [None] * len(paths)
    for test in options.test:
        if options.calibration.exists() and test.exists() and options.calibration.samefile(test):
            raise ValueError(
                f"{test}: is given as --calibration and as --test; a calibrator that was fitted to the rows that it is "
                "measured on looks better than it is: give held-out rows of their own"
            )
    names = Names(options.scores_key, options.labels_key)
    sources = []
    for name, path, of_labels in zip(["calibration", *unique_names(options.test)], paths, labels, strict=True):
        files = [path] if of_labels is None else [path, of_labels]
        predictions = read_predictions(path, options.input, names, of_labels)
        if options.input == "logits" and seem_probs(predictions.scores):
            raise ValueError(
                f"{path}: all scores lie in [0, 1] and each row sums to 1, but they are taken for logits; if they are "
                "probabilities, say --input probs"
            )
        sources.append(Source(name, files, predictions))
    return sources[0], sources[1:]


def _from_run(run: Path) -> tuple[Source, list[Source]]:
    read_record(run)
    folder = run / "predictions"
    found = {path: path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.npz"))}
    paths = {name: path for path, name in found.items() if not name.startswith("ood/")}  # which have no labels
    if not paths:
        raise ValueError(
            f"{run}: has no predictions yet; `calib test -c {run / 'config.yaml'}` saves them in {run / 'test'}, which "
            "is then the RUN to give"
        )
    calibration = paths.pop("calibration", None)
    if calibration is None:
        raise ValueError(
            f"{folder}: has no calibration.npz: the run held no images back for calibration; train it with "
            "data.init_args.split.calibration above 0"
        )
    paths.pop("val", None)  # it chose the checkpoint
    if not paths:
        raise ValueError(f"{folder}: has no predictions of a test set")
    sources = [Source(name, [path], read_predictions(path)) for name, path in paths.items()]
    return Source("calibration", [calibration], read_predictions(calibration)), sources


def _check_held_out(path: Path, run: Path | None) -> None:
    within = None if run is None else run.resolve() / "predictions"
    if within is not None and path.resolve().is_relative_to(within) and path.stem != "calibration":
        use = "chose its checkpoint" if path.stem == "val" else "is what it is tested on"
        raise ValueError(
            f"{path}: is the set {path.stem!r} of the run {run}, which {use}; calibrators are fitted to rows of their "
            f"own: give {within / 'calibration.npz'}"
        )


def _run_notes(run: Path) -> Iterator[str]:
    if read_record(run).get("share"):
        yield f"{SHARED}: the rows of the fit have also chosen the checkpoint"
    for name in read_record(run).get("calibration_used_by") or []:
        yield (
            f"the calibration split is not independent of the network: {name} was trained with it, so that calibrators "
            "see smaller errors there than elsewhere"
        )


def _check_apart(calibration: Source, test: Source) -> list[str]:
    """Refuse test rows among the rows of the fit; a few of them, which may be a coincidence, are a note."""
    mine, others = calibration.predictions, test.predictions
    if mine.scores.shape[1] != others.scores.shape[1]:
        raise ValueError(
            f"{calibration.files[0]} and {test.files[0]} must have the same classes: {mine.scores.shape[1]} and "
            f"{others.scores.shape[1]}"
        )
    rows, test_rows = _distinct_rows(mine), _distinct_rows(others)
    shared = len(rows & test_rows)
    same = mine.scores.shape == others.scores.shape and rows == test_rows
    # Where a network says the same of all images, each set repeats the few rows that there are, and two share them.
    repeats = len(rows) < len(mine.labels) or len(test_rows) < len(others.labels)
    by_chance = shared == 0 or (repeats and shared <= mine.scores.shape[1])
    if (same and torch.equal(mine.labels, others.labels)) or (
        shared == min(len(rows), len(test_rows)) and not by_chance
    ):
        raise ValueError(
            f"{calibration.files[0]} and {test.files[0]} hold the same rows (equal scores and labels): a calibrator "
            "that was fitted to the rows that it is measured on looks better than it is; give held-out rows of their "
            "own"
        )
    if not repeats and _share_of_twins(mine, others) > 0.5:
        raise ValueError(
            f"{calibration.files[0]} and {test.files[0]} hold the same rows but for rounding (scores and labels): a "
            "calibrator that was fitted to the rows that it is measured on looks better than it is; give held-out rows "
            "of their own"
        )
    if by_chance:
        return []
    return [f"{test.name}: {shared} of its rows are also among the rows that the calibrators are fitted to"]


def _distinct_rows(predictions: Predictions) -> set[bytes]:
    # float32, so that a copy in double precision is known again
    scores, labels = predictions.scores.float().numpy(), predictions.labels.numpy()
    return {
        hashlib.blake2b(row.tobytes() + label.tobytes(), digest_size=16).digest()
        for row, label in zip(scores, labels, strict=True)
    }


def _share_of_twins(mine: Predictions, others: Predictions) -> float:
    """Share of test rows with a row of the fit that differs by rounding alone; some rows and classes are looked at."""
    rows = torch.linspace(0, len(others.labels) - 1, min(len(others.labels), _SAMPLED_ROWS)).long()
    classes = slice(_SAMPLED_CLASSES)
    scores, looked_at = mine.scores[:, classes].double(), others.scores[rows, classes].double()
    # Two classes leave one number, which comes close to that of another row by chance.
    limit = (1e-4 if scores.shape[1] > 2 else 1e-6) * float(scores.std())
    twins = 0
    for row, label in zip(looked_at, others.labels[rows].tolist(), strict=True):
        gap = (scores[mine.labels == label] - row).abs().amax(dim=1)
        twins += len(gap) > 0 and float(gap.min()) <= limit
    return twins / max(1, len(rows))


def _check_widths(calibration: Source, tests: list[Source]) -> None:
    assert calibration.features is not None
    for test in tests:
        assert test.features is not None
        if calibration.features.shape[1] != test.features.shape[1]:
            raise ValueError(
                f"{calibration.files[0]} and {test.files[0]} must have features of the same width: "
                f"{calibration.features.shape[1]} and {test.features.shape[1]}"
            )
