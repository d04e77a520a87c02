"""Clip the gradient norm in the first stage, and count how often."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from calib_lightning.core import StageSwitch


class ClipGradients(Callback):
    """Clips the gradient norm and logs the fraction of clipped steps, ``train/clipped``.

    ``g <- g min(1, max_norm / |g|)``, with the Euclidean norm over all parameters, after DDP has averaged them and
    before weight decay. The trainer's ``gradient_clip_val`` does not report how often it acts, and would also apply to
    later stages; this callback stops at the first `StageSwitch`.

    Args:
        max_norm: Largest norm that is not clipped.

    Raises:
        ValueError: If ``max_norm`` is not positive and finite; at the start of a fit, if the trainer also clips.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ClipGradients(2.0)], logger=False)
    """

    def __init__(self, max_norm: float) -> None:
        if not 0 < max_norm < math.inf:
            raise ValueError(
                f"max_norm is {max_norm}; it must be above 0 and finite. To disable clipping, omit the callback."
            )
        self.max_norm = max_norm
        self._steps, self._clipped = 0, torch.zeros(())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject a trainer that also clips, and reset the counts; a checkpoint's are loaded later."""
        if stage == "fit":
            self._steps, self._clipped = 0, torch.zeros(())
        if stage == "fit" and trainer.gradient_clip_val is not None:
            raise ValueError(
                f"gradient_clip_val of the trainer is {trainer.gradient_clip_val}; it must be None with ClipGradients. "
                "Omit one of them."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip the gradients."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
        if any(isinstance(callback, StageSwitch) and callback.active for callback in callbacks):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm(gradients)
        # torch's clip_grad_norm_ adds 1e-6 to the norm, which matters for the small gradients of a mean loss
        factor = (self.max_norm / norm).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
        self._steps += 1
        self._clipped = self._clipped.to(norm.device) + (norm > self.max_norm)  # no synchronisation

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the fraction of clipped steps."""
        if self._steps:
            pl_module.log("train/clipped", self._clipped / self._steps)
        self._steps, self._clipped = 0, torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The counts of the current epoch."""
        return {"steps": self._steps, "clipped": int(self._clipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self._steps, self._clipped = state_dict["steps"], torch.tensor(float(state_dict["clipped"]))
