"""Tensor maths shared by metrics, calibrators and methods."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it is narrower or not floating point; float32 and float64 stay as they are.

    A softmax taken in half precision puts a third of the confidences of a good network at exactly 1.

    Args:
        x: Any tensor.

    Returns:
        The same values, float32 or float64.
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn labels ``(N,)`` into targets ``(N, K)``; targets that are soft already only change dtype.

    Args:
        labels: Class labels ``(N,)`` int64, or soft targets ``(N, K)``.
        num_classes: K.
        dtype: dtype of the result.

    Returns:
        Targets ``(N, K)``, each row summing to one.
    """
    if labels.ndim == 2:
        return labels.to(dtype)
    return torch.nn.functional.one_hot(labels, num_classes).to(dtype)


def checked_batch(logits: Tensor, labels: Tensor, *, soft: bool) -> tuple[Tensor, Tensor]:
    """Check what a loss is given, before any arithmetic, and widen the logits.

    The values of labels are looked at on the CPU only: elsewhere a look would wait for the device in every step.

    Args:
        logits: ``(N, K)``, floating point.
        labels: Class labels ``(N,)`` of an integer type, or soft targets ``(N, K)``.
        soft: Whether the loss takes soft targets.

    Returns:
        Logits, float32 or float64; and labels ``(N,)`` int64, or soft targets ``(N, K)`` with the logits' dtype.

    Raises:
        TypeError: If the logits are not floating point, or class labels not whole numbers.
        ValueError: If shapes do not fit, there is no row, a label is outside ``0..K-1``, soft targets are not
            probabilities, or the loss cannot take them.

    Example:
        >>> checked_batch(torch.zeros(2, 3, dtype=torch.bfloat16), torch.tensor([0, 2]), soft=False)[0].dtype
        torch.float32
    """
    if not logits.is_floating_point():
        raise TypeError(f"The logits are {logits.dtype}; they must be floating point: give what the network returns.")
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"The logits have the shape {tuple(logits.shape)}; a loss needs (N, K) with N and K above 0.")
    rows, classes = logits.shape
    look = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if labels.ndim == 2:
        if not soft:
            raise ValueError(
                f"The labels have the shape {tuple(labels.shape)}, but this loss cannot take soft targets: its "
                "equation needs one true class a row. Give class labels (N,), or train with a loss that takes soft "
                "targets, such as cross-entropy, label smoothing, Brier or focal."
            )
        if labels.shape != logits.shape:
            raise ValueError(
                f"Soft targets {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: both must be (N, K)."
            )
        if not labels.is_floating_point():
            raise TypeError(f"Soft targets are {labels.dtype}; they must be floating point probabilities.")
        logits = at_least_float32(logits)
        labels = labels.to(logits.dtype)
        if look:
            total = labels.sum(dim=-1)
            # half precision rounds each of the K targets
            if not (bool((labels >= 0).all()) and bool(((total - 1).abs() <= 1e-2).all())):
                row = int((~((labels >= 0).all(dim=-1) & ((total - 1).abs() <= 1e-2))).nonzero()[0])
                raise ValueError(
                    f"Row {row} of the soft targets is no distribution: its smallest value is "
                    f"{float(labels[row].min()):g} and its sum {float(total[row]):g}. Targets must be at least 0 and "
                    "each row must sum to 1."
                )
        return logits, labels
    if labels.ndim != 1 or len(labels) != rows:
        raise ValueError(
            f"Labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: give one label a row, ({rows},)."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"Class labels are {labels.dtype}; they must be whole numbers (int64) in 0..{classes - 1}.")
    labels = labels.long()
    if look:
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"The label {wrong} is outside 0..{classes - 1}: map the labels where they are loaded, or give the "
                "network as many outputs as there are classes."
            )
    return at_least_float32(logits), labels
