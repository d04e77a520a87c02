"""`score`: accuracy, calibration and refinement of predictions of any framework."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calib_lightning.metrics import (
    METRICS,
    by_class,
    by_frequency,
    over_seeds,
    permutation_test,
)
from calib_lightning.posthoc import Calibrator, Evidence
from calib_lightning.predictions.files import checked_counts
from calib_lightning.predictions.reading import Predictions, PredictionsLike, input_notes, named, predictions_of
from calib_lightning.predictions.score_report import Groups, ScoreReport, SetScores
from calib_lightning.predictions.settings import Reading, Settings
from calib_lightning.predictions.values import (
    MOST_CLASSES_OF_OVO,
    filled_state,
    merged,
    selected_metrics,
    states_of,
    value_notes,
    values_of,
    warnings_as_notes,
)

REPLACED_CONFIDENCE = "the confidence in the file is replaced by that of the calibrated logits"
"""What a note says about a file whose method brings its own confidence, once it is calibrated."""

_ROWS_AT_ONCE = 8192


def score(
    predictions: PredictionsLike | Sequence[PredictionsLike] | Mapping[str, PredictionsLike],
    labels: Any = None,
    *,
    reading: Reading | None = None,
    compare: PredictionsLike | Sequence[PredictionsLike] | None = None,
    groups: Literal["class"] | Tensor | Sequence[int] | None = None,
    seeds: bool = False,
    **settings: Any,
) -> ScoreReport:
    """Score predictions: accuracy, calibration and refinement, with intervals, groups and a paired comparison.

    Args:
        predictions: Scores ``(N, K)`` if ``labels`` are given; else one or several sets, each a file, `Predictions` or
            a pair (scores, labels), perhaps with their names as keys.
        labels: ``(N,)`` class numbers of the scores.
        reading: What the scores are (logits by default) and names of the arrays in files.
        compare: Another run on the same rows, or one for each set: differences to it, with the p-value of a paired
            permutation test.
        groups: ``"class"`` for the values of each class, or the number of training images of each class ``(K,)`` for
            those of frequent and rare classes.
        seeds: Whether the sets are runs of one method: mean and standard deviation over them.
        **settings: ``metrics``, ``bins``, ``intervals``, ``level`` and ``seed``; see `Settings`.

    Returns:
        The report, with ``values``, ``table()``, ``to_markdown()`` and ``to_json()``.

    Raises:
        ValueError: A wrong shape, an invalid value or an unknown metric.
        TypeError: A dtype that is not allowed.
        OSError: A file cannot be read.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> score(logits, torch.tensor([0, 1, 1]), metrics="accuracy,ece").values["accuracy"]
        0.6666666666666666
    """
    asked = Settings(**settings)
    selected_metrics(asked.metrics, classes=2)
    # Everything is read before anything is computed: a fault of the last file should not cost the work on the others.
    sets = named(predictions if labels is None else (predictions, labels), reading)
    others = _others(compare, sets, reading)
    counts = {name: _counts(groups, found) for name, found in sets.items()}
    scored = {name: _scored(asked, found, others.get(name), groups, counts[name]) for name, found in sets.items()}
    spreads = {}
    if seeds:
        if len(sets) < 2:
            raise ValueError("seeds is True; there must be two or more sets, one of each run. Give the other runs too.")
        for key in dict.fromkeys(key for entry in scored.values() for key in entry.values.values):
            found = [entry.values.values.get(key, math.nan) for entry in scored.values()]
            spreads[key] = over_seeds(found, asked.level)
    notes = [f"{name}: {note}" for name, entry in scored.items() for note in entry.notes]
    other = next(iter(others.values()), None)
    return ScoreReport(
        scored,
        asked,
        "logits" if reading is None else reading.input,
        spreads,
        "" if other is None else other.where,
        list(dict.fromkeys(notes)),
    )


def apply(
    calibrator: Calibrator, predictions: Predictions, evidence: Evidence | None = None, file: Path | None = None
) -> Predictions:
    """Apply a fitted calibrator to a set.

    Args:
        calibrator: The calibrator.
        predictions: The set.
        evidence: What the calibrator needs; the logits of the set by default.
        file: That of the calibrator, for reports.

    Returns:
        The set with its log-probabilities as logits, and its confidence where it has one of its own.

    Raises:
        ValueError: The calibrator was fitted to another number of classes, or needs more than was given.
    """
    evidence = evidence or Evidence(predictions.logits, predictions.features)
    classes = predictions.scores.shape[1]
    if calibrator.fitted and calibrator.num_classes not in (classes, -1):
        raise ValueError(
            f"{predictions.where} and {calibrator.name} do not belong together: the scores have {classes} classes, but "
            f"the calibrator was fitted to {calibrator.num_classes}; give logits of the network that it was fitted for"
        )
    with torch.no_grad():
        found = [calibrator.predict(*block) for block in evidence.blocks(_ROWS_AT_ONCE)]
    notes = [*input_notes(predictions), *([] if predictions.confidence is None else [REPLACED_CONFIDENCE])]
    confidences = [part.confidence.cpu() for part in found if part.confidence is not None]
    return predictions._replace(
        scores=torch.cat([part.logits.cpu() for part in found]),
        confidence=torch.cat(confidences) if confidences else None,
        input="logits",
        origin=predictions.origin._replace(notes=tuple(notes), calibrator=calibrator.name, calibrator_file=file),
    )


def _others(compare: Any, sets: Mapping[str, Predictions], reading: Reading | None) -> dict[str, Predictions]:
    """The other run of each set; they must have the same rows."""
    if compare is None:
        return {}
    single = not isinstance(compare, list)
    given = [predictions_of(other, reading) for other in ([compare] if single else compare)]
    if len(given) not in (1, len(sets)):
        raise ValueError(f"compare has {len(given)} runs for {len(sets)} sets; give one for all, or one for each.")
    others = dict(zip(sets, given * len(sets) if len(given) == 1 else given, strict=False))
    for name, found in sets.items():
        other = others[name]
        same_shape = found.scores.shape == other.scores.shape
        if not same_shape or not torch.equal(found.labels, other.labels):
            raise ValueError(
                f"{found.where} and {other.where} (compare) must hold the same samples in the same order: scores of "
                f"shape {tuple(found.scores.shape)} and {tuple(other.scores.shape)}"
                + (", but their labels differ" if same_shape else "")
            )
    return others


def _counts(groups: Any, predictions: Predictions) -> Tensor | None:
    if groups is None or (isinstance(groups, str) and groups == "class"):
        return None
    if isinstance(groups, str):
        raise ValueError(f"groups is {groups!r}; it must be 'class' or the training images of each class (K,).")
    return checked_counts(groups, predictions.scores.shape[1], "groups")


def _scored(
    settings: Settings, predictions: Predictions, other: Predictions | None, groups: Any, counts: Tensor | None
) -> SetScores:
    details = settings.intervals is not None or other is not None or groups is not None
    states = states_of(settings, predictions, details)
    values, warned = values_of(settings, states, predictions)
    with warnings_as_notes(warned):
        grouped = None if groups is None else _grouped(settings, predictions, counts)
    if other is not None:
        others = states_of(settings, other, details)
        found = {end: permutation_test(state, others[end], seed=settings.seed) for end, state in states.items()}
        values = values._replace(differences=merged(found))
    notes = list(input_notes(predictions))
    if predictions.confidence is not None and not predictions.origin.calibrator:
        notes.append("the confidence is the one in the file, not the largest probability")
    if settings.metrics is None and predictions.scores.shape[1] > MOST_CLASSES_OF_OVO:
        notes.append(f"ovo_auroc is left out for more than {MOST_CLASSES_OF_OVO} classes; metrics=all includes it")
    notes += [*value_notes(predictions, values.values), *warned]
    return SetScores(predictions, values, grouped, list(dict.fromkeys(notes)))


def _grouped(settings: Settings, predictions: Predictions, counts: Tensor | None) -> Groups:
    # What needs all scores of a row is a statement about all classes together.
    metrics = [
        key
        for key in selected_metrics(settings.metrics, predictions.scores.shape[1])
        if "scores" not in METRICS[key].parts
    ]
    state = filled_state(predictions, metrics, settings.bins[0], details=True)
    of_classes = by_class(state)
    worst = {key: of_classes.worst(key) for key in metrics if METRICS[key].better != "none"}
    if counts is None:
        return Groups("class", of_classes, worst)
    return Groups("frequency", by_frequency(state, counts), worst)
