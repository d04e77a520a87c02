"""How well the confidence ranks correct above incorrect predictions."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from calib_lightning.metrics.functional.rows import InputKind, checked_rows


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Exact area under the ROC curve, ``(R - P (P + 1) / 2) / (P N)`` with R the sum of the midranks of positives.

    It is the chance that a positive row outranks a negative one, a tie counting one half (Mann and Whitney, 1947).
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
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ValueError(f"auroc: scores {tuple(scores.shape)} and positive {tuple(positive.shape)} must both be (N,)")
    if bool(scores.isnan().any()):
        raise ValueError(f"auroc: {int(scores.isnan().sum())} of {len(scores)} scores are NaN; give comparable numbers")
    total = len(scores)
    positives = int(positive.sum())
    if positives in (0, total):
        kind = "no rows" if total == 0 else f"all {total} rows are {'positive' if positives else 'negative'}"
        warnings.warn(f"auroc: {kind}; it needs both positive and negative rows, the result is nan", stacklevel=2)
        return torch.full((), torch.nan, dtype=torch.float64, device=scores.device)
    ordered, order = scores.sort()
    # Position just after each group of equal scores, and the rows and positives up to there.
    last = torch.ones(total, dtype=torch.bool, device=scores.device)
    torch.ne(ordered[1:], ordered[:-1], out=last[:-1])
    ends = last.nonzero().squeeze(-1) + 1
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    hits = positive.bool()[order].cumsum(0)[ends - 1]
    hits = torch.diff(hits, prepend=hits.new_zeros(1))
    twice_rank_sum = (hits * (starts + ends + 1)).sum()
    return (twice_rank_sum - positives * (positives + 1)).double() / (2.0 * positives * (total - positives))


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
    return auroc(rows.log_odds, rows.correct)
