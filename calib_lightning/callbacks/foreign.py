"""Logits and labels of modules and batches from outside this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from calib_lightning.core.submodules import evaluating
from calib_lightning.functional import two_columns


def as_logits_of(output: Any, who: str, rows: int) -> Tensor:
    """Return the logits ``(N, K)`` in the output of a module: the output itself, or its ``logits``.

    One logit z of a binary network, ``(N,)`` or ``(N, 1)``, becomes ``(0, z)``; there must be ``rows`` of them.
    """
    found = output
    if not isinstance(output, Tensor):
        found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim > 2 or not found.is_floating_point():
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise TypeError(
            f"The module's forward returned {type(output).__name__}{shape}, but {who} needs logits (N, K), one logit "
            "of a binary network, or an output with `logits`. Let forward(image) return the logits."
        )
    return two_columns(found, rows)


@contextmanager
def ready(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Prepare to call a module outside the trainer's loops: evaluation mode, no gradients, its precision."""
    with evaluating(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        yield
