"""Logits and labels of modules and batches that are not ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from calib_lightning.core.feature_cache import evaluating


def image_and_label(batch: Any, who: str) -> tuple[Any, Tensor]:
    """Take a batch apart.

    Args:
        batch: A tuple or list whose first two parts are the input and the class labels ``(N,)``.
        who: Who asks, for the message.

    Returns:
        Both.

    Raises:
        TypeError: If it is anything else.
    """
    if isinstance(batch, list | tuple) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    got = f"{len(batch)} parts" if isinstance(batch, list | tuple) else type(batch).__name__
    raise TypeError(f"{who} needs batches (image, label, ...), but this one is {got}; let the data set return a tuple.")


def as_logits_of(output: Any, who: str) -> Tensor:
    """Find the logits in what a module's ``forward`` returned.

    Args:
        output: A tensor ``(N, K)``, or an object with such a tensor as ``logits`` (attribute or key).
        who: Who asks, for the message.

    Returns:
        ``(N, K)``.

    Raises:
        TypeError: If there are none.
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise TypeError(
            f"{who} needs logits (N, K) from the module's forward, or an output with `logits`, but got "
            f"{type(output).__name__}{shape}; let forward(image) return the logits."
        )
    return found


@contextmanager
def ready(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Call a module outside of the trainer's loops: evaluation mode, no gradient, the trainer's precision."""
    with evaluating(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        yield
