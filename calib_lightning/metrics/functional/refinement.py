"""How well the confidence ranks correct above wrong predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.undefined import warn_undefined, why_undefined

SLACK = 1e-12
"""Relative slack of a comparison with a given rate, as sums of fractional weights are rounded. Counts below 1e11 never
come that near to a rate of two digits without being equal to it."""


def auroc_from_ordered(ordered: Ordered) -> Tensor:
    """`auroc` ``(...)`` of groups ``(..., G)``: ``sum_g correct_g (wrong below g + wrong_g / 2) / (P N)``."""
    wrong = ordered.wrong
    # Twice the area in pairs: whole numbers for counts, so the result does not depend on the order of the sums.
    below = wrong.cumsum(-1).mul_(2.0).sub_(wrong)
    pairs = ordered.correct.sum(-1) * wrong.sum(-1)
    return below.mul_(ordered.correct).sum(-1) / (2.0 * pairs)


def _average_precision(positives: Tensor, count: Tensor) -> Tensor:
    """Average precision of groups in the order in which a threshold accepts them."""
    # Until one is accepted the precision is 0 / tiny, with weight 0.
    precision = positives.cumsum(-1).div_(count.cumsum(-1).clamp_min_(torch.finfo(count.dtype).tiny))
    return precision.mul_(positives).sum(-1) / positives.sum(-1)


def average_precision_from_ordered(ordered: Ordered) -> Tensor:
    """`aupr_success` ``(...)`` of groups ``(..., G)``: the average precision of correct rows, as in scikit-learn."""
    return _average_precision(ordered.correct.flip(-1), ordered.count.flip(-1))


def aupr_error_from_ordered(ordered: Ordered) -> Tensor:
    """`aupr_error` ``(...)`` of groups ``(..., G)``: the average precision of wrong rows, lowest score first."""
    return _average_precision(ordered.wrong, ordered.count)


def fpr_at_tpr_from_ordered(ordered: Ordered, tpr: float = 0.95) -> Tensor:
    """Share ``(...)`` of wrong rows above the highest threshold that at least ``tpr`` of the correct rows pass."""
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"tpr is {tpr!r}; it must be in (0, 1]. The usual value is 0.95.")
    correct, wrong = ordered.correct, ordered.wrong
    positives = correct.sum(-1, keepdim=True)
    # A group is needed if too few correct rows lie above it. Quotients are compared, as 0.95 * 20 rounds above 19.
    passed_above = positives - correct.cumsum(-1)
    needed = passed_above.div_(positives) < tpr * (1.0 - SLACK)
    rate = torch.where(needed, wrong, 0.0).sum(-1) / wrong.sum(-1)
    return torch.where(positives.squeeze(-1) > 0, rate, torch.nan)


def _checked(name: str, value: Tensor, positive: Tensor) -> Tensor:
    """The value; if it is nan, with a warning that names the missing side."""
    if bool(torch.isnan(value)):
        total, positives = len(positive), int(positive.sum())
        reason = why_undefined(total)
        if total and positives in (0, total):
            present, missing = ("positive", "negative") if positives else ("negative", "positive")
            reason = f"all {total} rows are {present}; {missing} rows are needed too"
        warn_undefined(name, (), reason, stacklevel=3)
    return value


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Exact area under the ROC curve, ``(R - P (P + 1) / 2) / (P N)`` with R the sum of the midranks of positives.

    It is the chance that a positive row outranks a negative one; a tie counts one half (Mann and Whitney, 1947).
    One sort; the counts are integers, so the result does not depend on the order of the rows.

    Args:
        scores: ``(N,)``, floating point; infinite scores are allowed.
        positive: ``(N,)`` bool.

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless there are both positive and negative rows.

    Raises:
        ValueError: The shapes differ, or a score is NaN.

    Example:
        >>> auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True]))
        tensor(0.8750, dtype=torch.float64)
    """
    return _checked("auroc", auroc_from_ordered(order_rows(scores, positive)), positive)


def correctness_auroc(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> Tensor:
    """Area under the ROC curve of "the prediction is correct", ranked by confidence (Hendrycks and Gimpel, 2017).

    The score is the log-odds of the confidence, ``log c - log(1 - c)``. From logits it is computed as the margin
    ``z_top - logsumexp(z without top)``, which keeps the order of confidences that round to 1.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless there are both correct and incorrect predictions.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> correctness_auroc(logits, torch.tensor([0, 1, 0]))
        tensor(0.5000, dtype=torch.float64)
    """
    rows = checked_rows("correctness_auroc", logits, labels, confidence, input)
    value = auroc_from_ordered(order_rows(rows.log_odds, rows.correct))
    return _checked("correctness_auroc", value, rows.correct)


def aupr_success(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> Tensor:
    """Area under the precision-recall curve of "correct", high confidence first (Hendrycks and Gimpel, 2017).

    ``sum_t (recall_t - recall_{t-1}) precision_t`` over the falling thresholds t; rows with equal confidence share
    one. Without skill it equals the accuracy.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without correct predictions.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> aupr_success(logits, torch.tensor([0, 1, 0]))
        tensor(0.8333, dtype=torch.float64)
    """
    rows = checked_rows("aupr_success", logits, labels, confidence, input)
    value = average_precision_from_ordered(order_rows(rows.log_odds, rows.correct))
    return _checked("aupr_success", value, rows.correct)


def aupr_error(
    logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits"
) -> Tensor:
    """Area under the precision-recall curve of "incorrect", low confidence first (Hendrycks and Gimpel, 2017).

    ``sum_t (recall_t - recall_{t-1}) precision_t`` over the rising thresholds t; rows with equal confidence share
    one. Without skill it equals the error rate.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, without incorrect predictions.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> aupr_error(logits, torch.tensor([0, 1, 0]))
        tensor(0.5000, dtype=torch.float64)
    """
    rows = checked_rows("aupr_error", logits, labels, confidence, input)
    value = aupr_error_from_ordered(order_rows(rows.log_odds, rows.correct))
    return _checked("aupr_error", value, rows.correct)


def fpr95(logits: Tensor, labels: Tensor, *, confidence: Tensor | None = None, input: InputKind = "logits") -> Tensor:
    """Share of wrong predictions above the threshold that 95 % of the correct ones pass (after Liang et al., 2018).

    ``FPR(t)`` at the highest threshold t of the confidence with ``TPR(t) >= 0.95``; correct is positive.

    Args:
        logits: Scores ``(N, K)``, floating point; half precision is widened to float32 first.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless there are both correct and incorrect predictions.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
        >>> fpr95(logits, torch.tensor([0, 1, 0]))
        tensor(1., dtype=torch.float64)
    """
    rows = checked_rows("fpr95", logits, labels, confidence, input)
    return _checked("fpr95", fpr_at_tpr_from_ordered(order_rows(rows.log_odds, rows.correct)), rows.correct)
