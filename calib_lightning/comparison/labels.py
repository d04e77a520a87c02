"""What runs are called: data, network, method and seed, from the record of a benchmark or from their configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from calib_lightning.benchmark.identity import content_of
from calib_lightning.predictions.inputs import read_record
from calib_lightning.utils.config_search import check_aliases, config_names

BENCHMARK = "benchmark.json"
"""The record of a benchmark in its folder."""
SPLITS = " (splits "
"""Between the name of data and the beginning of the hash of their splits, where runs have different ones."""


_SAID = 5
"""Number of differing settings that are named."""


class Labels(NamedTuple):
    """Names of a run; ``calibrators`` are those that a benchmark asks for, ``None`` for all that there are."""

    data: str
    network: str
    method: str
    seed: Any
    calibrators: tuple[str, ...] | None = None


class Labelled(NamedTuple):
    """Runs with their labels; ``first_stages`` are the runs whose training is the first stage of others."""

    runs: dict[Path, Labels]
    baseline: str | None
    notes: list[str]
    first_stages: dict[Path, Path]


def labels_of_runs(folders: Iterable[Path]) -> Labelled:
    """Name runs, and the runs of benchmarks, so that each name stands for one configuration.

    Args:
        folders: Folders of runs, or of benchmarks.

    Returns:
        The runs. Those of a benchmark that are not finished are left out, with a note.

    Raises:
        ValueError: A folder is neither, two runs are the same, or none is left.
    """
    runs: dict[Path, Labels] = {}
    notes: list[str] = []
    owners: dict[Path, Path] = {}
    baseline = None
    loose = []
    for folder in folders:
        if (folder / BENCHMARK).is_file():
            found = _of_benchmark(folder)
            runs |= found.runs
            owners |= found.first_stages
            baseline = baseline or found.baseline
            notes += found.notes
        else:
            loose.append(folder)
    for run in runs:
        if not (run / "run.json").is_file():
            raise ValueError(
                f"{run} has no run.json, but {BENCHMARK} says that it is finished. Run `calib benchmark` again."
            )
    known = {run.resolve() for run in runs}
    loose = [folder for folder in loose if folder.resolve() not in known]
    for folder in loose:
        if not (folder / "run.json").is_file():
            raise ValueError(
                f"{folder} is not the folder of a run (it has no run.json) or of a benchmark (no {BENCHMARK}). Give "
                "folders that `calib fit` or `calib benchmark` has made."
            )
    runs |= _of_configurations(loose)
    if not runs:
        raise ValueError(
            "there is no finished run to compare. " + (f"{notes[0]}." if notes else "Give folders of runs.")
        )
    runs = _apart_by_splits(runs, notes)
    if loose or len({run.parent for run in runs}) > 1:  # within one benchmark its file has asked for it
        notes += _differences(runs)
    places: dict[Labels, Path] = {}
    for run, labels in runs.items():
        key = labels._replace(calibrators=None)
        if key in places:
            raise ValueError(
                f"{places[key]} and {run} are both {labels.method} on {labels.data} with seed {labels.seed}; each seed "
                "counts once. Give one of them, or runs with different seeds."
            )
        places[key] = run
    return Labelled(runs, baseline, notes, owners)


def _apart_by_splits(runs: dict[Path, Labels], notes: list[str]) -> dict[Path, Labels]:
    """Add the splits to the name of data that have several."""
    splits: dict[str, dict[str, list[Path]]] = {}
    for run, labels in runs.items():
        known = str(read_record(run).get("splits") or "")[:6] or "unknown"
        splits.setdefault(labels.data, {}).setdefault(known, []).append(run)
    for data, found in splits.items():
        if len(found) > 1:
            said = "; ".join(
                f"{name} in {members[0].name}" + " ..." * (len(members) > 1) for name, members in found.items()
            )
            notes.append(
                f"{data or 'data'}: the runs have different splits ({said}), and so were trained on different images; "
                "they are in separate tables"
            )
            for name, members in found.items():
                runs |= {run: runs[run]._replace(data=f"{data}{SPLITS}{name})") for run in members}
    return runs


def _of_benchmark(folder: Path) -> Labelled:
    try:
        record = json.loads((folder / BENCHMARK).read_text(encoding="utf-8"))
        entries = record["runs"]
        runs = {
            folder / entry["folder"]: Labels(
                entry["data"] or "",
                entry["network"] or "",
                entry["method"],
                entry["seed"],
                tuple(entry.get("calibrators") or ()),
            )
            for entry in entries
            if entry["status"] == "finished"
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / BENCHMARK} is damaged ({error!r}). Run `calib benchmark` again.") from error
    missing = [f"{entry['folder']} ({entry['status']})" for entry in entries if entry["status"] != "finished"]
    notes = []
    if missing:
        some = ", ".join(missing[:3]) + " and others" * (len(missing) > 3)
        notes.append(f"{len(missing)} of {len(entries)} runs of {folder} are not finished: {some}")
    owners = {folder / entry["folder"]: folder / entry["first_stage"] for entry in entries if entry.get("first_stage")}
    return Labelled(runs, record.get("baseline"), notes, owners)


def _of_configurations(folders: list[Path]) -> dict[Path, Labels]:
    """Names from the configurations; what differs between runs of one name is added to it."""
    configs = {folder: _config(folder) for folder in folders}
    named = {folder: _labels(config, folder) for folder, config in configs.items()}
    groups: dict[tuple[str, str, str], list[Path]] = {}
    for folder, labels in named.items():
        groups.setdefault(labels[:3], []).append(folder)
    for members in groups.values():
        flat = {folder: _flat(_of_method(configs[folder])) for folder in members}
        keys = dict.fromkeys(key for settings in flat.values() for key in settings)
        differing = [key for key in keys if len({settings.get(key) for settings in flat.values()}) > 1]
        for folder in members:
            said = ", ".join(f"{key.rpartition('.')[2]}={flat[folder].get(key)}" for key in differing)
            if said:
                named[folder] = named[folder]._replace(method=f"{named[folder].method} ({said})")
    return named


def _differences(runs: dict[Path, Labels]) -> Iterator[str]:
    """Say in what the trainings of several methods differ beside method and seed; within one the labels do."""
    tables: dict[tuple[str, str], dict[Path, dict[str, str]]] = {}
    own: dict[Path, tuple[str, ...]] = {}
    for run, labels in runs.items():
        settings, own[run] = _of_training(_config(run))
        tables.setdefault((labels.data, labels.network), {})[run] = _flat(settings)
    for (data, network), trainings in tables.items():
        if len({_labels(_config(run), run).method for run in trainings}) < 2:
            continue
        said = []
        for key in dict.fromkeys(key for settings in trainings.values() for key in settings):
            by_value: dict[str, dict[str, None]] = {}
            for run, settings in trainings.items():
                if key.startswith(own[run]):
                    continue
                by_value.setdefault(settings.get(key, "not set"), {})[runs[run].method] = None
            if len(by_value) > 1:
                values = "; ".join(
                    f"{value}: {', '.join([*methods][:3])}{' ...' * (len(methods) > 3)}"
                    for value, methods in by_value.items()
                )
                said.append(f"{key.removeprefix('.').replace('.init_args', '')} ({values})")
        if said:
            more = f", and {len(said) - _SAID} more" if len(said) > _SAID else ""
            where = ", ".join(name for name in (data, network) if name)
            yield f"{where}: these runs differ in more than method and seed: {', '.join(said[:_SAID])}{more}"


def _of_training(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How a run was trained, without class, settings and callbacks of its method, and what its method prescribes."""
    found = _of_method(config)
    (found.get("data", {}).get("init_args") or {}).pop("root", None)  # the splits tell other images apart
    (found.get("trainer") or {}).pop("callbacks", None)
    path = config_names("method").get(_called(str(config["model"].get("class_path")), "method"))
    own = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8")).get("init_args") or {}
    model = found.pop("model").get("init_args") or {}
    shared = {key: model[key] for key in ("optimizer", "scheduler") if key in model and key not in own}
    return found | {"model": shared}, tuple(f".model.{key}" for key in own)


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():  # a test in the folder of the run
        path = folder.parent / "config.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        check_aliases(text)
        found = yaml.safe_load(text)
        if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
            return found
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error}). Give the folder of a run with its config.yaml.") from error
    raise ValueError(f"{path} is no configuration of a run: it has no model. Give the folder of a run.")


