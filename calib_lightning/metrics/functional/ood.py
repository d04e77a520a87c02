"""How well a score tells in-distribution rows, the positive side, from others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.refinement import (
    aupr_error_from_ordered,
    auroc_from_ordered,
    average_precision_from_ordered,
    fpr_at_tpr_from_ordered,
)
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.metrics.functional.undefined import warn_undefined, why_undefined


def check_ood_shapes(scores: Tensor, is_id: Tensor, where: str) -> None:
    """Refuse inputs of the wrong type or shape, without reading values."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{where}: scores is {found}; it must be a floating-point tensor (N,). Convert with .float().")
    if not isinstance(is_id, Tensor) or is_id.dtype != torch.bool:
        found = is_id.dtype if isinstance(is_id, Tensor) else type(is_id).__name__
        raise TypeError(f"{where}: is_id is {found}; it must be a bool tensor (N,), true for in-distribution rows.")
    if scores.ndim != 1 or scores.shape != is_id.shape:
        shapes = f"{tuple(scores.shape)} and {tuple(is_id.shape)}"
        raise ValueError(f"{where}: the shapes of scores and is_id are {shapes}; both must be (N,).")


def check_ood_values(scores: Tensor, where: str) -> None:
    """Refuse NaN scores; it reads them, so it is for tensors on the CPU."""
    wrong = scores.isnan()
    if bool(wrong.any()):
        first = int(wrong.int().argmax())
        raise ValueError(
            f"{where}: {int(wrong.sum())} of {len(scores)} scores are NaN, the first in row {first}; "
            "they must not be NaN (inf is allowed)."
        )


def why_one_sided(total: int, inside: int) -> str:
    """The clause of a warning that names the missing kind of rows."""
    if total == 0:
        return why_undefined(0)
    side, other = ("in", "out-of") if inside else ("out-of", "in")
    return f"all {total} rows are {side}-distribution; {other}-distribution rows are needed too"


def _checked_ood(name: str, scores: Tensor, is_id: Tensor, value: Callable[[Ordered], Tensor]) -> Tensor:
    check_ood_shapes(scores, is_id, name)
    check_ood_values(scores, name)
    total, inside = len(scores), int(is_id.sum())
    if inside in (0, total):
        warn_undefined(name, (), why_one_sided(total, inside), stacklevel=3)
        return torch.full((), torch.nan, dtype=torch.float64, device=scores.device)
    return value(order_rows(scores, is_id))


def ood_auroc(scores: Tensor, is_id: Tensor) -> Tensor:
    """Area under the ROC curve of "the row is in-distribution" (Hendrycks and Gimpel, 2017); higher is better.

    It is the chance that an in-distribution row outranks an out-of-distribution one; a tie counts one half.

    Args:
        scores: ``(N,)``, floating point, any score that is higher in-distribution (a confidence, or an entropy with
            its sign reversed); infinite scores are allowed.
        is_id: ``(N,)`` bool, true for in-distribution rows, which are the positive ones.

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless there are rows of both kinds.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, or a score is NaN.

    Example:
        >>> ood_auroc(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        tensor(0.5000, dtype=torch.float64)
    """
    return _checked_ood("ood_auroc", scores, is_id, auroc_from_ordered)


def ood_aupr(scores: Tensor, is_id: Tensor) -> Tensor:
    """Area under the precision-recall curve of "the row is in-distribution"; higher is better.

    ``sum_t (recall_t - recall_{t-1}) precision_t`` over the falling thresholds t of the score (Hendrycks and Gimpel,
    2017). Without skill it equals the share of in-distribution rows.

    Args:
        scores: ``(N,)``, floating point, any score that is higher in-distribution; infinite scores are allowed.
        is_id: ``(N,)`` bool, true for in-distribution rows, which are the positive ones.

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless there are rows of both kinds.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, or a score is NaN.

    Example:
        >>> ood_aupr(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        tensor(0.8333, dtype=torch.float64)
    """
    return _checked_ood("ood_aupr", scores, is_id, average_precision_from_ordered)


def ood_aupr_out(scores: Tensor, is_id: Tensor) -> Tensor:
    """Area under the precision-recall curve of "the row is out-of-distribution"; higher is better.

    `ood_aupr` with the sides exchanged and the sign of the scores reversed: without skill it equals the share of
    out-of-distribution rows.

    Args:
        scores: ``(N,)``, floating point, any score that is higher in-distribution; infinite scores are allowed.
        is_id: ``(N,)`` bool, true for in-distribution rows; the others are the positive ones.

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless there are rows of both kinds.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, or a score is NaN.

    Example:
        >>> ood_aupr_out(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        tensor(0.5000, dtype=torch.float64)
    """
    return _checked_ood("ood_aupr_out", scores, is_id, aupr_error_from_ordered)


def ood_fpr95(scores: Tensor, is_id: Tensor) -> Tensor:
    """Share of other rows that pass if 95 % of in-distribution rows do (Liang et al., 2018); lower is better.

    ``FPR(t)`` at the highest threshold t of the score with ``TPR(t) >= 0.95``, without interpolation.

    Args:
        scores: ``(N,)``, floating point, any score that is higher in-distribution; infinite scores are allowed.
        is_id: ``(N,)`` bool, true for in-distribution rows, which are the positive ones.

    Returns:
        0-d float64 in ``[0, 1]``; nan, with a warning, unless there are rows of both kinds.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape, or a score is NaN.

    Example:
        >>> ood_fpr95(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        tensor(1., dtype=torch.float64)
    """
    return _checked_ood("ood_fpr95", scores, is_id, fpr_at_tpr_from_ordered)


def max_prob_log_odds(logits: Tensor, input: InputKind = "logits") -> Tensor:
    """Log-odds of the largest softmax probability, the score of Hendrycks and Gimpel (2017) for OOD detection.

    ``log c / (1 - c)`` with ``c = max_k softmax(z)_k``: it orders rows as ``c`` does, and does not saturate where ``c``
    rounds to 1.

    Args:
        logits: Scores ``(N, K)``, floating point.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"``.

    Returns:
        ``(N,)``, float64 if ``logits`` are, else float32.

    Example:
        >>> max_prob_log_odds(torch.tensor([[3.0, 0.0], [0.0, 50.0]]))
        tensor([ 3., 50.])
    """
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return Rows(logits, labels, None, input).log_odds
