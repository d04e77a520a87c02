"""Tensor functions shared by metrics, calibrators and methods."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` as float32 if it is narrower or not floating point; float32 and float64 are unchanged.

    A softmax in half precision rounds a third of a good network's confidences to exactly 1.
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def two_columns(logits: Tensor, rows: int | None = None) -> Tensor:
    """Return the logits ``(0, z)`` of the classes 0 and 1 for a binary network's z, so that ``p_1 = sigmoid(z)``.

    Args:
        logits: z as ``(N,)`` or ``(N, 1)``, or a scalar for one image; logits ``(N, K)`` of several classes are
            returned as they are.
        rows: Number of images that they belong to, if known.

    Returns:
        ``(N, 2)``, or ``logits``.

    Raises:
        ValueError: If there is not one z for each image.

    Example:
        >>> two_columns(torch.tensor([[3.0], [-1.0]]))
        tensor([[ 0.,  3.],
                [ 0., -1.]])
    """
    if logits.ndim == 2 and logits.shape[1] != 1:
        return logits
    if rows is not None and logits.ndim < 2 and logits.numel() != rows:
        raise ValueError(
            f"The network's output has shape {tuple(logits.shape)} for {rows} images; it must be logits ({rows}, K), "
            "or one logit of a binary network for each image. Do not squeeze the dimension of the images."
        )
    z = logits.reshape(-1, 1) if logits.ndim < 3 else logits
    return torch.cat([torch.zeros_like(z), z], dim=1)


def logits_of(output: Any, rows: int | None = None) -> Tensor:
    """Return the logits in what a network returns: the output itself, or its ``logits``.

    Args:
        output: Logits ``(N, K)``; one logit z of a binary network, ``(N,)`` or ``(N, 1)``, which becomes ``(0, z)``; a
            mapping or an object with such ``logits``.
        rows: Number of images that they belong to, if known.

    Returns:
        ``(N, K)``.

    Raises:
        TypeError: If there are no such logits in the output.
        ValueError: If there is not one row, or one z, for each image.

    Example:
        >>> logits_of({"loss": None, "logits": torch.tensor([[3.0], [-1.0]])})
        tensor([[ 0.,  3.],
                [ 0., -1.]])
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim > 2 or not found.is_floating_point():
        shape = f" of shape {tuple(found.shape)} and {found.dtype}" if isinstance(found, Tensor) else ""
        raise TypeError(
            f"The network returned {type(output).__name__}{shape}; it must return logits (N, K), one logit of a binary "
            "network, or an output with `logits`. Let forward(image) return one of these."
        )
    return two_columns(found, rows)


def binary_labels(labels: Tensor) -> Tensor:
    """Return the targets of a binary network as class numbers ``(N,)``: bool, or 0. and 1., also as ``(N, 1)``.

    Labels of another kind are returned as they are, for the checks that name them.
    """
    column = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if column.dtype == torch.bool or (column.is_floating_point() and bool(((column == 0) | (column == 1)).all())):
        return column.long()
    return labels if labels.is_floating_point() else column


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert labels ``(N,)`` to targets ``(N, K)``; soft targets only change dtype."""
    if labels.ndim == 2:
        return labels.to(dtype)
    return torch.nn.functional.one_hot(labels, num_classes).to(dtype)


def checked_batch(logits: Tensor, labels: Tensor, *, soft: bool) -> tuple[Tensor, Tensor]:
    """Validate a loss's input; return float32 or float64 logits ``(N, K)``, and int64 labels ``(N,)`` or soft targets.

    Soft targets ``(N, K)`` get the logits' dtype, and are accepted only with ``soft``. Label values are only checked on
    the CPU: elsewhere the check would synchronise every step.
    """
    if not logits.is_floating_point():
        raise TypeError(f"The logits have dtype {logits.dtype}; it must be floating point. Pass the network's output.")
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"The logits have shape {tuple(logits.shape)}; it must be (N, K), N and K above 0.")
    rows, classes = logits.shape
    look = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if labels.ndim == 2:
        if not soft:
            raise ValueError(
                f"The labels have shape {tuple(labels.shape)}, but this loss does not support soft targets: its "
                "equation needs one true class per row. Give class labels (N,), or use a loss that supports soft "
                "targets, such as cross-entropy, label smoothing, Brier or focal loss."
            )
        if labels.shape != logits.shape:
            raise ValueError(
                f"The soft targets have shape {tuple(labels.shape)}, the logits {tuple(logits.shape)}; both must be "
                "(N, K)."
            )
        if not labels.is_floating_point():
            raise TypeError(f"The soft targets have dtype {labels.dtype}; it must be floating point.")
        logits = at_least_float32(logits)
        labels = labels.to(logits.dtype)
        if look:
            total = labels.sum(dim=-1)
            # half precision rounds each of the K targets
            if not (bool((labels >= 0).all()) and bool(((total - 1).abs() <= 1e-2).all())):
                row = int((~((labels >= 0).all(dim=-1) & ((total - 1).abs() <= 1e-2))).nonzero()[0])
                raise ValueError(
                    f"Row {row} of the soft targets is not a distribution: its smallest value is "
                    f"{float(labels[row].min()):g} and its sum {float(total[row]):g}. Targets must be at least 0 and "
                    "each row must sum to 1."
                )
        return logits, labels
    if labels.ndim != 1 or len(labels) != rows:
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)}, the logits {tuple(logits.shape)}; there must be one label "
            f"per row, ({rows},)."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"The labels have dtype {labels.dtype}; it must be an integer type, with values in 0..{classes - 1}."
        )
    labels = labels.long()
    if look:
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"The labels hold {wrong}; they must be in 0..{classes - 1}. Map the labels where they are loaded, or "
                "give the network as many outputs as there are classes."
            )
    return at_least_float32(logits), labels


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch off autocast, which would multiply in half precision what was fitted in float64."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()  # keeps the context out of exported graphs
