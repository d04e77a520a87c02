"""Apply a saved calibrator to rows without labels: scores in memory, or a file."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_lightning.posthoc import Calibrator, load_calibrator
from calib_lightning.predictions.csv_header import PROBABILITY, Columns, classes_of, delimiter_of
from calib_lightning.predictions.files import Stored
from calib_lightning.predictions.others import unlabelled
from calib_lightning.predictions.reading import Predictions, with_features
from calib_lightning.predictions.scoring import apply
from calib_lightning.predictions.settings import Reading
from calib_lightning.utils.files import check_output_file, write_whole


def apply_calibrator(
    calibrator: Calibrator | str | Path, scores: Any, features: Any = None, *, input: Any = None
) -> Any:
    """Calibrate scores that need no labels.

    Args:
        calibrator: A fitted calibrator, or its file.
        scores: ``(N, K)``, or ``(N,)`` of class 1 of two: a tensor, an array, or a DataFrame or Series of pandas,
            whose index and names stay.
        features: ``(N, d)`` for calibrators that need them.
        input: ``"logits"`` (default) or ``"probs"``.

    Returns:
        Calibrated probabilities, of the kind and shape of the scores.

    Raises:
        ValueError: The calibrator was fitted to another number of classes, the scores are invalid, or they look like
            probabilities and are not said to be.
        TypeError: A dtype is not allowed, or the calibrator is neither a calibrator nor a file.
        OSError: The file cannot be read.

    Example:
        >>> from calib_lightning.posthoc import FixedTemperature
        >>> halved = FixedTemperature(2.0).fit(torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> apply_calibrator(halved, torch.tensor([[0.9, 0.1]]), input="probs")
        tensor([[0.7500, 0.2500]])
    """
    found = unlabelled(scores, Reading(input=input))
    if features is not None:
        found = found._replace(features=torch.as_tensor(np.asarray(features)))
    after = _applied(calibrator, found).scores.exp()
    if len(np.shape(scores)) == 1:
        after = after[:, 1]
    elif np.shape(scores)[1] == 1:
        after = after[:, 1:]
    if isinstance(scores, Tensor):
        return after.to(scores.device)
    columns, index = getattr(scores, "columns", None), getattr(scores, "index", None)
    values = after.numpy()
    if index is None or callable(index):  # a list has a method of this name
        return values
    if columns is None:
        return type(scores)(values, index=index, name=scores.name)
    order, _ = classes_of([str(name) for name in columns], "scores")
    return type(scores)(values[:, np.argsort(order)], index=index, columns=columns)


def apply_to_file(
    calibrator: Calibrator | str | Path, path: str | Path, output: str | Path, reading: Reading | None = None
) -> Predictions:
    """Write a file again with calibrated probabilities in place of its scores; all else stays.

    Args:
        calibrator: A fitted calibrator, or its file.
        path: A file of scores; labels are not needed.
        output: The file to write: ``.csv`` for a CSV file, with its columns; ``.npz`` for others, with ``probs``
            in place of scores of either kind.
            `score` reads both with ``input="probs"``.
        reading: Kind of the scores, and names of the arrays.

    Returns:
        The rows with calibrated log-probabilities.

    Raises:
        ValueError: A file is invalid, the output has another suffix or is an input, or the calibrator does not fit.
        OSError: A file cannot be read or written.

    Example:
        ``apply_to_file("calibrated/Temperature.pt", "new.csv", "calibrated.csv", Reading(input="probs"))``
    """
    path, output, reading = Path(path), Path(output), reading or Reading()
    suffix = ".csv" if path.suffix.lower() == ".csv" else ".npz"
    if output.suffix.lower() != suffix:
        raise ValueError(f"output is {output}; for {path.name} its suffix must be {suffix}. Rename it.")
    given = [path] if isinstance(calibrator, Calibrator) else [path, Path(calibrator)]
    check_output_file(output, "output", given)
    stored = Stored(path, reading, "scores")
    after = _applied(calibrator, unlabelled(path, reading), reading)
    if stored.columns is not None:
        text = _csv_again(path, stored.columns, after)
        write_whole(output, lambda file: file.write(text.encode()))
    else:
        arrays = stored.others(reading.scores_key or reading.kind) | {"probs": after.scores.exp().numpy()}
        if after.confidence is not None:
            arrays["confidence"] = after.confidence.numpy()
        write_whole(output, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # no name is allow_pickle
    return after


def _applied(calibrator: Calibrator | str | Path, found: Predictions, reading: Reading | None = None) -> Predictions:
    if not isinstance(calibrator, Calibrator | str | Path):
        raise TypeError(f"calibrator is {calibrator!r:.200}; it must be a fitted calibrator or a file. Give one.")
    file = None if isinstance(calibrator, Calibrator) else Path(calibrator)
    loaded = calibrator if isinstance(calibrator, Calibrator) else load_calibrator(calibrator)
    if "network" in loaded.needs:
        raise ValueError(
            f"{file or loaded.name}: {loaded.name} needs the network and its images. Use CalibratedClassifier."
        )
    if "features" in loaded.needs:
        found = with_features(found, reading)
    return apply(loaded, found, file=file)


def _csv_again(path: Path, columns: Columns, after: Predictions) -> str:
    """The text of a CSV file with calibrated probabilities, and the calibrator's confidence if it has its own."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter=delimiter_of(path)) if any(cell.strip() for cell in row)]
    header = rows[0] if columns.header else None
    rows = rows[1:] if columns.header else rows
    probs = after.scores.exp()
    probs = probs[:, 1:] if len(columns.scores) == 1 else probs
    confidence = probs.amax(dim=1) if after.confidence is None else after.confidence
    place = columns.confidence
    if header is not None and place is None and after.confidence is not None:
        place = len(header)
        header.append("confidence")
    if header is not None and len(columns.scores) == 1 and header[columns.scores[0]].strip() == "z":
        header[columns.scores[0]] = PROBABILITY[0]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([] if header is None else [header])
    for row, values, own in zip(rows, probs.tolist(), confidence.tolist(), strict=True):
        row += [""] * (place is not None and place == len(row))
        for column, value in zip(columns.scores, values, strict=True):
            row[column] = repr(value)
        if place is not None:
            row[place] = repr(own)
        writer.writerow(row)
    return buffer.getvalue()
