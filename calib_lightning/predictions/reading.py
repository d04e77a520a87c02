"""Read and check the predictions of a set, from files or tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calib_lightning.functional import binary_labels, two_columns
from calib_lightning.metrics.functional.checks import InputKind, check_shapes, check_values, seem_probs
from calib_lightning.metrics.functional.proper import check_soft_labels, check_soft_values
from calib_lightning.posthoc.evidence import as_logits, as_rows
from calib_lightning.predictions.class_names import check_columns, named_columns, numbered
from calib_lightning.predictions.files import Stored
from calib_lightning.predictions.settings import Reading


class Origin(NamedTuple):
    """Source of predictions: files (scores, then separate labels), K class names, notes, and applied calibrator."""

    files: tuple[Path, ...] = ()
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    calibrator: str = ""
    calibrator_file: Path | None = None

    @property
    def file(self) -> Path | None:
        """The file of the scores, or ``None``."""
        return self.files[0] if self.files else None


class Predictions(NamedTuple):
    """Predictions and labels of a set.

    Attributes:
        scores: Logits or probabilities ``(N, K)``, floating point.
        labels: ``(N,)`` int64 in ``0..K-1``.
        confidence: ``(N,)`` in ``[0, 1]`` if it is not the largest probability, or ``None``.
        input: Kind of the scores.
        label_distribution: Class distribution of each row ``(N, K)``, such as the votes of annotators, or ``None``.
        features: ``(N, d)``, for calibrators that need them, or ``None``.
        origin: Source: files, class names and applied calibrator.
    """

    scores: Tensor
    labels: Tensor
    confidence: Tensor | None = None
    input: InputKind = "logits"
    label_distribution: Tensor | None = None
    features: Tensor | None = None
    origin: Origin = Origin()

    @property
    def logits(self) -> Tensor:
        """Logits ``(N, K)``; probabilities are converted."""
        return self.scores if self.input == "logits" else as_logits(self.scores)

    @property
    def where(self) -> str:
        """Their name in messages."""
        return "predictions" if self.origin.file is None else str(self.origin.file)


REPLACED_CONFIDENCE = "the confidence in the file is replaced by that of the calibrated logits"
"""Note on calibrated predictions whose file has its own confidence."""

_ARRAYS = ("scores", "labels", "confidence", "label_distribution", "features")

PredictionsLike = Predictions | str | Path | tuple[Any, ...]
"""Predictions, their file, or a tuple of scores ``(N, K)``, labels ``(N,)`` and, optionally, features ``(N, d)``."""


def read_predictions(
    path: str | Path, reading: Reading | None = None, labels_path: str | Path | None = None
) -> Predictions:
    """Read and check one file.

    Args:
        path: A ``.npz``, ``.npy``, ``.pt``, ``.pth`` or ``.csv`` file.
        reading: Kind of the scores, and names of the arrays.
        labels_path: File of the labels, if ``path`` does not contain them.

    Returns:
        The predictions.

    Raises:
        ValueError: The file is damaged, an array is missing, or a shape or value is invalid.
        TypeError: A dtype is not allowed.
        OSError: The file cannot be read.

    Example:
        ``read_predictions("probs.csv", calib_lightning.predictions.Reading(input="probs"))``
    """
    path, reading = Path(path), reading or Reading()
    labels_path = None if labels_path is None else Path(labels_path)
    stored = Stored(path, reading, "scores and labels" if labels_path is None else "scores")
    scores = stored.scores
    given = stored.labels if labels_path is None else Stored(labels_path, reading, "labels").only_labels
    labels, names = numbered(given, stored.class_names, str(labels_path or path))
    found = Predictions(
        scores, labels, stored.optional("confidence"), reading.kind, stored.optional("label_distribution")
    )
    files = (path,) if labels_path is None else (path, labels_path)
    origin = Origin(files, names, (stored.columns.note,) if stored.columns is not None and stored.columns.note else ())
    columns = stored.columns is not None and len(stored.columns.scores) > 1
    return _plausible(_checked(found, origin, str(labels_path or path)), reading, columns)


def predictions_of(source: PredictionsLike, reading: Reading | None = None) -> Predictions:
    """Checked predictions from any `PredictionsLike`."""
    if isinstance(source, Predictions):
        if source.origin != Origin():  # read from a file or calibrated: checked before
            return source
        arrays = {name: getattr(source, name) for name in _ARRAYS}
        tensors: dict[str, Any] = {
            name: as_rows(part, name).detach().cpu() for name, part in arrays.items() if part is not None
        }
        return _checked(source._replace(**tensors), Origin(), "predictions")
    if isinstance(source, str | Path):
        return read_predictions(source, reading)
    if not isinstance(source, tuple) or len(source) not in (2, 3):
        raise TypeError(
            f"predictions are {source!r:.100}; they must be a file, Predictions, or a tuple (scores, labels)."
        )
    if isinstance(source[0], str | Path) and isinstance(source[1], str | Path):
        return read_predictions(source[0], reading, source[1])
    columns = hasattr(source[0], "columns") and np.shape(source[0])[1:] != (1,)
    if isinstance(source[0], str | Path):  # scores in a file, labels in memory
        stored = Stored(Path(source[0]), reading or Reading(), "scores")
        given, names = stored.scores, stored.class_names
    else:
        given, names = named_columns(source[0], "predictions")
    labels, names = numbered(source[1], names, "predictions")
    parts = zip(("predictions: scores", "predictions: labels", "features"), (given, labels, *source[2:]), strict=False)
    scores, labels, *features = (as_rows(part, what).detach().cpu() for what, part in parts)
    found = Predictions(scores, labels, input=(reading or Reading()).kind, features=features[0] if features else None)
    return _plausible(_checked(found, Origin(class_names=names), "predictions"), reading, columns)


def with_features(predictions: Predictions, reading: Reading | None = None) -> Predictions:
    """The set with features ``(N, d)``: those that it has, or those in its file."""
    name, path, rows = (reading or Reading()).features_key, predictions.origin.file, len(predictions.labels)
    features, where = predictions.features, f"{predictions.where}: {name!r}"
    if features is None and path is None:
        raise ValueError("the predictions have no features. Give a tuple (scores, labels, features).")
    if features is None and path is not None:
        allowed = Reading() if reading is None else Reading(max_gb=reading.max_gb)
        features = Stored(path, allowed, "scores").array(name, "features_key")
        _check_dense(features, where)
    assert features is not None
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(
            f"{where} has shape {tuple(features.shape)}; it must have shape ({rows}, d), with one row of features for "
            "each row of scores."
        )
    if not features.is_floating_point():
        raise TypeError(f"{where} is {features.dtype}; it must be floating point. Convert it to float32.")
    return predictions._replace(features=features)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name sets by file stem, with as many parent folders as distinguish equal stems.

    Files with the same stem in a folder keep their suffixes. A file that is given twice is a ``ValueError``.
    """
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise ValueError(f"{path} is given {resolved.count(path)} times; it must be given once.")
    bases = [path.with_suffix("") for path in resolved]
    shared = {path.stem for path, base in zip(paths, bases, strict=True) if bases.count(base) > 1}
    names = [path.name if path.stem in shared else path.stem for path in paths]
    for depth in range(2, max((len(path.parts) for path in resolved), default=0) + 1):
        again = [names.count(name) > 1 for name in names]
        ends = [path if path.stem in shared else base for path, base in zip(resolved, bases, strict=True)]
        longer = ["/".join(end.parts[-depth:]).lstrip("/") for end in ends]
        names = [new if twice else name for name, new, twice in zip(names, longer, again, strict=True)]
    return [name if names.count(name) == 1 else name + path.suffix for name, path in zip(names, paths, strict=True)]


