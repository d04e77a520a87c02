"""Fitting calibrators and measuring what they do."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from calib_lightning import posthoc
from calib_lightning.calibrate.arguments import DEFAULT_CALIBRATOR, Options, split_names
from calib_lightning.calibrate.reading import Inputs, Source
from calib_lightning.metrics import EvaluationState
from calib_lightning.posthoc import Calibrator, parse
from calib_lightning.score.reading import Predictions
from calib_lightning.score.scoring import Figures, calibrated, figures_of, states_of, value_notes, with_logits

UNCALIBRATED = "uncalibrated"
"""Name of the row of the network as it is."""

NOTICEABLE = 0.005
"""A loss of accuracy or of correctness AUROC, as a fraction, that is worth a note."""


class Fitted(NamedTuple):
    """A calibrator after its fit.

    Attributes:
        calibrator: The calibrator.
        notes: What its fit warned of.
    """

    calibrator: Calibrator
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
    """

    inputs: Inputs
    fitted: dict[str, Fitted]
    rows: dict[str, dict[str, Row]]
    failed: dict[str, str]
    notes: list[str]


def named_calibrators(texts: Sequence[str] | None) -> list[Calibrator]:
    """Build the calibrators of a command line.

    Args:
        texts: What each ``--calibrators`` was given; ``None`` stands for the default.

    Returns:
        The calibrators, not fitted; what is named twice is there once.

    Raises:
        ValueError: A text cannot be read, or names no calibrator.
    """
    names = [name for text in texts or [DEFAULT_CALIBRATOR] for name in split_names(text)]
    built = [parse(name, Calibrator) for name in names]  # type: ignore[type-abstract]
    return list({calibrator.name: calibrator for calibrator in built}.values())


def all_calibrators() -> Iterator[str]:
    """One line for every calibrator: its name and the first sentence of its docstring.

    Yields:
        The lines.
    """
    found = {name: getattr(posthoc, name) for name in posthoc.__all__}
    names = [
        name
        for name, item in found.items()
        if isinstance(item, type) and issubclass(item, Calibrator) and not inspect.isabstract(item)
    ]
    for name in sorted(names):
        first = (inspect.getdoc(found[name]) or "").partition("\n\n")[0]
        yield f"{name:<{max(map(len, names))}}  {' '.join(first.split())}"


def calibrate(options: Options, calibrators: Sequence[Calibrator], inputs: Inputs) -> Report:
    """Fit every calibrator to the calibration rows and measure it on every test set.

    One that fails is left out, and why is in the report.

    Args:
        options: The command line.
        calibrators: Not fitted.
        inputs: The sets.

    Returns:
        The report.
    """
    notes = list(inputs.notes)
    rows: dict[str, dict[str, Row]] = {}
    for test in inputs.tests:
        rows[test.name] = {UNCALIBRATED: _row(options, test, UNCALIBRATED, test.predictions, notes)}
    fitted: dict[str, Fitted] = {}
    failed: dict[str, str] = {}
    for calibrator in calibrators:
        name = calibrator.name
        try:
            found = _fit(calibrator, inputs.calibration)
            applied = [calibrated(calibrator, with_logits(test.predictions), test.features) for test in inputs.tests]
        except Exception as error:  # whatever is wrong with one must not cost the others
            failed[name] = " ".join(str(error).split()) or type(error).__name__
            continue
        fitted[name] = found
        for test, predictions in zip(inputs.tests, applied, strict=True):
            rows[test.name][name] = _row(options, test, name, predictions, notes)
            notes += _losses(test, name, predictions)
    return Report(inputs, fitted, rows, failed, list(dict.fromkeys(notes)))


def _fit(calibrator: Calibrator, source: Source) -> Fitted:
    where = f"{type(calibrator).__name__}.fit: "
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrator.fit(source.logits, source.predictions.labels, source.features)
    return Fitted(calibrator, list(dict.fromkeys(str(warning.message).removeprefix(where) for warning in caught)))


def _row(options: Options, test: Source, name: str, predictions: Predictions, notes: list[str]) -> Row:
    states = states_of(options, predictions, details=options.intervals is not None)
    figures, warned = figures_of(options, states)
    notes += [f"{test.name}, {name}: {note}" for note in (*value_notes(predictions, figures.values), *warned)]
    return Row(figures, predictions.confidence is not None)


def _losses(test: Source, name: str, predictions: Predictions) -> Iterator[str]:
    before, after = _quality(test.predictions), _quality(predictions)
    for key, (title, meaning) in _QUALITIES.items():
        if before[key] - after[key] > NOTICEABLE:
            yield (
                f"{test.name}: {name} lowers the {title} from {100 * before[key]:.2f} to {100 * after[key]:.2f} %, "
                f"{meaning}"
            )


_QUALITIES = {
    "accuracy": ("accuracy", "as it changes which class is predicted"),
    "correctness_auroc": (
        "correctness AUROC",
        "so that its confidences tell right from wrong answers less well, which calibration errors do not show",
    ),
}


def _quality(predictions: Predictions) -> dict[str, float]:
    state = EvaluationState(list(_QUALITIES), input=predictions.input)
    state.update(*predictions[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not defined: no note compares with it
        return {key: float(value) for key, value in state.compute().items()}
