"""From checked predictions to the figures of a report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from calib_lightning.commands.score_arguments import FigureOptions, Options
from calib_lightning.metrics import (
    CORE,
    FULL,
    METRICS,
    SOFT,
    Difference,
    EvaluationState,
    GroupTable,
    Interval,
    SoftLabelScores,
    Spread,
    bootstrap_intervals,
    by_class,
    by_frequency,
    over_seeds,
    permutation_test,
)
from calib_lightning.metrics.functional.rows import seem_probs
from calib_lightning.metrics.functional.undefined import why_undefined
from calib_lightning.posthoc import Calibrator, as_logits, load_calibrator
from calib_lightning.predictions.reading import Names, Predictions, read_counts, read_features, read_predictions

REPLACED_CONFIDENCE = "the file has a confidence of its own, in whose place stands that of the calibrated logits"
"""What is said of a file whose method brings its own confidence, once it is calibrated."""

_ROWS_AT_ONCE = 8192
_MOST_CLASSES_OF_OVO = 200
_ORDER = {key: place for place, key in enumerate([*FULL, *SOFT])}

T = TypeVar("T")


class Groups(NamedTuple):
    """Figures of groups of rows.

    Attributes:
        table: The groups that were asked for.
        worst: For each metric the worst class, its name and value; metrics that only describe have none.
    """

    table: GroupTable
    worst: dict[str, tuple[str, float]]


class Figures(NamedTuple):
    """The figures of a set; a key has ``@M`` behind it where several numbers of bins were asked for.

    Attributes:
        values: The figures; nan where they are not defined.
        intervals: Their intervals, empty if they were not asked for.
        differences: Differences to the other run, empty if there is none.
    """

    values: dict[str, float]
    intervals: dict[str, Interval]
    differences: dict[str, Difference]


class SetReport(NamedTuple):
    """What was found about one file.

    Attributes:
        name: Name of the set.
        path: The file.
        predictions: What it holds.
        figures: The figures of the set.
        groups: Figures of groups, or ``None``.
        notes: What a reader of the figures should know.
    """

    name: str
    path: Path
    predictions: Predictions
    figures: Figures
    groups: Groups | None
    notes: list[str]


class Report(NamedTuple):
    """Everything that one command found.

    Attributes:
        sets: One entry a file.
        spreads: Mean and deviation of each figure over the files, empty if they are not runs of one method.
        notes: The notes of all sets.
        calibrator: Name of the calibrator that was applied, or ``None``.
    """

    sets: list[SetReport]
    spreads: dict[str, Spread]
    notes: list[str]
    calibrator: str | None


def selected_metrics(which: str | None, classes: int) -> tuple[str, ...]:
    """Turn ``--metrics`` into keys, in the order of a report; those of `SOFT` are allowed, but left out.

    Args:
        which: ``core``, ``all``, keys with commas between them, or ``None`` for all that are cheap.
        classes: Number of classes K.

    Returns:
        The keys.

    Raises:
        ValueError: An unknown key.
    """
    which_or_all = "all" if which is None else which
    wanted = {"core": CORE, "all": FULL}.get(which_or_all) or tuple(filter(None, which_or_all.split(",")))
    unknown = [key for key in wanted if key not in METRICS and key not in SOFT]
    if unknown or not wanted:
        raise ValueError(
            f"--metrics: unknown {', '.join(map(repr, unknown)) or repr(which)}; allowed: core, all, or some of "
            f"{', '.join([*FULL, *SOFT])}"
        )
    if which is None and classes > _MOST_CLASSES_OF_OVO:
        wanted = tuple(key for key in wanted if key != "ovo_auroc")
    return tuple(sorted(set(wanted) - SOFT.keys(), key=_ORDER.__getitem__))


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name sets after their files: the stem, with as many folders before it as tell equal stems apart.

    Files of one folder with the same stem keep their suffixes.

    Args:
        paths: The files.

    Returns:
        One name a file.

    Raises:
        ValueError: A file is given twice.
    """
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise ValueError(f"{path}: the file is given {resolved.count(path)} times; give it once")
    bases = [path.with_suffix("") for path in resolved]
    shared = {path.stem for path, base in zip(paths, bases, strict=True) if bases.count(base) > 1}
    names = [path.name if path.stem in shared else path.stem for path in paths]
    for depth in range(2, max(len(path.parts) for path in resolved) + 1):
        again = [names.count(name) > 1 for name in names]
        ends = [path if path.stem in shared else base for path, base in zip(resolved, bases, strict=True)]
        longer = ["/".join(end.parts[-depth:]).lstrip("/") for end in ends]
        names = [new if twice else name for name, new, twice in zip(names, longer, again, strict=True)]
    return [name if names.count(name) == 1 else name + path.suffix for name, path in zip(names, paths, strict=True)]