def named(
    sources: PredictionsLike | Sequence[PredictionsLike] | Mapping[str, PredictionsLike], reading: Reading | None = None
) -> dict[str, Predictions]:
    """Read sets; names are the keys, the names of files, or ``set`` or ``set-1``, ``set-2``, ... for tensors."""
    if isinstance(sources, Mapping):
        return {name: predictions_of(source, reading) for name, source in sources.items()}
    single = isinstance(sources, str | Path | Predictions | tuple)
    some: list[Any] = [sources] if single else list(sources)  # type: ignore[arg-type]
    if not some:
        raise ValueError("predictions are empty; give at least one set")
    read = [predictions_of(source, reading) for source in some]
    files = [found.origin.file for found in read if found.origin.file is not None]
    names = iter(unique_names(files))
    taken = unique_names(files)
    made = ["set"] if len(read) - len(files) == 1 else [f"set-{i + 1}" for i in range(len(read))]
    others = iter([name if name not in taken else f"{name} (tensors)" for name in made])
    return {next(others if found.origin.file is None else names): found for found in read}


def input_notes(predictions: Predictions) -> Iterator[str]:
    """Remarks on a set, without full stops."""
    yield from predictions.origin.notes
    if predictions.input == "logits" and seem_probs(predictions.scores) and not predictions.origin.calibrator:
        yield (
            "all scores are in [0, 1] and each row sums to 1, but they are taken for logits; if they are "
            "probabilities, set input=probs"
        )


