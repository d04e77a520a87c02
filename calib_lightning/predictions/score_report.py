"""The report of `score`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import calib_lightning
from calib_lightning.metrics import CORE, Difference, GroupTable, Spread, means_of_families
from calib_lightning.predictions.others import condensed, corrupted_sets, ood_grid, reference
from calib_lightning.predictions.reading import Predictions
from calib_lightning.predictions.results import OOD_TITLE
from calib_lightning.predictions.settings import Settings
from calib_lightning.predictions.tables import (
    MOST_COLUMNS,
    Entry,
    Grid,
    Report,
    bins_title,
    cell,
    heading,
    intervals_remark,
    sectioned,
    settings_content,
    value_grids,
    values_content,
)
from calib_lightning.predictions.values import Values


class Groups(NamedTuple):
    """Values of groups of rows, and the name and value of the worst class for each metric with a better direction."""

    by: Literal["class", "frequency"]
    table: GroupTable
    worst: dict[str, tuple[str, float]]


class SetScores(NamedTuple):
    """A set with its values, values of groups (or ``None``) and notes."""

    predictions: Predictions
    values: Values
    groups: Groups | None
    notes: list[str]


@dataclass(frozen=True, repr=False)
class ScoreReport(Report):
    """Results of `score`.

    Attributes:
        sets: The sets by name, each with ``predictions``, ``values``, ``groups`` and ``notes``.
        settings: The settings.
        input: Kind of the scores.
        spreads: Mean and standard deviation of each value over the runs of one method and data set, by their name;
            empty if they are not asked for.
        compared_with: Name of the other run of each set; empty without one.
        notes: The notes of all sets.
        ood: How well images of other classes are told, by their set.
    """

    sets: dict[str, SetScores]
    settings: Settings
    input: str
    spreads: dict[str, dict[str, Spread]]
    compared_with: dict[str, str]
    notes: list[str]
    ood: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The values of the only set, by key."""
        if len(self.sets) != 1:
            raise ValueError(f"the report has {len(self.sets)} sets, not 1. Use report.sets[NAME].values.values.")
        return next(iter(self.sets.values())).values.values

    def grids(self) -> Iterator[Grid]:
        """The tables: all sets, mean and standard deviation, differences, groups."""
        calibrators = {entry.predictions.origin.calibrator for entry in self.sets.values()}
        title = f"{'' if all(calibrators) else f'{self.input}, '}{bins_title(self.settings)}"
        if any(calibrators):  # then the scores are its log-probabilities, whatever the file has
            title += f", calibrated by {', '.join(sorted(calibrators - {''}))}"
        entries = {name: Entry(name, _sizes(entry.predictions), entry.values) for name, entry in self.sets.items()}
        yield from value_grids(title, ["set", "N", "K"], condensed(entries))
        if self.ood:
            yield ood_grid(OOD_TITLE.format(reference(self.sets)), "set", self.ood.items())
        single = corrupted_sets(self.spreads)
        for group, spreads in self.spreads.items():
            if group in single:
                continue
            rows = sectioned({key: _spread_cells(key, spread) for key, spread in spreads.items()})
            interval = f"{100 * self.settings.level:g} % interval of the mean"
            runs = next(iter(spreads.values())).runs
            yield Grid(f"{group}: over {runs} run{'s' if runs > 1 else ''}", ["metric", "mean ± std", interval], rows)
        for name, entry in self.sets.items():
            if entry.values.differences:
                rows = sectioned(
                    {key: _difference_cells(key, found) for key, found in entry.values.differences.items()}
                )
                yield Grid(f"{name} minus {self.compared_with[name]}", ["metric", "difference", "p"], rows)
            if entry.groups:
                yield _group_grid(name, entry.groups, entry.predictions, self.settings)

    def remarks(self) -> Iterator[str]:
        """The methods of the intervals and p-values, and the notes."""
        yield from intervals_remark(self.settings)
        if self.compared_with:
            yield f"p: paired permutation test, seed {self.settings.seed}; not corrected for the number of metrics."
        for note in self.notes:
            yield f"Note: {note}."

    def content(self) -> dict[str, Any]:
        """The report as plain data."""
        settings, first = settings_content(self.settings, self.input), next(iter(self.sets.values()))
        origin = first.predictions.origin
        if origin.calibrator:
            settings["calibrator"] = {"name": origin.calibrator, "file": _text(origin.calibrator_file)}
        if first.groups is not None:
            settings["groups"] = {"by": first.groups.by, "n_bins": self.settings.bins[0]}
        others = list(dict.fromkeys(self.compared_with.values()))
        if others:
            other = others[0] if len(others) == 1 else self.compared_with
            settings["compare"] = {
                "method": "paired permutation test",
                "other": other,
            }
        if self.spreads:
            settings["seeds"] = {
                "runs": len(self.sets),
                "std": "sample (ddof = 1)",
                "level": self.settings.level,
                "interval": "Student's, cut to the possible values",
            }
        content: dict[str, Any] = {
            "calib_lightning": calib_lightning.__version__,
            "settings": settings,
            "sets": {name: _set_content(entry) for name, entry in self.sets.items()},
        }
        means = means_of_families({name: entry.values.values for name, entry in self.sets.items()})
        content |= ({"means": means} if means else {}) | ({"ood": self.ood} if self.ood else {})
        if self.spreads:
            groups = {
                group: {key: spread._asdict() for key, spread in spreads.items()}
                for group, spreads in self.spreads.items()
            }
            content["seeds"] = groups if len(groups) > 1 else next(iter(groups.values()))
        return content | {"notes": self.notes}


