"""Logits and labels of modules and batches that are not ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from calib_lightning.core.submodules import evaluating


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
