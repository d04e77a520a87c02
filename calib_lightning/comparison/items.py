"""What is compared: networks by method and seed, from the folders of runs or from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from calib_lightning.comparison.labels import Labels, labels_of_runs
from calib_lightning.posthoc import load_calibrator
from calib_lightning.predictions.inputs import files_of_run, read_record
from calib_lightning.predictions.others import read_others
from calib_lightning.predictions.reading import Predictions, predictions_of, read_predictions
from calib_lightning.predictions.scoring import apply
from calib_lightning.predictions.settings import Reading
from calib_lightning.utils.run_folder import calibrators_of

SHARED_STAGE = "first stage (of another run)"


class Item(NamedTuple):
    """A network on a set, perhaps with a calibrator; ``others`` are its sets of other classes."""

    labels: Labels
    set: str
    calibrator: str
    read: Callable[[], Predictions]
    where: str
    others: Mapping[str, Callable[[], Predictions]] = {}


class Cost(NamedTuple):
    """What a run has cost: seconds by stage, images per second in training, the largest memory in MiB."""

    labels: Labels
    seconds: dict[str, float]
    images_per_second: float | None
    memory: dict[str, float]
    device: str


@dataclass(frozen=True)
class Source:
    """All that is compared, with notes on it and the method that the others are measured by."""

    items: list[Item]
    costs: list[Cost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    baseline: str | None = None


def source_of(given: Any, reading: Reading | None = None) -> Source:
    """Find out what is compared.

    Args:
        given: Folders of runs, or of one benchmark; or predictions by method: for each a set of predictions, a list of
            them or a dict by seed.
        reading: Kind of the scores, and names of the arrays, for files.

    Returns:
        The items.

    Raises:
        ValueError: A folder is no run, or there is nothing to compare.
    """
    if isinstance(given, Mapping):
        return Source(list(_in_memory(given, reading)))
    folders = [Path(given)] if isinstance(given, str | Path) else [Path(one) for one in given]
    labelled = labels_of_runs(folders)
    items: list[Item] = []
    notes = list(labelled.notes)
    costs = []
    for run, labels in labelled.runs.items():
        record = read_record(run)
        items += _of_run(run, labels, notes)
        owner = labelled.first_stages.get(run)
        costs.append(_cost(labels, record, None if owner is None else read_record(owner)))
    notes += _versions_note(labelled.runs)
    return Source(items, costs, list(dict.fromkeys(notes)), labelled.baseline)


def _in_memory(given: Mapping[str, Any], reading: Reading | None) -> Iterator[Item]:
    if not given:
        raise ValueError("the predictions are empty; they must be of at least one method. Give {method: (logits, y)}.")
    for method, sets in given.items():
        if isinstance(sets, Mapping):
            by_seed: Mapping[Any, Any] = sets
        else:
            by_seed = dict(enumerate(sets)) if isinstance(sets, list) else {0: sets}
        if not by_seed:
            raise ValueError(f"the predictions of {method} are empty; give those of at least one seed.")
        for seed, one in by_seed.items():
            where = f"{method}, seed {seed}"
            yield Item(Labels("", "", str(method), seed), "test", "", partial(_given, one, reading, where), where)


def _given(one: Any, reading: Reading | None, where: str) -> Predictions:
    try:
        return predictions_of(one, reading)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error


def _of_run(run: Path, labels: Labels, notes: list[str]) -> Iterator[Item]:
    files, others = files_of_run(run)
    files = {name: path for name, path in files.items() if name not in ("calibration", "val")}
    if not files:
        raise ValueError(f"{run} has no predictions of a test set. Run `calib test -c {run / 'config.yaml'}`.")
    readers = {name: partial(_other, path) for name, path in others.items()}
    calibrators = _calibrators(run, labels.calibrators)
    for name, path in files.items():
        own = readers if name == "test" else {}
        yield Item(labels, name, "", partial(read_predictions, path), str(path), own)
        for called, file in calibrators.items():
            if {"network", "features"} & set(load_calibrator(file).needs):
                notes.append(f"{called} needs more than logits: its values are in {file.parent / 'report.md'} alone")
                continue
            calibrated = {other: partial(_calibrated, file, read) for other, read in own.items()}
            read = partial(_calibrated, file, partial(read_predictions, path))
            yield Item(labels, name, called, read, f"{path} with {file}", calibrated)


def _other(path: Path) -> Predictions:
    return next(iter(read_others(path).values()))


def _calibrated(file: Path, read: Callable[[], Predictions]) -> Predictions:
    return apply(load_calibrator(file), read(), file=file)


def _calibrators(run: Path, wanted: Sequence[str] | None) -> dict[str, Path]:
    """The newest file of each calibrator that was fitted to the run's predictions."""
    found = calibrators_of(run)
    if wanted is not None:  # of a benchmark: those of its file, by their own names
        names = {path: load_calibrator(path).name for path in found.values()}
        found = {name: path for path, name in names.items() if name in wanted or path.stem in wanted}
    return dict(sorted(found.items()))


def _cost(labels: Labels, record: Mapping[str, Any], first_stage: Mapping[str, Any] | None) -> Cost:
    seconds: dict[str, float] = {}
    if first_stage is not None:
        seconds[SHARED_STAGE] = _cost(labels, first_stage, None).seconds.get("fit", 0.0)
    memory: dict[str, float] = {}
    speed, device = None, ""
    for stage in record.get("stages", []):
        name = str(stage.get("stage"))
        seconds[name] = seconds.get(name, 0.0) + float(stage.get("seconds") or 0.0)
        speed, device = stage.get("images_per_second") or speed, stage.get("device") or device
        for kind, value in (stage.get("peak_memory_mib") or {}).items():
            if value is not None:
                memory[kind] = max(memory.get(kind, 0.0), float(value))
    return Cost(labels, seconds, speed, memory, device)


def _versions_note(runs: Mapping[Path, Labels]) -> Iterator[str]:
    """Runs of different versions of the packages are compared, but it is said."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for stage in read_record(run).get("stages") or []:
            for package, version in (stage.get("versions") or {}).items():
                names = found.setdefault(package, {}).setdefault(str(version), [])
                names += [run.name] if run.name not in names else []
    for package, versions in found.items():
        if len(versions) > 1:
            said = "; ".join(
                f"{version} in {', '.join(names[:3])}{' ...' * (len(names) > 3)}" for version, names in versions.items()
            )
            yield f"the runs were made with different versions of {package}: {said}"
