"""The file of a benchmark: which runs it asks for."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from calib_lightning.utils.config_search import check_aliases
from calib_lightning.utils.names import did_you_mean

AXES = ("data", "method", "network", "recipe")
"""Keys that take one entry or a list of entries, of which every combination is run."""

KEYS = (*AXES, "seeds", "calibrators", "baseline", "config", "options", "folder")
"""Every key of the file."""

_OWN_OPTIONS = {
    "run_dir": "folder",
    "seed_everything": "seeds",
    "config": "config",
    "data": "data",
    "model": "method",
    "model.encoder": "network",
    "ckpt_path": None,
    "quiet": None,
}
"""Options of ``calib fit`` that the benchmark sets, and the key that says so."""

_NETWORK_OPTIONS = "network: {as: r20, network: {name: resnet20_classic, in_channels: 1}}"
"""An example of a network with options of its own."""


@dataclass(frozen=True)
class Entry:
    """One value of an axis.

    Args:
        label: Its name in tables and folders; None if only the configuration tells.
        value: What the axis is set to; None leaves it to the configurations.
        config: Configurations for ``-c``.
        options: Options of ``calib fit``.
    """

    label: str | None
    value: Any
    config: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """One run of the grid.

    Args:
        data: Label of the data; None if only the configuration tells, as for the others.
        method: Label of the method.
        network: Label of the network.
        recipe: Label of the recipe if there are several, which follows that of the method.
        seed: Seed of the run.
        arguments: Command line of ``calib fit`` but for seed, folder and checkpoint.
    """

    data: str | None
    method: str | None
    network: str | None
    recipe: str | None
    seed: int
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """What a file asks for.

    Args:
        file: The file.
        folder: Where the runs go.
        baseline: Label of the method that others are compared with.
        calibrators: Fitted after each run.
        runs: The runs, in the order of the file.
    """

    file: Path
    folder: Path
    baseline: str | None
    calibrators: tuple[str, ...]
    runs: tuple[Asked, ...]


def read_grid(file: Path) -> Grid:
    """Read the file of a benchmark.

    Args:
        file: A YAML file; ``docs/benchmarks.md`` describes it.

    Returns:
        Its runs: every combination of data, network, recipe, method and seed.

    Raises:
        ValueError: If a key is unknown or a value is not what it must be.
        OSError: If the file cannot be read.
    """
    text = file.read_text(encoding="utf-8")
    try:
        check_aliases(text)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must have keys such as data: and method:; calib list configs shows benchmarks.")
    try:
        return _grid(file, content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _grid(file: Path, content: dict[Any, Any]) -> Grid:
    _check_keys(content, KEYS, "")
    axes = {axis: _entries(axis, content.get(axis)) for axis in AXES}
    several = len(axes["recipe"]) > 1
    config, options = _texts("config", content.get("config")), _options("options", content.get("options"))
    runs = [
        Asked(
            chosen["data"].label,
            chosen["method"].label,
            chosen["network"].label,
            chosen["recipe"].label if several else None,
            seed,
            _arguments(config, options, chosen),
        )
        for chosen in (
            dict(zip(("data", "network", "recipe", "method"), parts, strict=True))
            for parts in itertools.product(axes["data"], axes["network"], axes["recipe"], axes["method"])
        )
        for seed in _seeds(content.get("seeds", 0))
    ]
    folder = content.get("folder", f"runs/{file.stem}")
    if not isinstance(folder, str) or not folder:
        raise ValueError(f"folder is {folder!r}; it must be the path of a folder.")
    baseline = content.get("baseline")
    if baseline is not None and not isinstance(baseline, str):
        raise ValueError(f"baseline is {baseline!r}; it must be the name of one of the methods.")
    return Grid(file, Path(folder), baseline, _texts("calibrators", content.get("calibrators")), tuple(runs))


def _check_keys(content: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(
                f"{where}{key} is no key; it must be one of {', '.join(known)}.{did_you_mean(str(key), known)}"
            )


def _entries(axis: str, given: Any) -> list[Entry]:
    if given is None:
        return [Entry(None, None, (), {})]
    listed = given if isinstance(given, list) else [given]
    if not listed:
        raise ValueError(f"{axis} is an empty list; it must have at least one entry. Leave it out for the default.")
    return [_entry(axis, item) for item in listed]


def _entry(axis: str, given: Any) -> Entry:
    content = given if isinstance(given, dict) else {axis: given}
    own = (axis, "as", *(("callback",) if axis == "method" else ()), "config", "options")
    if axis == "network" and "name" in content:
        raise ValueError(f"network has the entry {given!r}, which has no label. Write for example {_NETWORK_OPTIONS}.")
    _check_keys(content, own, f"{axis}: ")
    value, label = content.get(axis), content.get("as")
    callbacks = _texts(f"{axis}: callback", content.get("callback"))
    name = value.get("name") if axis == "network" and isinstance(value, dict) else value
    if not isinstance(name, str) and (name is not None or label is None):
        raise ValueError(f"{axis} has the entry {given!r}; it must be a name, or a mapping of {', '.join(own)}.")
    if label is None:
        label = "+".join([_stem(str(name)), *map(_stem, callbacks)])
    if not isinstance(label, str) or not re.search(r"\w", label):
        raise ValueError(f"{axis}: as is {label!r}; it must be a name.")
    config = (*_texts(f"{axis}: config", content.get("config")), *(_in_folder(name, "callback") for name in callbacks))
    if axis == "recipe" and value is not None:
        config = (_in_folder(value, "recipe"), *config)
    return Entry(label, value, config, _options(f"{axis}: options", content.get("options")))


def _in_folder(name: str, folder: str) -> str:
    """A bare name is that of a configuration of the folder; a path, or a name with its folder, stays."""
    return name if "/" in name or name.endswith((".yaml", ".yml")) else f"{folder}/{name}"


def _stem(name: str) -> str:
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name.rpartition("/")[2]


def _texts(name: str, given: Any) -> tuple[str, ...]:
    listed = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(item, str) and item for item in listed):
        raise ValueError(f"{name} is {given!r}; it must be a name or a list of names.")
    return tuple(listed)


def _options(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict | None) or not all(isinstance(key, str) for key in given or {}):
        raise ValueError(f"{name} is {given!r}; it must be options of calib fit and their values, as model.gamma: 2.")
    found = {key.removeprefix("--").replace("-", "_"): value for key, value in (given or {}).items()}
    for key in found:
        if key.startswith("model.encoder."):
            raise ValueError(
                f"{name} has {key}; options of a network are given with its name. Write for example {_NETWORK_OPTIONS}."
            )
        if key in _OWN_OPTIONS:
            instead = _OWN_OPTIONS[key]
            raise ValueError(
                f"{name} has {key}, which the benchmark sets. Leave it out{f', and use {instead}:' if instead else ''}."
            )
    return found


def _seeds(given: Any) -> list[int]:
    listed = given if isinstance(given, list) else [given]
    if not listed or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in listed):
        raise ValueError(f"seeds is {given!r}; it must be a whole number >= 0 or a list of them, as [0, 1, 2].")
    if len(set(listed)) < len(listed):
        raise ValueError(f"seeds is {given!r}; each seed must be there once.")
    return list(listed)


def _arguments(config: tuple[str, ...], options: Mapping[str, Any], chosen: Mapping[str, Entry]) -> tuple[str, ...]:
    """The command line: configurations, the data and its settings, the method and its own, all others."""
    data, method, network, recipe = (chosen[axis] for axis in AXES)
    pieces = [*config, *recipe.config, *data.config, *network.config, *method.config]
    words = [word for piece in pieces for word in ("-c", piece)]
    words += [
        f"--{name}={entry.value}" for name, entry in (("data", data), ("model", method)) if entry.value is not None
    ]
    if network.value is not None:
        words.append(f"--model.encoder={_written(network.value)}")
    every = {**options, **recipe.options, **data.options, **network.options, **method.options}
    return (*words, *(f"--{name}={_written(value)}" for name, value in every.items()))


def _written(value: Any) -> str:
    """A value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value)
