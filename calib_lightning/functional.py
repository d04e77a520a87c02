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
