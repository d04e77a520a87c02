"""Fitting calibrators and measuring what they do."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, NamedTuple

from calib_lightning import posthoc
from calib_lightning.commands.calibrate_arguments import DEFAULT_CALIBRATOR, Options, split_names
from calib_lightning.metrics import EvaluationState
from calib_lightning.posthoc import Calibrator, parse
from calib_lightning.posthoc.binary import BinaryCalibrator
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.predictions.calibration_sets import Inputs, Source
from calib_lightning.predictions.reading import Predictions
from calib_lightning.predictions.scoring import (
    Figures,
    calibrated,
    figures_of,
    states_of,
    value_notes,
    warnings_as_notes,
    with_logits,
)

if TYPE_CHECKING:
    from calib_lightning.predictions.run_network import RunNetwork

AnyCalibrator = Calibrator | NeuralClamping

UNCALIBRATED = "uncalibrated"
"""Name of the row of the network as it is."""

NOTICEABLE = 0.005
"""A loss of accuracy or of correctness AUROC, as a fraction, that is worth a note."""


LOST_REFINEMENT = (
    "where the correctness AUROC falls, confidences tell right from wrong answers less well; no calibration error "
    "shows that"
)
"""What is said, once, where a calibrator lowers it noticeably."""


class Fitted(NamedTuple):
    """A calibrator after its fit.

    Attributes:
        calibrator: The calibrator.
        notes: What its fit warned of.
    """

    calibrator: AnyCalibrator
    notes: list[str]


class Row(NamedTuple):
    """What one calibrator, or none, does to one set.

    Attributes:
        figures: Its figures.
        own_confidence: Whether the confidence is not the largest probability.
    """

    figures: Figures
    own_confidence: bool


class Report(NamedTuple):
    """Everything that one command found.

    Attributes:
        inputs: What was read.
        fitted: The calibrators by name, in the order of the command line.
        rows: For each set a row for `UNCALIBRATED` and one for each calibrator.
        failed: Why calibrators are not among them, by name.
        notes: What a reader of the figures should know.
        checkpoint: The network that was loaded, or ``None``.
    """

    inputs: Inputs
    fitted: dict[str, Fitted]
    rows: dict[str, dict[str, Row]]
    failed: dict[str, str]
    notes: list[str]
    checkpoint: Path | None


def named_calibrators(texts: Sequence[str] | None) -> list[AnyCalibrator]:
    """Build the calibrators of a command line.

    Args:
        texts: What each ``--calibrators`` was given; ``None`` stands for the default.

    Returns:
        The calibrators, not fitted; what is named twice is there once.

    Raises:
        ValueError: A text cannot be read, or names no calibrator.
    """
    names = [name for text in texts or [DEFAULT_CALIBRATOR] for name in split_names(text)]
    built = [_built(name) for name in names]
    return list({calibrator.name: calibrator for calibrator in built}.values())


def _built(text: str) -> AnyCalibrator:
    try:
        if text.partition("(")[0] == NeuralClamping.__name__:
            return parse(text, NeuralClamping)
        return parse(text, Calibrator)  # type: ignore[type-abstract]
    except ValueError as error:
        raise ValueError(f"{error} `calib calibrate --list` says what there is.") from error


def all_calibrators() -> Iterator[str]:
    """One line for everything that ``--calibrators`` takes: its name and the first sentence of its docstring.

    Yields:
        The lines, under a heading for each kind.
    """
    kinds: dict[str, type | UnionType] = {
        "calibrators:": AnyCalibrator,
        "calibrators of one probability, for OneVsRest(...) and TopLabel(...):": BinaryCalibrator,
    }
    exported = {name: getattr(posthoc, name) for name in posthoc.__all__}
    classes = {name: item for name, item in exported.items() if isinstance(item, type) and not inspect.isabstract(item)}
    for heading, kind in kinds.items():
        names = sorted(name for name, item in classes.items() if issubclass(item, kind))
        yield heading
        for name in names:
            first = (inspect.getdoc(classes[name]) or "").partition("\n\n")[0]
            yield f"  {name:<{max(map(len, names))}}  {' '.join(first.split())}"


def calibrate(
    options: Options, calibrators: Sequence[AnyCalibrator], inputs: Inputs, network: RunNetwork | None
) -> Report:
    """Fit every calibrator to the calibration rows and measure it on every test set.

    One that fails is left out, and why is in the report.

    Args:
        options: The command line.
        calibrators: Not fitted.
        inputs: The sets, with features where a calibrator needs them.
        network: That of the run, where a calibrator needs it.

    Returns:
        The report.
    """
    notes = list(inputs.notes)
    rows: dict[str, dict[str, Row]] = {}
    said: dict[str, list[str]] = {}
    for test in inputs.tests:
        row, said[test.name] = _row(options, test.predictions)
        rows[test.name] = {UNCALIBRATED: row}
        notes += [f"{test.name}: {note}" for note in said[test.name]]
    fitted: dict[str, Fitted] = {}
    failed: dict[str, str] = {}
    for calibrator in calibrators:
        name = calibrator.name
        try:
            found = _fit(calibrator, inputs.calibration, network)
            applied = [_applied(calibrator, test, network) for test in inputs.tests]
        except Exception as error:  # whatever is wrong with one must not cost the others
            failed[name] = " ".join(str(error).split()) or type(error).__name__
            continue
        fitted[name] = found
        for test, predictions in zip(inputs.tests, applied, strict=True):
            rows[test.name][name], new = _row(options, predictions)
            notes += [f"{test.name}, {name}: {note}" for note in new if note not in said[test.name]]
            notes += _losses(test, name, predictions)
    checkpoint = None if network is None else network.checkpoint
    notes = sorted(dict.fromkeys(notes), key=LOST_REFINEMENT.__eq__)  # behind all that it explains
    return Report(inputs, fitted, rows, failed, notes, checkpoint)


def _fit(calibrator: AnyCalibrator, source: Source, network: RunNetwork | None) -> Fitted:
    warned: list[str] = []
    with warnings_as_notes(warned):
        if isinstance(calibrator, Calibrator):
            calibrator.fit(source.logits, source.predictions.labels, source.features)
        else:
            assert network is not None
            network.fit(calibrator)
    where = f"{type(calibrator).__name__}.fit: "
    return Fitted(calibrator, list(dict.fromkeys(note.removeprefix(where) for note in warned)))


def _applied(calibrator: AnyCalibrator, test: Source, network: RunNetwork | None) -> Predictions:
    if isinstance(calibrator, Calibrator):
        return calibrated(calibrator, with_logits(test.predictions), test.features)
    assert network is not None
    return test.predictions._replace(scores=network.clamped_logits(calibrator, test.name), confidence=None)


def _row(options: Options, predictions: Predictions) -> tuple[Row, list[str]]:
    states = states_of(options, predictions, details=options.intervals is not None)
    figures, warned = figures_of(options, states, predictions)
    row = Row(figures, predictions.confidence is not None)
    return row, list(dict.fromkeys([*value_notes(predictions, figures.values), *warned]))


_QUALITIES = {"accuracy": "accuracy", "correctness_auroc": "correctness AUROC"}


def _losses(test: Source, name: str, predictions: Predictions) -> Iterator[str]:
    before, after = _quality(test.predictions), _quality(predictions)
    lost = [key for key in _QUALITIES if before[key] - after[key] > NOTICEABLE]
    said = [f"the {_QUALITIES[key]} from {100 * before[key]:.2f} to {100 * after[key]:.2f} %" for key in lost]
    if said:
        yield f"{test.name}: {name} lowers {' and '.join(said)}"
    if "correctness_auroc" in lost:
        yield LOST_REFINEMENT


def _quality(predictions: Predictions) -> dict[str, float]:
    state = EvaluationState(list(_QUALITIES), input=predictions.input)
    state.update(*predictions[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not defined: no note compares with it
        return {key: float(value) for key, value in state.compute().items()}