def score(options: Options) -> Report:
    """Do what a command line of ``calib score`` asks for.

    Args:
        options: The command line.

    Returns:
        The report.

    Raises:
        ValueError: A fault of a file; see `read_predictions`.
        TypeError: As above.
        OSError: A file cannot be read.
    """
    names = unique_names(options.files)
    labels: list[Path | None] = list(options.labels) or [None]
    labels = labels * len(options.files) if len(labels) == 1 else labels
    # Everything is read before anything is computed: a fault of the last file should not cost the work on the others.
    calibrator = None if options.calibrator is None else load_calibrator(options.calibrator)
    inputs = _read(options, labels, calibrator)
    sets = [_score_file(options, *entry) for entry in zip(names, options.files, inputs, strict=True)]
    spreads = {}
    if options.seeds:
        for key in dict.fromkeys(key for entry in sets for key in entry.figures.values):
            spreads[key] = over_seeds([entry.figures.values.get(key, math.nan) for entry in sets], options.level)
    notes = list(dict.fromkeys(note for entry in sets for note in entry.notes))
    return Report(sets, spreads, notes, None if calibrator is None else calibrator.name)


class _Inputs(NamedTuple):
    """All that was read for one file: what is scored, the other run, the images of each class, and remarks."""

    predictions: Predictions
    other: Predictions | None
    counts: torch.Tensor | None
    notes: list[str]


def _read(options: Options, labels: Sequence[Path | None], calibrator: Calibrator | None) -> list[_Inputs]:
    names = Names(options.scores_key, options.labels_key)
    others: dict[Path | None, Predictions] = {}
    inputs = []
    for path, labels_path in zip(options.files, labels, strict=True):
        predictions = read_predictions(path, options.input, names, labels_path)
        if options.compare is not None:
            if labels_path not in others:
                others[labels_path] = read_predictions(options.compare, options.input, names, labels_path)
            _check_same_samples(path, options.compare, predictions, others[labels_path])
        other, scores = others.get(labels_path), predictions.scores
        counts = None if options.train_counts is None else read_counts(options.train_counts, scores.shape[1])
        notes = list(input_notes(predictions))
        if calibrator is not None:
            check_fits(calibrator, scores, f"{path} and {options.calibrator}")
            features = read_features(path, options.features_key, len(scores)) if calibrator.needs_features else None
            notes += [] if predictions.confidence is None else [REPLACED_CONFIDENCE]
            predictions = calibrated(calibrator, with_logits(predictions), features)
            other = None if other is None else with_logits(other)
        elif predictions.confidence is not None:
            notes.append("the confidence is the one in the file, not the largest probability")
        inputs.append(_Inputs(predictions, other, counts, notes))
    return inputs


def with_logits(predictions: Predictions) -> Predictions:
    """Turn probabilities into logits, as calibrators need them.

    Args:
        predictions: Logits or probabilities.

    Returns:
        Logits; the same object if they were.
    """
    if predictions.input == "logits":
        return predictions
    return predictions._replace(scores=as_logits(predictions.scores), input="logits")


