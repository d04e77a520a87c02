"""Predictions of a set, from files or tensors, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calib_lightning.metrics.functional.proper import check_soft_labels, check_soft_values
from calib_lightning.metrics.functional.rows import InputKind, check_shapes, check_values, seem_probs
from calib_lightning.posthoc import as_logits
from calib_lightning.predictions.files import Stored
from calib_lightning.predictions.settings import Reading


class Origin(NamedTuple):
    """Where predictions come from.

    Attributes:
        files: The files of the scores and, where it is another, of the labels; none for tensors.
        class_names: K names in the order of the scores, ``None`` where they are not known.
        notes: What a reader should know: the columns of a CSV file, what a calibrator has replaced.
        calibrator: Name of the calibrator that was applied; empty where there is none.
        calibrator_file: Its file, ``None`` where there is none.
    """

    files: tuple[Path, ...] = ()
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    calibrator: str = ""
    calibrator_file: Path | None = None

    @property
    def file(self) -> Path | None:
        """The file of the scores."""
        return self.files[0] if self.files else None


class Predictions(NamedTuple):
    """What is known of the rows of a set.

    Attributes:
        scores: Logits or probabilities ``(N, K)``, floating point.
        labels: ``(N,)`` int64 in ``0..K-1``.
        confidence: ``(N,)`` in ``[0, 1]`` of a method that brings its own, or ``None``.
        input: What the scores are.
        label_distribution: Shares of the classes ``(N, K)``, such as people's votes, or ``None``.
        features: ``(N, d)``, for calibrators that need them, or ``None``.
        origin: Where they come from.
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
        """Logits ``(N, K)``, also of probabilities."""
        return self.scores if self.input == "logits" else as_logits(self.scores)

    @property
    def where(self) -> str:
        """What messages call them."""
        return "predictions" if self.origin.file is None else str(self.origin.file)


PredictionsLike = Predictions | str | Path | tuple[Any, ...]
"""Predictions, their file, or a tuple of scores ``(N, K)``, labels ``(N,)`` and perhaps features ``(N, d)``."""


def read_predictions(
    path: str | Path, reading: Reading | None = None, labels_path: str | Path | None = None
) -> Predictions:
    """Read and check one file.

    Args:
        path: A ``.npz``, ``.npy``, ``.pt``, ``.pth`` or ``.csv`` file.
        reading: What the scores are, and names of the arrays.
        labels_path: File of the labels, where ``path`` does not hold them.

    Returns:
        The predictions.

    Raises:
        ValueError: Names the file, what is wrong with it and what is allowed.
        TypeError: A dtype that is not allowed.
        OSError: The file cannot be read.

    Example:
        ``read_predictions("probs.csv", Reading(input="probs"))``
    """
    path, reading = Path(path), reading or Reading()
    labels_path = None if labels_path is None else Path(labels_path)
    stored = Stored(path, reading, "scores and labels" if labels_path is None else "scores")
    scores = stored.scores
    labels = stored.labels if labels_path is None else Stored(labels_path, reading, "labels").only_labels
    found = Predictions(
        scores, labels, stored.optional("confidence"), reading.input, stored.optional("label_distribution")
    )
    files = (path,) if labels_path is None else (path, labels_path)
    return _checked(
        found, Origin(files, stored.class_names, (stored.columns,) if stored.columns else ()), str(labels_path or path)
    )


def predictions_of(source: PredictionsLike, reading: Reading | None = None) -> Predictions:
    """Turn what a user has into checked predictions.

    Args:
        source: See `PredictionsLike`.
        reading: As in `read_predictions`; of a pair it says what the scores are.

    Returns:
        The predictions.

    Raises:
        ValueError: A wrong shape or an invalid value.
        TypeError: It is something else, or of a dtype that is not allowed.
        OSError: A file cannot be read.

    Example:
        >>> predictions_of(([[2.0, 0.0], [0.0, 1.0]], [0, 1])).scores.shape
        torch.Size([2, 2])
    """
    if isinstance(source, Predictions):
        return source
    if isinstance(source, str | Path):
        return read_predictions(source, reading)
    if not isinstance(source, tuple) or len(source) not in (2, 3):
        raise TypeError(
            f"predictions are {source!r:.100}; they must be a file, Predictions, or a tuple (scores, labels)"
        )
    scores, labels, *features = map(_as_tensor, source)
    found = Predictions(scores, labels, input=(reading or Reading()).input, features=features[0] if features else None)
    return _checked(found, Origin(), "predictions")


