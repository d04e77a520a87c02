"""Runs of one method on one data set: which sets belong together, and their mean and spread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from calib_lightning.metrics import METRICS, Spread, over_seeds
from calib_lightning.predictions.reading import Predictions
from calib_lightning.utils.config_search import check_aliases
from calib_lightning.utils.run_folder import run_of


def groups_of_runs(sets: Mapping[str, Predictions]) -> dict[str, list[str]]:
    """Names of the sets of each method and data set, by a name of the group.

    Sets of runs belong together if the configurations have the same model and data and the sets the same name; other
    files if they have as many rows and classes.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    titles: dict[tuple[object, ...], str] = {}
    for name, found in sets.items():
        key, title = _identity(found)
        groups.setdefault(key, []).append(name)
        titles[key] = title
    named: dict[str, list[str]] = {}
    for key, members in groups.items():
        again = [other for other in named if other.partition(" (")[0] == titles[key]]
        named[f"{titles[key]} ({len(again) + 1})" if again else titles[key]] = members
    return named


def spreads_of(values: Mapping[str, Mapping[str, float]], level: float) -> dict[str, Spread]:
    """Mean, standard deviation and interval of each value over runs; the interval is cut to the possible values."""
    keys = dict.fromkeys(key for found in values.values() for key in found)
    spreads = {}
    for key in keys:
        row = METRICS.get(key.partition("@")[0])
        low, high = (-math.inf, math.inf) if row is None else (row.low, row.high)
        found = [own.get(key, math.nan) for own in values.values()]
        spreads[key] = over_seeds(found, level, low=min([low, *found]), high=max([high, *found]))
    return spreads


def files_of_runs(files: Iterable[Path]) -> list[Path]:
    """The records of the runs that files belong to, from which `groups_of_runs` learns what belongs together."""
    runs = [run for run in map(run_of, files) if run is not None]
    return [path for run in runs for path in (run / "run.json", _config_of(run))]


def _config_of(run: Path) -> Path:
    own = run / "config.yaml"
    return own if own.is_file() else run.parent / "config.yaml"


def _identity(found: Predictions) -> tuple[tuple[object, ...], str]:
    rows, classes = found.scores.shape
    file = found.origin.file
    run = None if file is None else run_of(file)
    if file is None or run is None:
        return (rows, classes), f"{rows:,} rows of {classes:,} classes"
    name = file.resolve().relative_to(run.resolve()).with_suffix("").as_posix().removeprefix("predictions/")
    try:
        text = _config_of(run).read_text(encoding="utf-8")
        check_aliases(text)
        config = yaml.safe_load(text)
        model, data = config["model"], config["data"]
        title = f"{_short(model)} on {_short(data)}, {name}"
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return (rows, classes), f"{rows:,} rows of {classes:,} classes"
    return (str(_without_seed(model)), str(_without_seed(data)), name, rows, classes), title


def _without_seed(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_seed(item) for key, item in value.items() if key != "seed"}
    return [_without_seed(item) for item in value] if isinstance(value, list) else value


def _short(section: Mapping[str, object]) -> str:
    return str(section["class_path"]).rpartition(".")[2].removesuffix("DataModule")
