"""`score`: accuracy, calibration and refinement of predictions from any framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calib_lightning.metrics import (
    METRICS,
    by_class,
    by_frequency,
    families,
    mean_values,
    permutation_test,
)
from calib_lightning.posthoc import Calibrator, Evidence
from calib_lightning.posthoc.base import ANY_CLASSES
from calib_lightning.predictions.class_names import same_classes
from calib_lightning.predictions.csv_header import quoted
from calib_lightning.predictions.files import checked_counts
from calib_lightning.predictions.inputs import files_of_run
from calib_lightning.predictions.others import corrupted_sets, once_each, ood_values, read_others, reference
from calib_lightning.predictions.reading import (
    REPLACED_CONFIDENCE,
    Predictions,
    PredictionsLike,
    input_notes,
    named,
    predictions_of,
)
from calib_lightning.predictions.score_report import Groups, ScoreReport, SetScores
from calib_lightning.predictions.seeds import groups_of_runs, spreads_of
from calib_lightning.predictions.settings import Reading, Settings, parted
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

_ROWS_AT_ONCE = 8192


def score(
    predictions: PredictionsLike | Sequence[PredictionsLike] | Mapping[str, PredictionsLike],
    labels: Any = None,
    *,
    compare: PredictionsLike | Sequence[PredictionsLike] | None = None,
    groups: Literal["class"] | Tensor | Sequence[int] | None = None,
    seeds: bool = False,
    ood: Any = None,
    **options: Any,
) -> ScoreReport:
    """Score predictions: accuracy, calibration and refinement, with intervals, groups and a paired comparison.

    Args:
        predictions: Scores ``(N, K)`` if ``labels`` are given; otherwise one or more sets, in a list or a dict by name.
            A set is a file, `Predictions` or a pair (scores, labels). The folder of a run stands for all its sets.
        labels: Class numbers ``(N,)`` of the scores.
        compare: Another run on the same rows, or one for each set; the report has the differences, with the p-value of
            a paired permutation test.
        groups: ``"class"`` for the values of each class, or the number of training images of each class ``(K,)`` for
            the values of frequent and rare classes.
        seeds: Whether the sets are runs with different seeds; the report has the mean and standard deviation over
            those of one method and data set.
        ood: Sets of other classes: files, scores ``(N, K)``, or a dict by name. The report has how well the confidence
            tells their rows from those of the set called "test", or of the first. A run has its own.
        **options: ``metrics``, ``bins``, ``intervals``, ``level`` and ``seed``, see `Settings`; ``input`` (``"probs"``
            for probabilities) and the names of arrays in files, see `Reading`.

    Returns:
        The report, with ``values``, ``table()``, ``to_markdown()`` and ``to_json()``.

    Raises:
        ValueError: A shape is wrong, a value is invalid or a metric is unknown.
        TypeError: A dtype is not allowed.
        OSError: A file cannot be read.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> score(logits, torch.tensor([0, 1, 1]), metrics="accuracy,ece").values["accuracy"]
        0.6666666666666666
    """
    asked, reading = parted(options)
    selected_metrics(asked.metrics, classes=2)
    # All files are read first, so that an invalid last one does not waste the computation for the others.
    sources: Any = predictions if labels is None else (predictions, labels)
    if labels is None and isinstance(predictions, str | Path) and Path(predictions).is_dir():
        sources, own = files_of_run(Path(predictions))
        ood = own if ood is None else ood
    sets = named(sources, reading)
    if not sets:
        raise ValueError(f"{predictions} has no predictions with labels. Test the network on a set with labels.")
    outside = {} if ood is None else read_others(ood, reading)
    others = _others(compare, sets, reading)
    counts = {name: _counts(groups, found) for name, found in sets.items()}
    of_corruptions = dataclasses.replace(asked, intervals=None)  # of a hundred sets the means matter
    corrupted = corrupted_sets(sets)
    scored = {
        name: _scored(of_corruptions, found, others.get(name), None, None)
        if name in corrupted
        else _scored(asked, found, others.get(name), groups, counts[name])
        for name, found in sets.items()
    }
    spreads = {}
    if seeds:
        if len(sets) < 2:
            raise ValueError("seeds is True; there must be two or more sets, one for each run. Give all runs.")
        members = groups_of_runs(sets)
        for group, names in members.items():
            spreads[group] = spreads_of({name: scored[name].values.values for name in names}, asked.level)
        for family in families(members):
            runs = list(zip(*(members[group] for group in family.members), strict=False))
            means = {str(run[0]): mean_values([scored[name].values.values for name in run]) for run in runs}
            spreads[f"{family.name}, mean of {len(family.members)} sets"] = spreads_of(means, asked.level)
    notes = once_each(((name, note) for name, entry in scored.items() for note in entry.notes), sets)
    told_from = reference(sets)
    told = ood_values(None if told_from is None else sets[told_from], outside, notes)
    kinds = sorted({found.input for found in sets.values()})
    compared = {name: other.where for name, other in others.items()}
    return ScoreReport(scored, asked, " and ".join(kinds), spreads, compared, list(dict.fromkeys(notes)), told)


def apply(
    calibrator: Calibrator, predictions: Predictions, evidence: Evidence | None = None, file: Path | None = None
) -> Predictions:
    """Apply a fitted calibrator to a set.

    Args:
        calibrator: The calibrator.
        predictions: The set.
        evidence: Inputs of the calibrator. Default: the logits and features of the set.
        file: File of the calibrator, for reports.

    Returns:
        The set with calibrated log-probabilities as logits, and a confidence if it is not the largest probability.

    Raises:
        ValueError: The calibrator was fitted to other classes or to another order of them, or needs other inputs.
    """
    evidence = evidence or Evidence(predictions.logits, predictions.features)
    classes = predictions.scores.shape[1]
    if calibrator.fitted and calibrator.num_classes not in (classes, ANY_CLASSES):
        raise ValueError(
            f"{predictions.where}: the scores have {classes} classes, but {calibrator.name} was fitted to "
            f"{calibrator.num_classes}. Give logits of the network that it was fitted for."
        )
    names, fitted_names = predictions.origin.class_names, calibrator.class_names
    if not same_classes(names, fitted_names):
        raise ValueError(
            f"{predictions.where}: the classes are {quoted(names or ())}; {calibrator.name} was fitted to "
            f"{quoted(fitted_names or ())}, in this order. Give the columns of scores in it."
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
    """The other run of each set, which must have the same rows."""
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
                f"{found.where} and {other.where} (compare) must have the same samples in the same order, but "
                + (
                    "their labels differ."
                    if same_shape
                    else f"their scores have shapes {tuple(found.scores.shape)} and {tuple(other.scores.shape)}."
                )
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
        notes.append("the confidence is from the file, not the largest probability")
    if settings.metrics is None and predictions.scores.shape[1] > MOST_CLASSES_OF_OVO:
        notes.append(f"ovo_auroc is omitted for more than {MOST_CLASSES_OF_OVO} classes; metrics=all includes it")
    notes += [*value_notes(predictions, values.values), *warned]
    return SetScores(predictions, values, grouped, list(dict.fromkeys(notes)))


def _grouped(settings: Settings, predictions: Predictions, counts: Tensor | None) -> Groups:
    # A metric that needs all scores of a row is about all classes together.
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
