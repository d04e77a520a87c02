"""Accuracy and the proper scores: negative log-likelihood and Brier score."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from calib_lightning.metrics.functional.rows import InputKind, checked_rows


def mean_of_rows(name: str, values: Tensor) -> Tensor:
    """Mean of one value a row in float64; nan and one warning where there are no rows.

    Args:
        name: Name of the metric, for the warning.
        values: ``(N,)``.

    Returns:
        0-d float64.
    """
    if values.numel() == 0:
        warnings.warn(f"{name}: no rows were given, the result is nan", stacklevel=3)
    return values.mean(dtype=torch.float64)


def accuracy(logits: Tensor, labels: Tensor, *, input: InputKind = "logits") -> Tensor:
    """Share of rows whose label is the predicted class, the first of the largest scores.

    Args:
        logits: Scores ``(N, K)``, floating point.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> accuracy(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor(0.5000, dtype=torch.float64)
    """
    return mean_of_rows("accuracy", checked_rows("accuracy", logits, labels, input=input).correct)


def nll(logits: Tensor, labels: Tensor, *, input: InputKind = "logits") -> Tensor:
    """Mean negative log-likelihood ``-log p_y`` in nats, without clipping.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 >= 0; ``inf`` where a given probability of a label is 0; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> nll(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        tensor(1.3863, dtype=torch.float64)
    """
    return mean_of_rows("nll", checked_rows("nll", logits, labels, input=input).nll)


def brier(logits: Tensor, labels: Tensor, *, input: InputKind = "logits") -> Tensor:
    """Brier score (Brier, 1950): mean over rows of ``sum_k (p_k - [k = y])^2``, in ``[0, 2]``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 2]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> brier(torch.zeros(1, 4), torch.tensor([0]))
        tensor(0.7500, dtype=torch.float64)
    """
    return mean_of_rows("brier", checked_rows("brier", logits, labels, input=input).brier)
