"""Many sets in one report: images of other classes, told from the test set, and means over corruptions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from calib_lightning.metrics import OOD, OTHERS, OODDetection, families, mean_values
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.posthoc.evidence import as_rows
from calib_lightning.predictions.class_names import named_columns
from calib_lightning.predictions.files import Stored
from calib_lightning.predictions.reading import Origin, Predictions, predictions_of, unique_names
from calib_lightning.predictions.results import MEAN_OF_OTHERS, Line, lines_of
from calib_lightning.predictions.settings import Reading
from calib_lightning.predictions.tables import Entry, Grid, cell, heading
from calib_lightning.predictions.values import Values, warnings_as_notes

TEST = "test"


def reference(names: Iterable[str]) -> str | None:
    """The set from which images of other classes are told: ``test``, or the only one; ``None`` without."""
    every = list(names)
    return TEST if TEST in every else every[0] if len(every) == 1 else None


def read_others(sources: Any, reading: Reading | None = None) -> dict[str, Predictions]:
    """Read sets of other classes; their labels do not count, and may be missing.

    Args:
        sources: Files, `Predictions`, or scores ``(N, K)``; one, a list or a dict by name.
        reading: Kind of the scores, and names of the arrays.

    Returns:
        The sets by name.

    Raises:
        ValueError: A file is damaged, or a shape or value is invalid.
        TypeError: A dtype is not allowed.
        OSError: A file cannot be read.
    """
    if isinstance(sources, Mapping):
        return {name: unlabelled(source, reading) for name, source in sources.items()}
    single = isinstance(sources, str | Path | Predictions | tuple | torch.Tensor) or hasattr(sources, "__array__")
    found = [unlabelled(source, reading) for source in ([sources] if single else sources)]
    names = iter(unique_names([each.origin.file for each in found if each.origin.file is not None]))
    return {f"others-{i + 1}" if each.origin.file is None else next(names): each for i, each in enumerate(found)}


def unlabelled(source: Any, reading: Reading | None = None) -> Predictions:
    """Read one set without labels, which become -1: a file, `Predictions`, or scores ``(N, K)``."""
    origin = Origin()
    if isinstance(source, Predictions):
        return source
    if isinstance(source, str | Path):
        stored = Stored(Path(source), reading or Reading(), "scores")
        notes = () if stored.columns is None else (stored.columns.note,)
        source, origin = stored.scores, Origin((Path(source),), stored.class_names, notes)
    else:
        source = source[0] if isinstance(source, tuple) else source
        source, names = named_columns(source, "scores")
        source, origin = as_rows(source, "scores"), Origin(class_names=names)
        if source.ndim == 0:
            raise ValueError(f"scores are the number {source.item()}; they must have shape (N, K). Give rows.")
    found = predictions_of((source, torch.zeros(len(source), dtype=torch.int64)), reading)
    known = tuple(origin.class_names or ())
    names = known if len(known) == found.scores.shape[1] else None
    return found._replace(labels=found.labels - 1, origin=origin._replace(class_names=names))


def ood_values(
    test: Predictions | None, others: Mapping[str, Predictions], notes: list[str]
) -> dict[str, dict[str, float]]:
    """How well the confidence tells the rows of a set from those of sets of other classes.

    Args:
        test: The set; without one there are no values, and a note.
        others: Sets of other classes, by name.
        notes: Gets the note and the warnings.

    Returns:
        By name, the values of `OOD`; of two sets or more also their mean, as ``ood``, with the number of ``sets``.

    Raises:
        ValueError: A set has other classes in its scores than the test set.
    """
    values: dict[str, dict[str, float]] = {}
    if test is None:
        if others:
            notes.append(f"images of other classes are told from the set {TEST!r}, which is missing")
        return values
    inside = _scores(test)
    for name, other in others.items():
        if other.scores.shape[1] != test.scores.shape[1]:
            raise ValueError(
                f"{other.where} has scores of {other.scores.shape[1]} classes, {test.where} of {test.scores.shape[1]}; "
                "both must be of the same network. Give its scores."
            )
        metric, outside = OODDetection(), _scores(other)
        metric.update(inside, torch.ones(len(inside), dtype=torch.bool))
        metric.update(outside, torch.zeros(len(outside), dtype=torch.bool))
        with warnings_as_notes(notes):
            values[name] = {key: float(value) for key, value in metric.compute().items()}
    if len(values) > 1:
        values[OTHERS] = mean_values(list(values.values())) | {"sets": len(values)}
    return values


def _scores(found: Predictions) -> torch.Tensor:
    """Log-odds of the confidence that a calibrator gives, else of the largest probability."""
    own = found.confidence if found.origin.calibrator else None
    return Rows(found.scores, torch.zeros(len(found.scores), dtype=torch.int64), own, found.input).log_odds


def ood_grid(title: str, what: str, rows: Iterable[tuple[str, Mapping[str, float]]]) -> Grid:
    """A table with a row for each set of other classes, or each calibrator, as ``what`` says above the names."""
    named = ((MEAN_OF_OTHERS if name == OTHERS else name, values) for name, values in rows)
    cells = [[name, *(cell(key, values[key]) for key in OOD)] for name, values in named]
    return Grid(title, [what, *map(heading, OOD)], cells)


def condensed(entries: Mapping[str, Entry]) -> list[Entry]:
    """Entries of a table: of the corruptions of one benchmark some severities and the mean, of other sets all."""
    lines = lines_of({name: entry.values.values for name, entry in entries.items()})
    return [entries[line.name] if line.name in entries else _mean_entry(line, entries) for line in lines]


def _mean_entry(line: Line, entries: Mapping[str, Entry]) -> Entry:
    width = len(next(iter(entries.values())).cells)
    return Entry(line.name, [line.size, *[""] * (width - 1)][:width], Values(dict(line.values), {}, {}))


def corrupted_sets(names: Iterable[str]) -> dict[str, str]:
    """The benchmark that each corruption belongs to, by the name of its set."""
    found = [family for family in families(names) if family.name != OTHERS]
    return {name: family.name for family in found for name in family.members}


def once_each(notes: Iterable[tuple[str, str]], names: Iterable[str]) -> list[str]:
    """Notes on sets, by their names; what is said of several corruptions of a benchmark is said once.

    Args:
        notes: Name of a set, and a remark on it.
        names: Names of all sets.

    Returns:
        The notes.
    """
    benchmark = corrupted_sets(names)
    counts: dict[tuple[str, str], int] = {}
    for name, note in notes:
        key = benchmark.get(name, name), note
        counts[key] = counts.get(key, 0) + 1
    grouped = set(benchmark.values())
    return [
        f"{name} ({count} set{'s'[: count > 1]}): {note}" if name in grouped else f"{name}: {note}"
        for (name, note), count in counts.items()
    ]
