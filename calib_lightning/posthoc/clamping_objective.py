"""The objective of Neural Clamping and its derivatives."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.posthoc.clamping_rows import ClampRows, reduced

Penalty = Literal["l2sq", "l2"]
"""R: the squared Euclidean norm of delta, or the norm."""


def focal_rows(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss (Lin et al., 2017) of each row, ``-(1 - p_y)^gamma log p_y``; ``gamma = 0`` is cross-entropy."""
    log_probs = torch.log_softmax(at_least_float32(logits), dim=-1)
    of_label = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if gamma == 0.0:
        return -of_label
    # For gamma < 1 the derivative of x^gamma is infinite at 0.
    return -torch.expm1(of_label).neg().clamp_min(1e-12).pow(gamma) * of_label


def penalty_of(delta: Tensor, penalty: Penalty) -> float:
    """R(delta)."""
    return float(delta.square().sum() if penalty == "l2sq" else delta.norm())


def penalty_slope(delta: Tensor, penalty: Penalty) -> Tensor:
    """Gradient of R; 0 at 0."""
    delta = delta.detach()
    return 2.0 * delta if penalty == "l2sq" else delta / delta.norm().clamp_min(torch.finfo(delta.dtype).tiny)


class Objective(NamedTuple):
    """``mean focal(f(x + delta) / T, y) + weight R(delta)``.

    Attributes:
        rows: Images and network.
        gamma: Focusing parameter.
        weight: lambda.
        penalty: Which R.
    """

    rows: ClampRows
    gamma: float
    weight: float
    penalty: Penalty

    def sums(self, batch: tuple[Tensor, Tensor] | None, delta: Tensor, log_t: Tensor) -> Tensor:
        """Sum over the rows of a batch on all processes, without the penalty.

        Args:
            batch: Images and labels; ``None`` if this process has no more.
            delta: ``(C, H, W)``, with gradient.
            log_t: log T, 0-d, with gradient.

        Returns:
            The derivatives by the entries of delta, then that by log T, the loss and the number of rows.
        """
        sums = torch.zeros(delta.numel() + 3, dtype=delta.dtype, device=delta.device)
        if batch is not None:
            image, label = batch
            with torch.enable_grad():
                logits = self.rows.differentiable_logits(image + delta.to(image.dtype))
                loss = focal_rows(logits * torch.exp(-log_t), label, self.gamma).sum()
                slopes = torch.autograd.grad(loss, (delta, log_t))
            values = [slopes[0].flatten(), slopes[1].view(1), loss.detach().view(1).to(delta.dtype)]
            sums = torch.cat([*values, sums.new_full((1,), len(label))])
        return reduced(sums)
