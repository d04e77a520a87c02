"""`calibrate`: fit calibrators to held-out predictions and evaluate them on every test set."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_lightning.metrics import families
from calib_lightning.posthoc import Calibrator, Evidence, build, parse
from calib_lightning.predictions.calibration_report import UNCALIBRATED, CalibrationReport, Fitted, Row
from calib_lightning.predictions.held_out import check_widths
from calib_lightning.predictions.inputs import Inputs, inputs_of, inputs_of_run
from calib_lightning.predictions.losses import LOST_REFINEMENT, losses, losses_of_family
from calib_lightning.predictions.others import once_each, ood_values, read_others, reference
from calib_lightning.predictions.reading import Predictions, PredictionsLike, named, predictions_of, with_features
from calib_lightning.predictions.scoring import apply
from calib_lightning.predictions.settings import (
    CALIBRATION_METRICS,
    DEFAULT_CALIBRATOR,
    DEFAULT_RESAMPLES,
    Reading,
    Settings,
    parted,
)
from calib_lightning.predictions.values import (
    selected_metrics,
    states_of,
    value_notes,
    values_of,
    warnings_as_notes,
)

EvidenceOf = Callable[[str, Predictions, Calibrator], Evidence]
"""Returns the inputs of calibrators for a set, given its name."""


def calibrate(
    calibration: PredictionsLike,
    test: PredictionsLike | Sequence[PredictionsLike] | Mapping[str, PredictionsLike] | None = None,
    calibrators: str | Calibrator | Sequence[str | Calibrator] = DEFAULT_CALIBRATOR,
    seeds: int = 1,
    ood: Any = None,
    **options: Any,
) -> CalibrationReport:
    """Fit calibrators to held-out predictions; compare accuracy, calibration and refinement before and after.

    A calibrator that fails is omitted, and the report gives the reason.

    Args:
        calibration: The rows to fit to: a file, `Predictions`, a tuple (scores, labels) or (scores, labels, features),
            or the folder of a run, for its calibration split.
        test: One or more sets to evaluate on, as in `score`. Omit it for a run, which has its own.
        calibrators: Objects, or text such as ``"Temperature,OneVsRest(Isotonic)"``.
        ood: Sets of other classes, told from the test set before and after: files, scores ``(N, K)``, or a dict by
            name. A run has its own.
        seeds: Number of fits of every calibrator that has a seed, each with the next seed; the report has all, and
            their mean and standard deviation.
        **options: ``metrics``, ``bins``, ``intervals`` (``None`` for none), ``level`` and ``seed``, see `Settings`;
            ``input`` (``"probs"`` for probabilities) and the names of arrays in files, see `Reading`.

    Returns:
        The report, with ``calibrators`` (the fitted ones by name), ``table()``, ``to_markdown()``, ``to_json()`` and
        ``save(folder)``.

    Raises:
        ValueError: A file is invalid, the calibration rows are not held out, or a calibrator or metric is unknown.
        TypeError: A dtype is not allowed.
        OSError: A file cannot be read.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits, labels = 3 * torch.randn(400, 3, generator=generator), torch.arange(400) % 3
        >>> held_out, test = (logits[:200], labels[:200]), (logits[200:], labels[200:])
        >>> report = calibrate(held_out, test, "Temperature", intervals=None)
        >>> report.calibrators["Temperature"].temperature > 1.0
        True
    """
    asked, reading = parted(options, {"metrics": CALIBRATION_METRICS, "intervals": DEFAULT_RESAMPLES})
    selected_metrics(asked.metrics, classes=2)
    built, groups = _repeated(named_calibrators(calibrators), seeds)
    needs = {need: calibrator.name for calibrator in built for need in calibrator.needs if need != "logits"}
    path = Path(calibration) if isinstance(calibration, str | Path) else None
    if path is not None and path.is_dir() and test is not None:
        raise ValueError(f"test is given, but the run {path} has its own test sets. Omit test.")
    if path is not None and test is None and reading not in (None, Reading()):
        raise ValueError(
            f"{reading} is given for the run {path}, whose files are read as they are. Leave input and keys out."
        )
    if path is not None and test is None:
        inputs, evidence = _of_run(path, asks_network=bool(needs))
    else:
        if "network" in needs:
            raise ValueError(f"{needs['network']} needs the network and its images. Give the folder of a run (RUN).")
        if test is None:
            raise ValueError("test is None; it must be one or more sets to evaluate on. Give their files or tensors.")
        inputs = inputs_of(predictions_of(calibration, reading), named(test, reading))
        inputs = inputs._replace(others={} if ood is None else read_others(ood, reading))
        if "features" in needs:
            inputs = _with_features(inputs, reading)
        evidence = _stored_evidence
    return dataclasses.replace(_report(asked, built, inputs, evidence), groups=groups)


def named_calibrators(calibrators: str | Calibrator | Sequence[str | Calibrator]) -> list[Calibrator]:
    """Build calibrators from text or objects, without duplicates."""
    given = [calibrators] if isinstance(calibrators, str | Calibrator) else calibrators
    if (
        not isinstance(given, list | tuple)
        or not given
        or not all(isinstance(item, str | Calibrator) for item in given)
    ):
        raise TypeError(
            f"calibrators is {calibrators!r:.200}; it must be text or calibrators, such as Temperature() or "
            "OneVsRest(Isotonic()). Give at least one."
        )
    built: list[Calibrator] = []
    for item in given:
        built += [_built(name) for name in split_names(item)] if isinstance(item, str) else [item]
    return list({calibrator.name: calibrator for calibrator in built}.values())


def _repeated(calibrators: list[Calibrator], seeds: int) -> tuple[list[Calibrator], dict[str, list[str]]]:
    """Every calibrator with each seed, and the names of the fits of those that have one."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds is {seeds!r}; it must be an integer >= 1. 5 is usual.")
    if seeds == 1:
        return calibrators, {}
    found: dict[str, Calibrator] = {}
    groups: dict[str, list[str]] = {}
    for calibrator in calibrators:
        fits = {fit.name: fit for fit in [calibrator, *(_reseeded(calibrator, k) for k in range(1, seeds))]}
        found |= fits
        if len(fits) > 1:
            groups[calibrator.name] = list(fits)
    return list(found.values()), groups


