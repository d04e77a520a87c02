"""Logits and labels of modules and batches from outside this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from calib_lightning.core.submodules import evaluating


def as_logits_of(output: Any, who: str) -> Tensor:
    """Return the logits ``(N, K)`` in the output of a module: the output itself, or its ``logits``."""
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise TypeError(
            f"The module's forward returned {type(output).__name__}{shape}, but {who} needs logits (N, K) or an output "
            "with `logits`. Let forward(image) return the logits."
        )
    return found


@contextmanager
def ready(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Prepare to call a module outside the trainer's loops: evaluation mode, no gradients, its precision."""
    with evaluating(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        yield