def _labels(config: Mapping[str, Any], folder: Path) -> Labels:
    model = config["model"]
    encoder = (model.get("init_args") or {}).get("encoder") or ""
    network = encoder if isinstance(encoder, str) else str(encoder.get("name") or encoder.get("class_path") or "")
    callbacks = [_called(each, "callback") for each in _callbacks(config)]
    method = "+".join([_called(str(model.get("class_path")), "method"), *callbacks])
    data = config.get("data") or {}
    stages = read_record(folder).get("stages") or [{}]
    seed = stages[-1].get("seed", config.get("seed_everything"))
    return Labels(_called(str(data.get("class_path", "")), "data"), network.rpartition(".")[2], method, seed)


def _callbacks(config: Mapping[str, Any]) -> list[str]:
    found = (config.get("trainer") or {}).get("callbacks") or []
    every = found if isinstance(found, list) else [found]
    return [str(one["class_path"]) for one in every if isinstance(one, Mapping) and one.get("class_path")]


def _called(class_path: str, axis: str) -> str:
    """The name of the configuration of a class, where there is one, else that of the class in the same spelling."""
    short = class_path.rpartition(".")[2]
    names = []
    for name, path in config_names(axis).items():
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^[\s-]*class_path:\s*(\S*\.)?{re.escape(short)}\s*$", text, re.MULTILINE):
            names.append(name)
    if names and axis != "callback" and len(names) == 1:
        return names[0]
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", short.removesuffix("DataModule")).lower()


def _of_method(config: Mapping[str, Any]) -> dict[str, Any]:
    """What changes results, without the splits of the data, which tables are told apart by."""
    found = content_of(dict(config))
    (found.get("data", {}).get("init_args") or {}).pop("split", None)
    found.pop("seed_everything", None)
    return found


def _flat(value: Any, before: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        return {key: found for name, item in value.items() for key, found in _flat(item, f"{before}.{name}").items()}
    if isinstance(value, list):
        return {key: found for i, item in enumerate(value) for key, found in _flat(item, f"{before}.{i}").items()}
    return {} if before.rpartition(".")[2] == "seed" else {before: str(value)}
