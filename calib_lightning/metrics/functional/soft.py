"""How well predictions agree with distributions over the classes, such as the votes of several people on an image."""

from __future__ import annotations

from torch import Tensor

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.functional.proper import (
    check_soft,
    check_soft_values,
    is_soft,
    label_entropy_rows,
    mean_of_rows,
    soft_brier_rows,
    soft_nll_rows,
)


def soft_nll(logits: Tensor, probs_of_labels: Tensor, *, input: InputKind = "logits") -> Tensor:
    """Cross-entropy to the distribution of labels (Peterson et al., 2019): mean over rows of ``-sum_k p_k log q_k``.

    `label_entropy` is its minimum; the rest is the divergence of the predictions q from p.

    Args:
        logits: Scores ``(N, K)``, floating point.
        probs_of_labels: Distributions p ``(N, K)``, floating-point rows >= 0 that sum to 1 +- 1e-3.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 >= 0 in nats; ``inf`` where a given probability is 0 and p is not; nan, with a warning, without
        rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> soft_nll(torch.zeros(2, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
        tensor(1.3863, dtype=torch.float64)
    """
    check_soft("soft_nll", logits, probs_of_labels, input)
    return mean_of_rows("soft_nll", soft_nll_rows(logits, probs_of_labels, input))


def soft_brier(logits: Tensor, probs_of_labels: Tensor, *, input: InputKind = "logits") -> Tensor:
    """Squared distance to the distribution of labels: mean over rows of ``sum_k (q_k - p_k)^2``, in ``[0, 2]``.

    Args:
        logits: Scores ``(N, K)``, floating point.
        probs_of_labels: Distributions p ``(N, K)``, floating-point rows >= 0 that sum to 1 +- 1e-3.
        input: Whether ``logits`` holds ``"logits"`` or ``"probs"`` (rows >= 0 that sum to 1 +- 1e-3).

    Returns:
        0-d float64 in ``[0, 2]``; nan, with a warning, without rows.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or an invalid value; the first bad row is named.

    Example:
        >>> soft_brier(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
        tensor(0.2500, dtype=torch.float64)
    """
    check_soft("soft_brier", logits, probs_of_labels, input)
    return mean_of_rows("soft_brier", soft_brier_rows(logits, probs_of_labels, input))


def label_entropy(probs_of_labels: Tensor) -> Tensor:
    """Mean entropy of the distributions of labels in nats: the smallest possible `soft_nll`.

    Args:
        probs_of_labels: Distributions p ``(N, K)``, floating-point rows >= 0 that sum to 1 +- 1e-3.

    Returns:
        0-d float64 in ``[0, log K]``; nan, with a warning, without rows.

    Raises:
        TypeError: Not floating point, or of another shape.
        ValueError: A row is not a distribution; the first bad row is named.

    Example:
        >>> label_entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
        tensor(0.3466, dtype=torch.float64)
    """
    if not is_soft(probs_of_labels):
        found = f"{probs_of_labels.dtype} of shape {tuple(probs_of_labels.shape)}"
        raise TypeError(f"label_entropy: probs_of_labels is {found}; it must be floating point of shape (N, K).")
    check_soft_values(probs_of_labels, "label_entropy")
    return mean_of_rows("label_entropy", label_entropy_rows(probs_of_labels))
