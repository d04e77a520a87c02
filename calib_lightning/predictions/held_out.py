"""Refusing rows that calibrators must not be fitted to: those that they are measured on, or that chose the network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from calib_lightning.predictions.reading import Predictions

_SAMPLED_ROWS, _SAMPLED_CLASSES = 200, 8

LOOKS_BETTER = "a calibrator looks better than it is on the rows that it was fitted to; give held-out rows"
"""Why rows must not be shared."""


def check_role(path: Path, run: Path | None) -> None:
    """Refuse the validation and test sets of a run as calibration rows."""
    within = None if run is None else run.resolve() / "predictions"
    if within is not None and path.resolve().is_relative_to(within) and path.stem != "calibration":
        use = "chose its checkpoint" if path.stem == "val" else "is what it is tested on"
        raise ValueError(
            f"{path}: is the set {path.stem!r} of the run {run}, which {use}; calibrators are fitted to other "
            f"rows: give {within / 'calibration.npz'}"
        )


def check_apart(calibration: Predictions, test: Predictions, name: str) -> list[str]:
    """Refuse test rows among the rows of the fit; a few of them, which may be a coincidence, are a note."""
    places = f"{calibration.where} and {test.where}"
    if calibration.scores.shape[1] != test.scores.shape[1]:
        raise ValueError(
            f"{places} must have the same classes: {calibration.scores.shape[1]} and {test.scores.shape[1]}"
        )
    rows, test_rows = _distinct_rows(calibration), _distinct_rows(test)
    shared = len(rows & test_rows)
    same = calibration.scores.shape == test.scores.shape and rows == test_rows
    # Where a network says the same of all images, each set repeats the few rows that there are, and two share them.
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
    return [f"{name}: {shared} of its rows are also among the rows that the calibrators are fitted to"]


def check_widths(calibration: Predictions, tests: Mapping[str, Predictions]) -> None:
    """Refuse features of different widths."""
    assert calibration.features is not None
    for test in tests.values():
        assert test.features is not None
        if calibration.features.shape[1] != test.features.shape[1]:
            raise ValueError(
                f"{calibration.where} and {test.where} must have features of the same width: "
                f"{calibration.features.shape[1]} and {test.features.shape[1]}"
            )


def _distinct_rows(predictions: Predictions) -> set[bytes]:
    # float32, so that a copy in double precision is known again
    scores, labels = predictions.scores.float().numpy(), predictions.labels.numpy()
    return {
        hashlib.blake2b(row.tobytes() + label.tobytes(), digest_size=16).digest()
        for row, label in zip(scores, labels, strict=True)
    }


def _share_of_twins(mine: Predictions, others: Predictions) -> float:
    """Share of test rows that equal a row of the fit up to rounding, from a sample of rows and classes."""
    rows = torch.linspace(0, len(others.labels) - 1, min(len(others.labels), _SAMPLED_ROWS)).long()
    classes = slice(_SAMPLED_CLASSES)
    scores, looked_at = mine.scores[:, classes].double(), others.scores[rows, classes].double()
    # Two classes leave one number, which comes close to that of another row by chance.
    limit = (1e-4 if scores.shape[1] > 2 else 1e-6) * float(scores.std())
    twins = 0
    for row, label in zip(looked_at, others.labels[rows].tolist(), strict=True):
        gap = (scores[mine.labels == label] - row).abs().amax(dim=1)
        twins += len(gap) > 0 and float(gap.min()) <= limit
    return twins / max(1, len(rows))