def check_fits(calibrator: Calibrator, scores: torch.Tensor, where: str) -> None:
    """Refuse scores of another number of classes than the calibrator was fitted to.

    Args:
        calibrator: A fitted calibrator.
        scores: ``(N, K)``.
        where: Names both, for the message.

    Raises:
        ValueError: K differs.
    """
    if scores.shape[1] != calibrator.num_classes:
        raise ValueError(
            f"{where} do not belong together: the scores have {scores.shape[1]} classes, but {calibrator.name} was "
            f"fitted to {calibrator.num_classes}; give logits of the network that it was fitted for"
        )


def calibrated(calibrator: Calibrator, predictions: Predictions, features: torch.Tensor | None) -> Predictions:
    """Apply a calibrator to a set.

    Args:
        calibrator: A fitted calibrator.
        predictions: Logits; see `with_logits`.
        features: ``(N, d)`` for calibrators that need them.

    Returns:
        Its log-probabilities as logits, and its confidence where it has one of its own.
    """
    logits, confidences = [], []
    with torch.no_grad():
        for start in range(0, max(1, len(predictions.scores)), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            found = calibrator.predict(predictions.scores[rows], None if features is None else features[rows])
            logits.append(found.logits)
            confidences += [] if found.confidence is None else [found.confidence]
    confidence = torch.cat(confidences) if confidences else None
    return predictions._replace(scores=torch.cat(logits), confidence=confidence)


def _score_file(options: Options, name: str, path: Path, inputs: _Inputs) -> SetReport:
    predictions, other, counts, notes = inputs
    details = options.intervals is not None or options.compare is not None or options.groups is not None
    states = states_of(options, predictions, details)
    figures, warned = figures_of(options, states, predictions)
    with warnings_as_notes(warned):
        groups = _groups(options, predictions, counts)
    if other is not None:
        others = states_of(options, other, details)
        differences = {
            behind: permutation_test(state, others[behind], seed=options.seed) for behind, state in states.items()
        }
        figures = figures._replace(differences=_merged(differences))
    if options.metrics is None and predictions.scores.shape[1] > _MOST_CLASSES_OF_OVO:
        notes = [*notes, f"ovo_auroc is left out for more than {_MOST_CLASSES_OF_OVO} classes; --metrics all has it"]
    notes = [*notes, *value_notes(predictions, figures.values), *warned]
    return SetReport(name, path, predictions, figures, groups, [f"{name}: {note}" for note in dict.fromkeys(notes)])


def states_of(options: FigureOptions, predictions: Predictions, details: bool) -> dict[str, EvaluationState]:
    """Read a set into the states of its metrics.

    Args:
        options: Metrics and numbers of bins.
        predictions: The set.
        details: Whether the states keep the rows, as intervals need them.

    Returns:
        One state for each number of bins, by what stands behind its keys, and one for what needs no bins.
    """
    metrics = selected_metrics(options.metrics, predictions.scores.shape[1])
    if len(options.bins) == 1:
        return {"": _filled(predictions, metrics, options.bins[0], details)}
    plain, binned = ([key for key in metrics if METRICS[key].binned == wanted] for wanted in (False, True))
    states = {f"@{bins}": _filled(predictions, binned, bins, details) for bins in options.bins if binned}
    return states | ({"": _filled(predictions, plain, options.bins[0], details)} if plain else {})


def figures_of(
    options: FigureOptions, states: Mapping[str, EvaluationState], predictions: Predictions
) -> tuple[Figures, list[str]]:
    """Compute the figures of a set and, if they are asked for, their intervals; those of `SOFT` have none.

    Args:
        options: Metrics, number of resamples, level and seed.
        states: Of `states_of`.
        predictions: The set.

    Returns:
        The figures, without differences, and what metrics warned of.

    Raises:
        ValueError: A metric needs the distributions of labels, and there are none.
    """
    warned: list[str] = []
    intervals: dict[str, Interval] = {}
    with warnings_as_notes(warned):
        values = _merged({behind: state.compute() for behind, state in states.items()})
        values |= _soft_values(options, predictions)
        if options.intervals is not None:
            draw = (options.intervals, options.level, options.seed)
            intervals = _merged({behind: bootstrap_intervals(state, *draw) for behind, state in states.items()})
    return Figures({key: float(value) for key, value in values.items()}, intervals, {}), warned


def _soft_values(options: FigureOptions, predictions: Predictions) -> dict[str, torch.Tensor]:
    asked = (options.metrics or "all").split(",")
    named = [key for key in SOFT if key in asked]
    if predictions.label_distribution is None:
        if named:
            raise ValueError(
                f"--metrics: {', '.join(named)} needs an array 'label_distribution' (N, K) in each file: shares of the "
                "classes, such as people's votes"
            )
        return {}
    scores = SoftLabelScores(input=predictions.input)
    scores.update(predictions.scores, predictions.label_distribution)
    return {key: value for key, value in scores.compute().items() if key in named or asked[0] in ("all", "core")}


def _filled(predictions: Predictions, metrics: Sequence[str], n_bins: int, details: bool) -> EvaluationState:
    scores, labels, confidence = predictions[:3]
    state = EvaluationState(metrics, n_bins, details=details, input=predictions.input)
    for start in range(0, max(1, len(labels)), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        state.update(scores[rows], labels[rows], None if confidence is None else confidence[rows])
    return state


def _merged(found: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    named = {key + behind: value for behind, values in found.items() for key, value in values.items()}
    return dict(sorted(named.items(), key=lambda item: _ORDER[item[0].partition("@")[0]]))


def _groups(options: Options, predictions: Predictions, counts: torch.Tensor | None) -> Groups | None:
    if options.groups is None:
        return None
    classes = predictions.scores.shape[1]
    # What needs all scores of a row is a statement about all classes together.
    metrics = [key for key in selected_metrics(options.metrics, classes) if "scores" not in METRICS[key].parts]
    state = _filled(predictions, metrics, options.bins[0], details=True)
    of_classes = by_class(state)
    worst = {key: of_classes.worst(key) for key in metrics if METRICS[key].better != "none"}
    return Groups(of_classes if counts is None else by_frequency(state, counts), worst)


def _check_same_samples(path: Path, other_path: Path, one: Predictions, other: Predictions) -> None:
    if one.scores.shape != other.scores.shape or not torch.equal(one.labels, other.labels):
        raise ValueError(
            f"{path} and {other_path} (--compare) must hold the same samples in the same order: scores of shape "
            f"{tuple(one.scores.shape)} and {tuple(other.scores.shape)}"
            + ("" if one.scores.shape != other.scores.shape else ", but their labels differ")
        )


@contextmanager
def warnings_as_notes(notes: list[str]) -> Iterator[None]:
    """Turn warnings of our own into notes, but for those of undefined values, which `value_notes` says at once.

    Args:
        notes: Gets the notes.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if not issubclass(warning.category, UserWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif not str(warning.message).endswith(" nan"):
            notes.append(str(warning.message))


def input_notes(predictions: Predictions) -> Iterator[str]:
    """Say what a reader should know about a file.

    Args:
        predictions: As they were read.

    Yields:
        Sentences without a full stop.
    """
    if predictions.columns:
        yield predictions.columns
    if predictions.input == "logits" and seem_probs(predictions.scores):
        yield (
            "all scores lie in [0, 1] and each row sums to 1, and they are taken for logits; if they are "
            "probabilities, say --input probs"
        )


def value_notes(predictions: Predictions, values: Mapping[str, float]) -> Iterator[str]:
    """Say which figures of a set are infinite or not defined, and why.

    Args:
        predictions: The set.
        values: Its figures.

    Yields:
        Sentences without a full stop.
    """
    scores, labels = predictions[:2]
    infinite = [key for key, value in values.items() if math.isinf(value)]
    if infinite:
        yield f"{', '.join(infinite)} infinite: a label has probability 0"
    undefined = [key for key, value in values.items() if math.isnan(value)]
    if undefined:
        correct = int((scores.argmax(dim=1) == labels).sum())
        names = "all metrics" if len(undefined) == len(values) else ", ".join(undefined)
        yield f"{names} undefined: {why_undefined(len(labels), correct)}"