def with_features(predictions: Predictions, reading: Reading | None = None) -> Predictions:
    """Read the features that stand in a set's file beside the scores; features that it has already are kept.

    Args:
        predictions: The set.
        reading: The name of the features.

    Returns:
        The set with features ``(N, d)``.

    Raises:
        ValueError: There are none, or their shape is wrong.
        TypeError: They are not floating point.
        OSError: The file cannot be read.
    """
    name, path, rows = (reading or Reading()).features_key, predictions.origin.file, len(predictions.labels)
    features, where = predictions.features, f"{predictions.where}: {name!r}"
    if features is None and path is None:
        raise ValueError("the predictions have no features; give a tuple (scores, labels, features)")
    if features is None and path is not None:
        features = Stored(path, Reading(), "scores").array(name, "features_key")
        _check_dense(features, where)
    assert features is not None
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(
            f"{where} has shape {tuple(features.shape)}, allowed: ({rows}, d), one row of features for each row of "
            "scores"
        )
    if not features.is_floating_point():
        raise TypeError(f"{where} is {features.dtype}, allowed: features of a floating-point dtype")
    return predictions._replace(features=features)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name sets after their files: the stem, with as many folders before it as tell equal stems apart.

    Files of one folder with the same stem keep their suffixes. A file that is given twice is a ``ValueError``.
    """
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise ValueError(f"{path}: the file is given {resolved.count(path)} times; give it once")
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
    """Read sets and name them: by their keys, after their files, or ``set`` and ``set-1``, ``set-2``, ..."""
    if isinstance(sources, Mapping):
        return {name: predictions_of(source, reading) for name, source in sources.items()}
    single = isinstance(sources, str | Path | Predictions | tuple)
    some: list[Any] = [sources] if single else list(sources)  # type: ignore[arg-type]
    read = [predictions_of(source, reading) for source in some]
    files = [found.origin.file for found in read if found.origin.file is not None]
    names = iter(unique_names(files))
    others = iter(["set"] if len(read) - len(files) == 1 else [f"set-{i + 1}" for i in range(len(read))])
    return {next(others if found.origin.file is None else names): found for found in read}


def input_notes(predictions: Predictions) -> Iterator[str]:
    """Say what a reader should know about a set, in sentences without a full stop."""
    yield from predictions.origin.notes
    if predictions.input == "logits" and seem_probs(predictions.scores) and not predictions.origin.calibrator:
        yield (
            "all scores lie in [0, 1] and each row sums to 1, and they are taken for logits; if they are "
            "probabilities, say input=probs"
        )


def _as_tensor(part: Any) -> Tensor:
    """A tensor of what a user has; lists become float64, which torch would round to float32."""
    return part.detach() if isinstance(part, Tensor) else torch.as_tensor(np.asarray(part))


def _checked(found: Predictions, origin: Origin, labels_where: str) -> Predictions:
    where = "predictions" if origin.file is None else str(origin.file)
    scores, confidence = found.scores, found.confidence
    _check_dense(scores, f"{where}: scores")
    if confidence is not None:
        _check_dense(confidence, f"{where}: confidence")
        confidence = confidence.reshape(-1) if confidence.shape[1:] == (1,) else confidence
    _check_dense(found.labels, f"{labels_where}: labels")
    labels = _hard_labels(found.labels, labels_where)
    if scores.ndim == 1 or scores.shape[1:] == (1,):
        raise ValueError(
            f"{where}: scores have shape {tuple(scores.shape)}, allowed: (N, K) with a column for each of K >= 2 "
            "classes; a binary classifier with logit z has the columns 0 and z"
        )
    if scores.ndim == 2 and len(scores) != len(labels):
        inside = "" if labels_where == where else f" in {labels_where}"
        raise ValueError(
            f"{where}: {len(scores)} rows of scores but {len(labels)} labels{inside}; give one label for each row"
        )
    check_shapes(scores, labels, confidence, where)
    check_values(scores, labels, confidence, found.input, where)
    names = _checked_names(origin.class_names, scores.shape[1], where)
    if found.label_distribution is not None:
        what = f"{where}: label_distribution"
        _check_dense(found.label_distribution, what)
        check_soft_labels(scores, found.label_distribution, what)
        check_soft_values(found.label_distribution, what)
    return found._replace(labels=labels, confidence=confidence, origin=origin._replace(class_names=names))


def _checked_names(names: Any, classes: int, where: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list | tuple) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}: class_names are {names!r:.100}, allowed: {classes} strings, one for each class in the order of "
            "the scores"
        )
    return tuple(names)


def _check_dense(tensor: Tensor, what: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(
            f"{what} are a {kind} tensor, allowed: a dense one; save tensor.to_dense(), quantized .dequantize()"
        )


def _hard_labels(labels: Tensor, where: str) -> Tensor:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if labels.ndim != 1:
        raise ValueError(
            f"{where}: labels have shape {tuple(labels.shape)}, allowed: (N,) or (N, 1) class numbers; one-hot or soft "
            "labels are not scored: save their argmax"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"{where}: labels are {labels.dtype}, allowed: class numbers of an integer dtype; write them as integers"
        )
    return labels.long()