def _reseeded(calibrator: Calibrator, offset: int) -> Calibrator:
    """Build a calibrator with every argument ``seed``, of it and of its parts, raised by an offset."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            name: item + offset if name == "seed" and isinstance(item, int) else moved(item)
            for name, item in value.items()
        }

    return build(moved(calibrator.spec), type(calibrator))


def split_names(text: str) -> list[str]:
    """Split calibrators at the commas outside parentheses."""
    try:
        written = ast.parse(f"[{text.strip()}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        written = None
    if not isinstance(written, ast.List) or not written.elts:
        raise ValueError(
            f"calibrators is {text!r:.200}, which cannot be parsed; it must be comma-separated names. Write "
            '"Temperature,VectorScaling", for example. `calib list calibrators` lists all.'
        )
    return [ast.unparse(item) for item in written.elts]


def _built(text: str) -> Calibrator:
    try:
        return parse(text, Calibrator)  # type: ignore[type-abstract]
    except ValueError as error:
        raise ValueError(f"{error} `calib list calibrators` lists all.") from error


def _of_run(run: Path, asks_network: bool) -> tuple[Inputs, EvidenceOf]:
    inputs = inputs_of_run(run)
    if not asks_network:
        return inputs, _stored_evidence
    from calib_lightning.predictions.run_network import RunNetwork  # it imports the trainer

    network = RunNetwork(run)
    return network.with_features(inputs), network.evidence


def _stored_evidence(name: str, predictions: Predictions, calibrator: Calibrator) -> Evidence:
    return Evidence(predictions.logits, predictions.features)


def _with_features(inputs: Inputs, reading: Reading | None) -> Inputs:
    calibration = with_features(inputs.calibration, reading)
    tests, others = (
        {name: with_features(found, reading) for name, found in sets.items()} for sets in (inputs.tests, inputs.others)
    )
    check_widths(calibration, tests | others)
    return inputs._replace(calibration=calibration, tests=tests, others=others)


def _report(
    settings: Settings, calibrators: Sequence[Calibrator], inputs: Inputs, evidence: EvidenceOf
) -> CalibrationReport:
    rows: dict[str, dict[str, Row]] = {}
    said: dict[str, list[str]] = {}
    grouped = [family for family in families(inputs.tests) if family.severities]
    corrupted = {name for family in grouped for name in family.members}
    of_corruptions = dataclasses.replace(settings, intervals=None)  # of a hundred sets the means matter
    for name, test in inputs.tests.items():
        row, said[name] = _row(of_corruptions if name in corrupted else settings, test)
        rows[name] = {UNCALIBRATED: row}
    notes = [*inputs.notes, *once_each(((name, note) for name, own in said.items() for note in own), inputs.tests)]
    told_from = reference(inputs.tests)
    others = {UNCALIBRATED: ood_values(inputs.tests.get(told_from or ""), inputs.others, notes)}
    fitted: dict[str, Fitted] = {}
    failed: dict[str, str] = {}
    for calibrator in calibrators:
        called = calibrator.name
        own: dict[str, Row] = {}
        remarks: list[str] = []
        new: list[tuple[str, str]] = []
        kept: dict[str, Predictions] = {}
        try:
            found = _fit(calibrator, inputs.calibration, evidence("calibration", inputs.calibration, calibrator))
            for name, test in (inputs.tests | inputs.others).items():  # one by one: a hundred sets may be large
                after = apply(found.calibrator, test, evidence(name, test, calibrator))
                if name in inputs.others or name == told_from:
                    kept[name] = after
                if name in inputs.others:
                    continue
                own[name], notes_of = _row(of_corruptions if name in corrupted else settings, after)
                new += [(name, f"{called}: {note}") for note in notes_of if note not in said[name]]
                remarks += () if name in corrupted else losses(test, after, name, called, settings.bins[0])
            told = ood_values(kept.pop(told_from or "", None), kept, remarks)
        except Exception as error:  # a failure must not affect the other calibrators
            failed[called] = " ".join(str(error).split()) or type(error).__name__
            continue
        fitted[called], others[called] = found, told
        for name, row in own.items():
            rows[name][called] = row
        notes += [*remarks, *once_each(new, inputs.tests)]
        old, fresh = ({name: row[key].values.values for name, row in rows.items()} for key in (UNCALIBRATED, called))
        for family in grouped:
            notes += losses_of_family(old, fresh, family, called)
    notes = sorted(dict.fromkeys(notes), key=LOST_REFINEMENT.__eq__)  # after the notes that it explains
    return CalibrationReport(inputs, settings, fitted, rows, failed, notes, others=others)


def _fit(calibrator: Calibrator, predictions: Predictions, evidence: Evidence) -> Fitted:
    warned: list[str] = []
    calibrator = copy.deepcopy(calibrator)  # the caller's object may be in another report
    with warnings_as_notes(warned):
        calibrator.fit(labels=predictions.labels, **evidence._asdict())
    calibrator.class_names = predictions.origin.class_names
    where = f"{type(calibrator).__name__}.fit: "
    return Fitted(calibrator, list(dict.fromkeys(note.removeprefix(where) for note in warned)))


def _row(settings: Settings, predictions: Predictions) -> tuple[Row, list[str]]:
    states = states_of(settings, predictions, details=settings.intervals is not None)
    values, warned = values_of(settings, states, predictions)
    row = Row(values, predictions.confidence is not None)
    return row, list(dict.fromkeys([*value_notes(predictions, values.values), *warned]))