def _plausible(found: Predictions, reading: Reading | None, columns: bool) -> Predictions:
    """Refuse scores that look like probabilities and are logits by default, and named columns that are no scores."""
    if (reading is None or reading.input is None) and found.input == "logits" and seem_probs(found.scores):
        raise ValueError(
            f"{found.where}: all scores are in [0, 1] and each row sums to 1, so they look like probabilities, but "
            "they are taken for logits. Set input=probs, or input=logits if they are logits."
        )
    origin = found.origin
    notes = check_columns(found.scores, found.labels, origin.class_names, found.where) if columns else ()
    return found._replace(origin=origin._replace(notes=(*notes, *origin.notes)))


def _checked(found: Predictions, origin: Origin, labels_where: str) -> Predictions:
    where = "predictions" if origin.file is None else str(origin.file)
    scores, confidence = found.scores, found.confidence
    _check_dense(scores, f"{where}: scores")
    if confidence is not None:
        _check_dense(confidence, f"{where}: confidence")
        confidence = confidence.reshape(-1) if confidence.shape[1:] == (1,) else confidence
    _check_dense(found.labels, f"{labels_where}: labels")
    labels = found.labels
    if scores.ndim == 1 or scores.shape[1:] == (1,):  # of class 1 of two
        p = scores.reshape(-1)
        if found.input == "logits" and len(p) and bool(((p >= 0) & (p <= 1)).all()):
            raise ValueError(
                f"{where}: scores are one column of values in [0, 1]; for logits of class 1 that is not plausible. Set "
                "input=probs if they are its probabilities, or give the logits as two columns, 0 and z."
            )
        scores = torch.stack([1 - p, p], dim=1) if found.input == "probs" else two_columns(scores)
        labels = binary_labels(labels)
    labels = _hard_labels(labels, labels_where)
    if scores.ndim == 2 and len(scores) != len(labels):
        inside = "" if labels_where == where else f" in {labels_where}"
        raise ValueError(
            f"{where}: there are {len(scores)} rows of scores but {len(labels)} labels{inside}; there must be one "
            "label for each row."
        )
    check_shapes(scores, labels, confidence, where)
    if len(labels) == 0:
        raise ValueError(f"{where} has no rows; it must have at least one. Give the rows of a set.")
    check_values(scores, labels, confidence, found.input, where)
    names = _checked_names(origin.class_names, scores.shape[1], where)
    if found.label_distribution is not None:
        what = f"{where}: label_distribution"
        _check_dense(found.label_distribution, what)
        check_soft_labels(scores, found.label_distribution, what)
        check_soft_values(found.label_distribution, what)
    return found._replace(
        scores=scores, labels=labels, confidence=confidence, origin=origin._replace(class_names=names)
    )


def _checked_names(names: Any, classes: int, where: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}: class_names are {reprlib.repr(names)}; they must be {classes} strings, one for each class in "
            "the order of the scores."
        )
    return tuple(names)


def _check_dense(tensor: Tensor, what: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(
            f"{what} is a {kind} tensor; it must be dense. Save tensor.to_dense(), or .dequantize() if quantized."
        )


def _hard_labels(labels: Tensor, where: str) -> Tensor:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim != 1:
        raise ValueError(
            f"{where}: labels have shape {tuple(labels.shape)}; they must be class numbers (N,) or (N, 1). Save the "
            "argmax of one-hot or soft labels."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"{where}: labels are {labels.dtype}; they must be class numbers of an integer dtype. Save integers."
        )
    return labels.long()
