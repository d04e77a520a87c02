"""How well the probability of each class ranks its rows above those of each other class."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.rows import checked_rows
from calib_lightning.metrics.functional.undefined import warn_undefined, why_undefined

_BLOCK = 2**18
_REPLICATES = 64


def class_log_odds(logits: Tensor) -> Tensor:
    """Log-odds ``z_k - logsumexp(z without k)`` ``(N, K)`` float64: they rise with ``p_k`` and never saturate."""
    rows, classes = logits.shape
    result = torch.empty(rows, classes, dtype=torch.float64, device=logits.device)
    step = max(1, _BLOCK // max(1, classes))
    for some, out in zip(torch.split(logits.detach(), step), torch.split(result, step), strict=True):
        scores = some.to(torch.float64, copy=True)
        top, index = scores.max(dim=-1, keepdim=True)
        others = scores.scatter(-1, index, -torch.inf)
        second = others.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(others.dtype).min)
        # The sums without class k have the form 1 + something, exactly 1 with two classes, so equal probabilities have
        # equal scores. The top class is taken relative to the runner-up; otherwise it would underflow.
        of_top = top - second - torch.log1p((others - second).exp_().sum(dim=-1, keepdim=True) - 1.0)
        shifted = scores.sub_(top)
        odds = shifted.exp().scatter_(-1, index, 0.0)
        torch.sub(shifted, torch.log1p((odds.sum(dim=-1, keepdim=True) - odds).clamp_min_(0.0)), out=out)
        out.scatter_(-1, index, of_top)
    return result


def weighted_ovo_auroc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """`ovo_auroc` ``(B,)`` for B weightings ``(B, N)`` of the rows; ``scores`` rank like probabilities."""
    # For each class i its rows are sorted by their score of i, every row is looked up among them, and the weight of the
    # rows of i above it (a tie counts one half) is summed by label: O(N log N) per class for the order, O(B N) for the
    # sums.
    scores, labels = scores.detach(), labels.long()
    replicates, classes = len(weights), scores.shape[1]
    total = torch.zeros(replicates, dtype=torch.float64, device=scores.device)
    pairs = torch.zeros_like(total)
    members = [(labels == i).nonzero().squeeze(-1) for i in range(classes)]
    for some in range(0, replicates, _REPLICATES):
        part = slice(some, some + _REPLICATES)
        by_row = weights[part].double().T.contiguous()
        by_class = by_row.new_zeros(classes, by_row.shape[1]).index_add_(0, labels, by_row)
        for i, rows in enumerate(members):
            if len(rows) == 0:
                continue
            column = scores[:, i].contiguous()
            own, order = column[rows].sort()
            # weight_above[r]: weight of the rows of class i from position r on.
            weight_above = by_row.new_zeros(len(rows) + 1, by_row.shape[1])
            weight_above[1:] = by_row[rows[order.flip(0)]].cumsum_(dim=0)
            weight_above = weight_above.flip(0)
            first = torch.searchsorted(own, column)
            last = torch.searchsorted(own, column, right=True)
            above = weight_above.index_select(0, first).add_(weight_above.index_select(0, last)).mul_(by_row)
            wins = torch.zeros_like(by_class).index_add_(0, labels, above)
            sizes = by_class * (2.0 * by_class[i])
            sizes[i] = 0.0
            total[part] += torch.where(sizes > 0, wins / sizes, 0.0).sum(dim=0)
            pairs[part] += (sizes > 0).sum(dim=0)
    return total / pairs


def ovo_auroc(logits: Tensor, labels: Tensor, *, input: InputKind = "logits") -> Tensor:
    """One-vs-one area under the ROC curve of the classes (Hand and Till, 2001), averaged over pairs of classes.

    ``mean_{i<j} (A(i|j) + A(j|i)) / 2``, where ``A(i|j)`` is the chance that a row of class i has a larger ``p_i``
    than a row of class j; a tie counts one half. With two classes it is the AUROC of ``p_1``. It is about classes; how
    well the confidence separates correct from wrong predictions is `correctness_auroc`.

    From logits the rows are ranked by the log-odds ``z_i - logsumexp(z without i)`` in float64, which keep the order
    of probabilities that round to 0 or 1. It takes ``8 N K`` bytes and ``K`` sorts.

    Deviations: classes without rows are left out, with a warning, instead of making the result undefined.

    Args:
        logits: Scores ``(N, K)``, floating point.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless two classes have rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]])
        >>> ovo_auroc(probs, torch.tensor([0, 0, 1, 1]), input="probs")
        tensor(0.7500, dtype=torch.float64)
    """
    rows = checked_rows("ovo_auroc", logits, labels, input=input)
    classes = logits.shape[1]
    present = int((torch.bincount(rows.labels, minlength=classes) > 0).sum())
    if present < 2:
        reason = why_undefined(0) if present == 0 else "all rows have the same label; rows of two classes are needed"
        warn_undefined("ovo_auroc", (), reason, stacklevel=2)
    elif present < classes:
        message = f"ovo_auroc: {classes - present} of {classes} classes have no rows; their pairs are left out"
        warnings.warn(message, stacklevel=2)
    scores = rows.scores if rows.is_probs else class_log_odds(rows.scores)
    return weighted_ovo_auroc(scores, rows.labels, torch.ones(1, len(labels), device=logits.device)).squeeze(0)
