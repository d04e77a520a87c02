"""What a calibrator makes worse: refinement on one set, errors on shifted ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from calib_lightning.metrics import Family, mean_values
from calib_lightning.predictions.paired import changes
from calib_lightning.predictions.reading import Predictions
from calib_lightning.predictions.values import filled_state

NOTICEABLE = 0.005
"""Change for the worse that is noted: of accuracy, correctness AUROC or ECE as a fraction, of NLL in nats."""

LOST_REFINEMENT = (
    "where the correctness AUROC falls, confidences separate right from wrong answers less well; calibration errors do "
    "not show that"
)
"""One note for all calibrators that lower it noticeably."""

_QUALITIES = {"accuracy": "accuracy", "correctness_auroc": "correctness AUROC"}
_ERRORS = ("nll", "ece")


def losses(before: Predictions, after: Predictions, name: str, calibrator: str, bins: int) -> Iterator[str]:
    """Remarks on what a calibrator makes worse on a set.

    Args:
        before: The set.
        after: The set after the calibrator.
        name: Name of the set.
        calibrator: Name of the calibrator.
        bins: Number of bins of the ECE.

    Yields:
        Remarks without full stops.
    """
    old, new = quality(before, bins), quality(after, bins)
    fallen = [key for key in _QUALITIES if old[key] - new[key] > NOTICEABLE]
    change = changes(before, after) if fallen else {}
    lost = [key for key in fallen if not change[key].high >= 0.0]  # nan is no reason to be silent
    said = [
        f"the {_QUALITIES[key]} from {100 * old[key]:.2f} to {100 * new[key]:.2f} % (paired 95 % interval of the "
        f"change: {100 * change[key].low:+.2f} to {100 * change[key].high:+.2f})"
        for key in lost
    ]
    if said:
        yield f"{name}: {calibrator} lowers {' and '.join(said)}"
    risen = [key for key in _ERRORS if new[key] - old[key] > NOTICEABLE]
    errors = {
        "nll": f"the NLL from {old['nll']:.4f} to {new['nll']:.4f}",
        "ece": f"the ECE from {100 * old['ece']:.2f} to {100 * new['ece']:.2f} %",
    }
    if risen:
        yield f"{name}: {calibrator} raises {' and '.join(errors[key] for key in risen)}"
    if "correctness_auroc" in lost:
        yield LOST_REFINEMENT


def quality(predictions: Predictions, bins: int) -> dict[str, float]:
    """Accuracy, correctness AUROC, NLL and ECE of a set."""
    state = filled_state(predictions, [*_QUALITIES, *_ERRORS], bins, details=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined values never cause a note here
        return {key: float(value) for key, value in state.compute().items()}


def losses_of_family(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], family: Family, calibrator: str
) -> Iterator[str]:
    """Remarks on what a calibrator makes worse on average over corruptions.

    Args:
        before: Values of each set by name.
        after: Values after the calibrator.
        family: The corruptions of one benchmark.
        calibrator: Name of the calibrator.

    Yields:
        Remarks without full stops.
    """
    old, new = (mean_values([values[name] for name in family.members]) for values in (before, after))
    where = f"{family.name} ({len(family.members)} sets): {calibrator}"
    shown = {"nll": ("NLL", 1.0, "{:.4f}"), "ece": ("ECE", 100.0, "{:.2f}")}
    risen = [
        f"the mean {title} from {text.format(scale * old[key])} to {text.format(scale * new[key])}{' %' * (scale > 1)}"
        for key, (title, scale, text) in shown.items()
        if key in old and new[key] - old[key] > NOTICEABLE
    ]
    if risen:
        yield f"{where} raises {' and '.join(risen)}"
    fallen = [
        f"the mean {title} from {100 * old[key]:.2f} to {100 * new[key]:.2f} %"
        for key, title in _QUALITIES.items()
        if key in old and old[key] - new[key] > NOTICEABLE
    ]
    if fallen:
        yield f"{where} lowers {' and '.join(fallen)}"
