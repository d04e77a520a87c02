"""The default fit of Neural Clamping: to the optimum instead of a recipe of the literature."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calib_lightning.posthoc.clamping_descent import Clamped, ClampFit, diverged, with_exact_temperature
from calib_lightning.posthoc.clamping_objective import Objective, penalty_slope


@dataclass(frozen=True)
class ClampOptimum(ClampFit):
    """Adam on delta, and the exact T for the delta at the end of every epoch.

    The objective is smooth in T alone, so T is found exactly from the logits of all rows, for which one pass is enough;
    what is left for the descent is delta. Its rate falls to 0 as half a cosine. The runs of a search go on from one
    another, in the order of their gammas, and so share their epochs.

    Args:
        epochs: Passes over the rows for each gamma and lambda, at least 1; the first has four times as many.
        lr: Largest step of an entry of delta, in units of the normalised image.
        seed: Seed of the order of the rows; it does not reorder given batches.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> ClampOptimum(epochs=10).name
        'ClampOptimum(epochs=10)'
    """

    epochs: int = 4
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.epochs < 1 or not 0.0 < self.lr < math.inf:
            raise ValueError(f"{self!r}: epochs must be >= 1 and lr finite and > 0.")

    def length(self, runs: int) -> int:
        """See `ClampFit.length`."""
        return self.epochs * (runs + 3)

    def run(
        self, objective: Objective, start: Tensor, after_epoch: Callable[[], Any], before: Clamped | None
    ) -> Clamped:
        """See `ClampFit.run`."""
        epochs = self.epochs if before else 4 * self.epochs
        delta = (before.delta if before else start).clone().requires_grad_()
        end = with_exact_temperature(objective.rows, delta.detach(), objective.gamma)
        optimizer = torch.optim.Adam([delta], lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
            log_t = delta.new_tensor(end.log_temperature).requires_grad_()
            batches = objective.rows.batches(generator)
            # A process that has used up its rows takes part, without any, until all have.
            while True:
                sums = objective.sums(next(batches, None), delta, log_t)
                loss, count = sums[-2:].tolist()
                if count == 0.0:
                    break
                if not math.isfinite(loss):
                    raise diverged(objective, self.lr, f"the loss is {loss} in epoch {epoch + 1}")
                slope = penalty_slope(delta, objective.penalty)
                delta.grad = (sums[:-3] / count).view_as(delta) + objective.weight * slope
                optimizer.step()
            end = with_exact_temperature(objective.rows, delta.detach().clone(), objective.gamma)
            after_epoch()
        return end
