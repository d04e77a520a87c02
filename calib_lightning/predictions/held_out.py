"""Reject calibration rows that are not held out: test rows, or rows that selected the checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from calib_lightning.predictions.class_names import same_classes
from calib_lightning.predictions.csv_header import quoted
from calib_lightning.predictions.reading import Predictions

_SAMPLED_ROWS, _SAMPLED_CLASSES = 200, 8

LOOKS_BETTER = "on the rows that it was fitted to, a calibrator looks better than it is. Give held-out rows."
"""Reason to reject shared rows."""


def check_role(path: Path, run: Path | None) -> None:
    """Reject the validation and test sets of a run as calibration rows."""
    within = None if run is None else run.resolve() / "predictions"
    if within is not None and path.resolve().is_relative_to(within) and path.stem != "calibration":
        use = "selected its checkpoint" if path.stem == "val" else "is one of its test sets"
        raise ValueError(
            f"{path} is the set {path.stem!r} of the run {run}, which {use}; calibrators must be fitted to other "
            f"rows. Give {within / 'calibration.npz'}."
        )


def check_apart(calibration: Predictions, test: Predictions) -> list[str]:
    """Reject test rows among the calibration rows; a few, which may be a coincidence, are only noted."""
    places = f"{calibration.where} and {test.where}"
    if calibration.scores.shape[1] != test.scores.shape[1]:
        raise ValueError(
            f"{places} must have the same classes, but have {calibration.scores.shape[1]} and {test.scores.shape[1]}."
        )
    names, test_names = calibration.origin.class_names, test.origin.class_names
    if not same_classes(names, test_names):
        raise ValueError(
            f"{places} must have the same classes in the same order, but have {quoted(names or ())} and "
            f"{quoted(test_names or ())}."
        )
    rows, test_rows = _distinct_rows(calibration), _distinct_rows(test)
    shared = len(rows & test_rows)
    same = calibration.scores.shape == test.scores.shape and rows == test_rows
    # If a network predicts the same for all images, each set repeats a few rows, which two sets may share.
    repeats = len(rows) < len(calibration.labels) or len(test_rows) < len(test.labels)
    by_chance = shared == 0 or (repeats and shared <= calibration.scores.shape[1])
    if (same and torch.equal(calibration.labels, test.labels)) or (
        shared == min(len(rows), len(test_rows)) and not by_chance
    ):
        raise ValueError(f"{places} hold the same rows (equal scores and labels): {LOOKS_BETTER}")
    if not repeats and _share_of_twins(calibration, test) > 0.5:
        raise ValueError(f"{places} hold the same rows up to rounding (scores and labels): {LOOKS_BETTER}")
    if by_chance:
        return []
    return [
        f"{shared} of its {len(test_rows)} distinct rows have the scores and label of a calibration row: usual where "
        "scores are rounded or saturated; otherwise the sets share these rows"
    ]


def check_widths(calibration: Predictions, tests: Mapping[str, Predictions]) -> None:
    """Reject features of different widths."""
    assert calibration.features is not None
    for test in tests.values():
        assert test.features is not None
        if calibration.features.shape[1] != test.features.shape[1]:
            raise ValueError(
                f"{calibration.where} and {test.where} must have features of the same width, but have widths "
                f"{calibration.features.shape[1]} and {test.features.shape[1]}."
            )


def _distinct_rows(predictions: Predictions) -> set[bytes]:
    # float32, so that a copy in double precision is recognised
    scores, labels = predictions.scores.float().numpy(), predictions.labels.numpy()
    return {
        hashlib.blake2b(row.tobytes() + label.tobytes(), digest_size=16).digest()
        for row, label in zip(scores, labels, strict=True)
    }


def _share_of_twins(mine: Predictions, others: Predictions) -> float:
    """Fraction of test rows that equal a calibration row up to rounding, from a sample of rows and classes."""
    rows = torch.linspace(0, len(others.labels) - 1, min(len(others.labels), _SAMPLED_ROWS)).long()
    classes = slice(_SAMPLED_CLASSES)
    scores, looked_at = mine.scores[:, classes].double(), others.scores[rows, classes].double()
    # Two classes leave one number, which may be close to that of another row by chance.
    limit = (1e-4 if scores.shape[1] > 2 else 1e-6) * float(scores.std())
    twins = 0
    for row, label in zip(looked_at, others.labels[rows].tolist(), strict=True):
        gap = (scores[mine.labels == label] - row).abs().amax(dim=1)
        twins += len(gap) > 0 and float(gap.min()) <= limit
    return twins / max(1, len(rows))
