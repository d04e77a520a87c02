"""Accuracy, top-k accuracy, entropy, and the proper scores: negative log-likelihood and Brier score."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.checks import PROBS_TOLERANCE, InputKind, check_kind, check_shapes, check_values
from calib_lightning.metrics.functional.rows import checked_rows


def mean_of_rows(name: str, values: Tensor) -> Tensor:
    """Mean, 0-d float64, of values ``(N,)``; nan with a warning without rows."""
    if values.numel() == 0:
        warnings.warn(f"{name}: no rows were given; the result is nan", stacklevel=3)
    return values.mean(dtype=torch.float64)


def is_soft(labels: Tensor) -> bool:
    """Whether labels are soft: a floating-point matrix."""
    return isinstance(labels, Tensor) and labels.ndim == 2 and labels.is_floating_point()


def _any_labels(logits: Tensor) -> Tensor:
    """Valid class numbers, for checks of the scores alone."""
    rows = logits.shape[0] if isinstance(logits, Tensor) and logits.ndim else 0
    return torch.zeros(rows, dtype=torch.int64, device=logits.device if rows else None)


def check_soft_labels(logits: Tensor, labels: Tensor, where: str) -> None:
    """Refuse scores and soft labels of the wrong type or shape, without reading values."""
    check_shapes(logits, _any_labels(logits), None, where)
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"{where}: soft labels are {found}; they must be floating point. Divide counts of votes by their sum."
        )
    if labels.shape != logits.shape:
        raise ValueError(
            f"{where}: soft labels have shape {tuple(labels.shape)}; they must have the shape {tuple(logits.shape)} "
            "of the logits."
        )


def soft_label_faults(labels: Tensor) -> Tensor:
    """Mask ``(N,)`` of the rows that are not distributions: an entry is negative or NaN, or the sum is not 1."""
    wide = at_least_float32(labels.detach())
    return ~(((wide.sum(dim=-1) - 1.0).abs() <= PROBS_TOLERANCE) & (wide >= 0).all(dim=-1))


def check_soft_values(labels: Tensor, where: str) -> None:
    """Refuse soft labels that are not distributions; it reads them, so it is for tensors on the CPU."""
    faults = soft_label_faults(labels)
    count = int(faults.sum())
    if count:
        row = int(faults.int().argmax())
        values = labels[row].double()
        raise ValueError(
            f"{where}: {count} of {len(labels)} rows have invalid soft labels; row {row} has a smallest entry of "
            f"{float(values.min()):.6g} and sums to {float(values.sum()):.6g}; it must be >= 0 and sum to 1 "
            f"+- {PROBS_TOLERANCE}. Divide counts of votes by their sum."
        )


def soft_nll_rows(logits: Tensor, labels: Tensor, input: InputKind = "logits") -> Tensor:
    """Cross-entropy ``-sum_k y_k log p_k`` ``(N,)`` float64 in nats, with ``0 log 0 = 0``."""
    scores, targets = logits.detach().double(), labels.detach().double()
    if input == "probs":
        return -torch.xlogy(targets, scores).sum(dim=-1)
    return -(targets * scores.log_softmax(dim=-1)).sum(dim=-1)


def soft_brier_rows(logits: Tensor, labels: Tensor, input: InputKind = "logits") -> Tensor:
    """Squared distance ``sum_k (p_k - y_k)^2`` ``(N,)`` float64."""
    scores = logits.detach().double()
    probs = scores if input == "probs" else scores.softmax(dim=-1)
    return (probs - labels.detach().double()).square_().sum(dim=-1)


def label_entropy_rows(labels: Tensor) -> Tensor:
    """Entropy ``-sum_k y_k log y_k`` ``(N,)`` float64 of soft labels in nats, with ``0 log 0 = 0``."""
    entropy: Tensor = torch.special.entr(labels.detach().double()).sum(dim=-1)
    return entropy


def check_soft(name: str, logits: Tensor, labels: Tensor, input: InputKind) -> None:
    """Check type, shape and values of scores and soft labels; it reads them, so it is for tensors on the CPU."""
    check_kind(input)
    check_soft_labels(logits, labels, name)
    check_values(logits, _any_labels(logits), None, input, name)
    check_soft_values(labels, name)


def top_k_rows(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the k largest scores, ``(N,)`` bool; among equal scores the first class wins."""
    scores, column = scores.detach(), labels.long().unsqueeze(-1)
    # Counting is several times faster than sorting. This is the worst rank of the label among its ties, which settles
    # nearly all rows; a device would have to wait for the number of the others, so it checks every row again.
    at_most = (scores >= scores.gather(-1, column)).sum(dim=-1, dtype=torch.int32)
    if scores.device.type != "cpu":
        return at_most - _later_ties(scores, column) <= k
    among = at_most <= k
    unsure = (~among).nonzero().squeeze(-1)
    among[unsure] = at_most[unsure] - _later_ties(scores[unsure], column[unsure]) <= k
    return among