def class_titles(predictions: Predictions) -> dict[str, str]:
    """Class names by number, empty if unknown; a name that two classes share is numbered."""
    names = predictions.origin.class_names or ()
    return {str(k): name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)}


def _set_content(entry: SetScores) -> dict[str, Any]:
    predictions, origin = entry.predictions, entry.predictions.origin
    own = "from the calibrator" if origin.calibrator else "from the file"
    content: dict[str, Any] = {
        "file": _text(origin.file),
        "n": len(predictions.scores),
        "classes": predictions.scores.shape[1],
        "confidence": "largest probability" if predictions.confidence is None else own,
        **values_content(entry.values),
    }
    if entry.values.differences:
        content["compare"] = {
            key: {"difference": difference.value, "p_value": difference.p_value}
            for key, difference in entry.values.differences.items()
        }
    if origin.class_names is not None:
        content["class_names"] = list(origin.class_names)
    if entry.groups:
        table, titles = entry.groups.table, class_titles(predictions)
        content["groups"] = {
            titles.get(name, name): {
                "n": int(table.rows[place]),
                "values": {key: float(values[place]) for key, values in table.values.items()},
            }
            for place, name in enumerate(table.names)
        }
        content["worst_class"] = {
            key: {
                "class": int(name) if name else None,
                **({"name": titles[name]} if name in titles else {}),
                "value": value,
            }
            for key, (name, value) in entry.groups.worst.items()
        }
    return content


def _group_grid(set_name: str, groups: Groups, predictions: Predictions, settings: Settings) -> Grid:
    table, titles = groups.table, class_titles(predictions)
    keys = list(table.values)
    if len(keys) > MOST_COLUMNS:
        keys = [key for key in CORE if key in table.values]
    rows = [
        [titles.get(name, name), f"{int(count):,}", *(cell(key, float(table.values[key][place])) for key in keys)]
        for place, (name, count) in enumerate(zip(table.names, table.rows, strict=True))
    ]
    worst_cells = []
    for key in keys:
        name, value = groups.worst.get(key, ("", math.nan))
        worst_cells.append(f"{cell(key, value)} ({titles.get(name, name)})" if name else "-")
    rows.append(["worst class", "", *worst_cells])
    title = f"{set_name} by {groups.by}, {settings.bins[0]} bins (lo, hi]"
    return Grid(title, [groups.by, "N", *map(heading, keys)], rows)


def _sizes(predictions: Predictions) -> list[str]:
    rows, classes = predictions.scores.shape
    return [f"{rows:,}", f"{classes:,}"]


def _spread_cells(key: str, spread: Spread) -> list[str]:
    interval = "-" if math.isnan(spread.low) else f"[{cell(key, spread.low)}, {cell(key, spread.high)}]"
    return [f"{cell(key, spread.mean)} ± {cell(key, spread.std)}", interval]


def _difference_cells(key: str, found: Difference) -> list[str]:
    text = cell(key, found.value)
    return [f"+{text}" if found.value > 0 else text, "-" if math.isnan(found.p_value) else f"{found.p_value:.4f}"]


def _text(path: object) -> str | None:
    return None if path is None else str(path)
