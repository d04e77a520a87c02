"""Values of the metrics of a set, their intervals, and notes on undefined values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import Tensor

from calib_lightning.metrics import (
    CORE,
    FULL,
    METRICS,
    SOFT,
    Difference,
    EvaluationState,
    Interval,
    SoftLabelScores,
    bootstrap_intervals,
)
from calib_lightning.metrics.functional.undefined import why_undefined
from calib_lightning.predictions.reading import Predictions
from calib_lightning.predictions.settings import Settings
from calib_lightning.utils.names import did_you_mean

MOST_CLASSES_OF_OVO = 200
"""With more classes, `ovo_auroc` is computed only on request."""

_ROWS_AT_ONCE = 8192
_ORDER = {key: place for place, key in enumerate([*FULL, *SOFT])}

T = TypeVar("T")


class Values(NamedTuple):
    """Values of a set (fractions, nan if undefined), any intervals, and any differences to another run.

    A key ends in ``@M`` if there are several numbers of bins.
    """

    values: dict[str, float]
    intervals: dict[str, Interval]
    differences: dict[str, Difference]


def selected_metrics(which: str | None, classes: int) -> tuple[str, ...]:
    """Keys for `Settings.metrics` and K classes, in the order of reports; those of `SOFT` are allowed but omitted."""
    which_or_all = "all" if which is None else which
    sets = {"core": CORE, "all": FULL}
    wanted = tuple(key for part in which_or_all.split(",") if part for key in sets.get(part, (part,)))
    unknown = [key for key in wanted if key not in METRICS and key not in SOFT]
    if unknown or not wanted:
        raise ValueError(
            f"metrics: unknown {', '.join(map(repr, unknown)) or repr(which)}; it must be core, all, or some of "
            f"{', '.join([*FULL, *SOFT])}.{did_you_mean(unknown[0], [*FULL, *SOFT]) if unknown else ''}"
        )
    if which is None and classes > MOST_CLASSES_OF_OVO:
        wanted = tuple(key for key in wanted if key != "ovo_auroc")
    return tuple(sorted(set(wanted) - SOFT.keys(), key=_ORDER.__getitem__))


def states_of(settings: Settings, predictions: Predictions, details: bool) -> dict[str, EvaluationState]:
    """One filled state for each number of bins, by the suffix of its keys, and one for metrics without bins.

    ``details`` keeps the rows, as intervals require.
    """
    metrics = selected_metrics(settings.metrics, predictions.scores.shape[1])
    if len(settings.bins) == 1:
        return {"": filled_state(predictions, metrics, settings.bins[0], details)}
    plain, binned = ([key for key in metrics if METRICS[key].binned == wanted] for wanted in (False, True))
    states = {f"@{bins}": filled_state(predictions, binned, bins, details) for bins in settings.bins if binned}
    return states | ({"": filled_state(predictions, plain, settings.bins[0], details)} if plain else {})


def filled_state(predictions: Predictions, metrics: Sequence[str], n_bins: int, details: bool) -> EvaluationState:
    """A state filled with the rows of a set, in blocks."""
    scores, labels, confidence = predictions[:3]
    state = EvaluationState(metrics, n_bins, details=details, input=predictions.input)
    for start in range(0, max(1, len(labels)), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        state.update(scores[rows], labels[rows], None if confidence is None else confidence[rows])
    return state


def values_of(
    settings: Settings, states: Mapping[str, EvaluationState], predictions: Predictions
) -> tuple[Values, list[str]]:
    """Compute values and requested intervals (none for `SOFT`) from `states_of`; also return warnings as notes."""
    warned: list[str] = []
    intervals: dict[str, Interval] = {}
    with warnings_as_notes(warned):
        values = merged({end: state.compute() for end, state in states.items()})
        values |= _soft_values(settings, predictions)
        if settings.intervals is not None:
            draw = (settings.intervals, settings.level, settings.seed)
            intervals = merged({end: bootstrap_intervals(state, *draw) for end, state in states.items()})
    return Values({key: float(value) for key, value in values.items()}, intervals, {}), warned


def merged(found: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Merge the results for several numbers of bins, in the order of reports."""
    named = {key + end: value for end, values in found.items() for key, value in values.items()}
    return dict(sorted(named.items(), key=lambda item: _ORDER[item[0].partition("@")[0]]))


@contextmanager
def warnings_as_notes(notes: list[str]) -> Iterator[None]:
    """Turn warnings into notes, except those about undefined values, which `value_notes` covers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if not issubclass(warning.category, UserWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif not str(warning.message).endswith(" nan"):
            notes.append(str(warning.message))


def value_notes(predictions: Predictions, values: Mapping[str, float]) -> Iterator[str]:
    """Which values of a set are infinite or undefined, and why, without full stops."""
    scores, labels = predictions[:2]
    infinite = [key for key, value in values.items() if math.isinf(value)]
    if infinite:
        yield f"{', '.join(infinite)} infinite: a label has probability 0"
    if values.get("calibration_nll", 0.0) < 0.0:
        yield (
            "calibration_nll is below 0: hardly any temperature improves these rows, and the smoothing of its "
            "reference, 1 row in N + 1, costs more than the best one gains"
        )
    undefined = [key for key, value in values.items() if math.isnan(value)]
    if undefined:
        correct = int((scores.argmax(dim=1) == labels).sum())
        names = "all metrics" if len(undefined) == len(values) else ", ".join(undefined)
        yield f"{names} undefined: {why_undefined(len(labels), correct)}"


def _soft_values(settings: Settings, predictions: Predictions) -> dict[str, Tensor]:
    asked = (settings.metrics or "all").split(",")
    named = [key for key in SOFT if key in asked]
    if predictions.label_distribution is None:
        if named:
            raise ValueError(
                f"metrics: {', '.join(named)} needs an array 'label_distribution' (N, K) in each file: the class "
                "distribution of each row, such as the votes of annotators."
            )
        return {}
    scores = SoftLabelScores(input=predictions.input)
    scores.update(predictions.scores, predictions.label_distribution)
    return {key: value for key, value in scores.compute().items() if key in named or asked[0] in ("all", "core")}