def _later_ties(scores: Tensor, column: Tensor) -> Tensor:
    """How many later classes have the score of the label."""
    later = torch.arange(scores.shape[-1], device=scores.device) > column
    return (later & (scores == scores.gather(-1, column))).sum(dim=-1, dtype=torch.int32)


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

    With soft labels it is the cross-entropy ``-sum_k y_k log p_k``, where ``0 log 0 = 0``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``, or soft labels ``(N, K)``, floating-point rows >= 0
            that sum to 1 +- 1e-3.
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
    if is_soft(labels):
        check_soft("nll", logits, labels, input)
        return mean_of_rows("nll", soft_nll_rows(logits, labels, input))
    return mean_of_rows("nll", checked_rows("nll", logits, labels, input=input).nll)


def brier(logits: Tensor, labels: Tensor, *, input: InputKind = "logits") -> Tensor:
    """Brier score (Brier, 1950): mean over rows of ``sum_k (p_k - [k = y])^2``, in ``[0, 2]``.

    With soft labels it is ``sum_k (p_k - y_k)^2``.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``, or soft labels ``(N, K)``, floating-point rows >= 0
            that sum to 1 +- 1e-3.
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
    if is_soft(labels):
        check_soft("brier", logits, labels, input)
        return mean_of_rows("brier", soft_brier_rows(logits, labels, input))
    return mean_of_rows("brier", checked_rows("brier", logits, labels, input=input).brier)


def entropy(logits: Tensor, *, input: InputKind = "logits") -> Tensor:
    """Mean entropy ``-sum_k p_k log p_k`` of the predictions (Shannon, 1948) in nats, with ``0 log 0 = 0``.

    It needs no labels.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, log K]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> entropy(torch.zeros(3, 4))
        tensor(1.3863, dtype=torch.float64)
    """
    return mean_of_rows("entropy", checked_rows("entropy", logits, _any_labels(logits), input=input).entropy)


def top_k_accuracy(logits: Tensor, labels: Tensor, *, k: int = 5, input: InputKind = "logits") -> Tensor:
    """Share of rows whose label is among the k largest scores (Russakovsky et al., 2015, with k = 5).

    Of equal scores the class with the lower number comes first, so k = 1 gives `accuracy`.

    Args:
        logits: Scores ``(N, K)``, floating point.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        k: Number of classes that count; from K on the result is 1.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, an invalid value (the first bad row is named) or ``k`` < 1.

    Example:
        >>> top_k_accuracy(torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), torch.tensor([1, 0]), k=2)
        tensor(0.5000, dtype=torch.float64)
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}; it must be an integer >= 1. The usual values are 1 and 5.")
    rows = checked_rows("top_k_accuracy", logits, labels, input=input)
    return mean_of_rows("top_k_accuracy", top_k_rows(rows.scores, rows.labels, k))
