"""Read the calibration set and the test sets, and check that they are separate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from calib_lightning.metrics import OTHERS
from calib_lightning.metrics.functional.checks import seem_probs
from calib_lightning.posthoc.evidence import LEAST_PROBABILITY
from calib_lightning.predictions.held_out import LOOKS_BETTER, check_apart, check_role
from calib_lightning.predictions.others import TEST, once_each, read_others
from calib_lightning.predictions.reading import REPLACED_CONFIDENCE, Predictions, input_notes, read_predictions
from calib_lightning.predictions.results import SHARED
from calib_lightning.utils.run_folder import run_of


class Inputs(NamedTuple):
    """The calibration set, the test sets by name, and notes on them.

    ``run`` is ``None`` for predictions from elsewhere, ``checkpoint`` if no network was loaded; ``others`` are sets
    of other classes.
    """

    calibration: Predictions
    tests: dict[str, Predictions]
    notes: list[str]
    run: Path | None = None
    checkpoint: Path | None = None
    others: dict[str, Predictions] = {}  # noqa: RUF012  # never changed


def inputs_of_run(run: Path) -> Inputs:
    """Read the saved sets of a run (or of a test in its folder); the test and shifted sets are the test sets."""
    paths, others = files_of_run(run)
    folder = run / "predictions"
    calibration = paths.pop("calibration", None)
    if calibration is None:
        raise ValueError(
            f"{folder} has no calibration.npz, because no images were held out for calibration. Train with "
            "data.init_args.split.calibration above 0."
        )
    paths.pop("val", None)  # it selected the checkpoint
    if not paths:
        raise ValueError(f"{folder} has no predictions of a test set.")
    tests = {name: read_predictions(path) for name, path in paths.items()}
    inputs = _noted(read_predictions(calibration), tests, run)
    return inputs._replace(run=run, others=read_others(others))


def files_of_run(run: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files of a run's predictions by the name of the set: those with labels, and those of other classes."""
    record = read_record(run)
    folder = run / "predictions"
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.npz"))}
    evaluated = {key.removesuffix("/n") for key in record.get("results") or {} if key.endswith("/n")}
    if evaluated:  # files of sets that the last evaluation did not have are of an earlier network
        found = {name: path for name, path in found.items() if name in evaluated or "/" not in name}
    if not found:
        raise ValueError(
            f"{run} has no predictions yet. Run `calib test -c {run / 'config.yaml'}` and give {run / 'test'} as RUN."
        )
    first = {name: place for place, name in enumerate((TEST, "calibration", "val"))}
    names = sorted(found, key=lambda name: first.get(name, len(first)))  # the others stay in the order of names
    others = [name for name in names if name.startswith(f"{OTHERS}/")]
    return {name: found[name] for name in names if name not in others}, {name: found[name] for name in others}


def inputs_of(calibration: Predictions, tests: Mapping[str, Predictions]) -> Inputs:
    """Check given sets: calibration rows that are not held out, or no calibration rows, are a ``ValueError``."""
    file, run = calibration.origin.file, None
    for test in tests.values():
        if file is not None and test.origin.file is not None and file.samefile(test.origin.file):
            raise ValueError(f"{file} is given for calibration and as a test set; {LOOKS_BETTER}")
    for found in (calibration, *tests.values()):
        if found.input == "logits" and seem_probs(found.scores):
            raise ValueError(
                f"{found.where}: all scores are in [0, 1] and each row sums to 1, but they are taken for logits. If "
                "they are probabilities, set input=probs."
            )
    if file is not None:
        run = run_of(file)
        check_role(file, run)
    return _noted(calibration, dict(tests), run)


def read_record(run: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a run."""
    path = run / "run.json"
    if not path.is_file():
        raise ValueError(
            f"{run} is not the folder of a run, because it has no run.json. Other predictions need test sets beside "
            "the calibration set."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (not a JSON object).")
    return record


def _noted(calibration: Predictions, tests: dict[str, Predictions], run: Path | None) -> Inputs:
    if len(calibration.labels) == 0:
        raise ValueError(f"{calibration.where} has no rows; it must have at least one. Give held-out rows.")
    notes = [] if run is None else list(_run_notes(run))
    said: list[tuple[str, str]] = []
    for name, found in {"calibration": calibration, **tests}.items():
        said += [(name, REPLACED_CONFIDENCE)] if found.confidence is not None else []
        said += [(name, note) for note in input_notes(found)]
    said += [("calibration", note) for note in _zeros(calibration)]
    said += [(name, note) for name, test in tests.items() for note in check_apart(calibration, test)]
    notes += once_each(said, tests)
    return Inputs(calibration, tests, list(dict.fromkeys(notes)))


def _zeros(calibration: Predictions) -> Iterator[str]:
    """Of rows whose label has the probability 0, on which what is fitted hangs."""
    if calibration.input != "probs":
        return
    count = int((calibration.scores.gather(1, calibration.labels[:, None]) == 0).sum())
    if count:
        yield (
            f"{count} of {len(calibration.labels)} rows give their label the probability 0, taken for "
            f"{LEAST_PROBABILITY:.1e}: a few such rows decide a temperature or a matrix. Compare IRM and "
            "EnsembleTemperature, or raise the zeros first; those of a forest to 1 / (2 trees)"
        )


def _run_notes(run: Path) -> Iterator[str]:
    record = read_record(run)
    if record.get("share"):
        yield f"{SHARED}: the calibration rows also selected the checkpoint"
    for name in record.get("calibration_used_by") or []:
        yield (
            f"the calibration split is not independent of the network: {name} was trained with it, so its errors are "
            "smaller there than on other rows"
        )
