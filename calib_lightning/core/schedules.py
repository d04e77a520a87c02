"""Learning-rate schedules that torch lacks; all are stepped once per epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def with_schedule(optimizer: Optimizer, scheduler: LRSchedulerCallable | None, epochs: int) -> OptimizerLRScheduler:
    """Combine an optimiser and its schedule into the result of ``configure_optimizers``.

    ``epochs`` is the length of a `CosineToEnd`, -1 if unknown; ``ReduceLROnPlateau`` monitors ``val/nll``.
    """
    if scheduler is None:
        return optimizer
    schedule = scheduler(optimizer)
    if isinstance(schedule, CosineToEnd):
        schedule.set_epochs(epochs)
    if isinstance(schedule, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/nll"}}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}


class CosineToEnd(LRScheduler):
    """Half a cosine down to a minimum rate at the end of the run or stage.

    ``lr_e = m + (lr - m) (1 + cos(pi e / E)) / 2`` in epoch ``e = 0, ..., E - 1``. Torch's ``CosineAnnealingLR`` needs
    E as an argument; this schedule takes it from the trainer and the stage switches. In your own training loop, call
    `set_epochs`.

    Args:
        optimizer: Its rates are the ``lr`` of each group.
        eta_min: m, the minimum rate.

    Raises:
        ValueError: If ``eta_min`` is negative or not finite.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> schedule = CosineToEnd(optimizer)
        >>> schedule.set_epochs(40)
        >>> schedule.get_last_lr()
        [0.1]
    """

    def __init__(self, optimizer: Optimizer, eta_min: float = 0.0) -> None:
        if not 0 <= eta_min < math.inf:
            raise ValueError(f"eta_min is {eta_min}; it must be at least 0 and finite.")
        self.eta_min = eta_min
        self.epochs: int | None = None
        super().__init__(optimizer)

    def set_epochs(self, epochs: int) -> None:
        """Set the number of epochs, before the first one ends.

        Args:
            epochs: E.

        Raises:
            ValueError: If it is below 1.
        """
        if epochs < 1:
            raise ValueError(
                f"max_epochs is {epochs}, but CosineToEnd needs the number of epochs. Set trainer.max_epochs, or use "
                "torch.optim.lr_scheduler.CosineAnnealingLR with a T_max."
            )
        self.epochs = epochs

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group in the coming epoch."""
        if self.epochs is None and self.last_epoch > 0:
            raise RuntimeError("CosineToEnd does not know the number of epochs. Call set_epochs before the first step.")
        share = min(1.0, self.last_epoch / (self.epochs or 1))
        return [
            self.eta_min + (float(base) - self.eta_min) * (1 + math.cos(math.pi * share)) / 2 for base in self.base_lrs
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state without the number of epochs, which may differ when a run is resumed."""
        return {name: value for name, value in super().state_dict().items() if name != "epochs"}


class WarmupCosine(LRScheduler):
    """A half cosine after a linear warm-up, the schedule of contrastive pretraining (Khosla et al., NeurIPS 2020).

    In epoch ``e = 1, ..., E`` the rate is ``c(e) = m + (lr - m) (1 + cos(pi e / E)) / 2`` with ``m = lr decay^3``. In
    the first W epochs it is ``s + (c(W) - s) (e - 1/2) / W`` instead, where ``s`` is the start of the warm-up. After
    epoch E it stays at ``m``.

    Args:
        optimizer: Its rates are the ``lr`` of each group.
        epochs: E, the length of the stage.
        warmup_epochs: W, less than E; 0 for no warm-up.
        warmup_start: s, a learning rate.
        decay: In ``(0, 1]``; the schedule ends at ``lr decay^3``.

    Raises:
        ValueError: If a value is out of range, or the warm-up would decrease.

    Deviations:
        The authors' warm-up increases at every step. Here each epoch uses the mean of that ramp over the epoch, so the
        rate is a function of the epoch alone.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> schedule = WarmupCosine(optimizer, epochs=1000)
        >>> round(schedule.get_last_lr()[0], 5)
        0.03449
    """

    def __init__(
        self,
        optimizer: Optimizer,
        epochs: int,
        warmup_epochs: int = 10,
        warmup_start: float = 0.01,
        decay: float = 0.1,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; it must be at least 1. Give the length of the stage.")
        if not 0 <= warmup_epochs < epochs:
            raise ValueError(
                f"warmup_epochs is {warmup_epochs}; it must be at least 0 and less than epochs ({epochs}). Use 0 for "
                "no warm-up, or more epochs."
            )
        if not 0 <= warmup_start < math.inf:
            raise ValueError(f"warmup_start is {warmup_start}; it must be at least 0 and finite. The paper uses 0.01.")
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}; it must be in (0, 1]. The paper uses 0.1.")
        self.epochs, self.warmup_epochs = epochs, warmup_epochs
        self.warmup_start, self.decay = warmup_start, decay
        rate = min(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        if warmup_epochs and rate < warmup_start:
            raise ValueError(
                f"warmup_start is {warmup_start}; it must be at most the learning rate ({rate}). Lower warmup_start, "
                "or set warmup_epochs=0."
            )
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group in the coming epoch."""
        return [self._rate(float(base), self.last_epoch + 1) for base in self.base_lrs]

    def _rate(self, base: float, epoch: int) -> float:
        if epoch <= self.warmup_epochs:
            share = (epoch - 0.5) / self.warmup_epochs
            return self.warmup_start + share * (self._cosine(base, self.warmup_epochs) - self.warmup_start)
        return self._cosine(base, min(epoch, self.epochs))

    def _cosine(self, base: float, epoch: int) -> float:
        least = base * self.decay**3
        return least + (base - least) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


class WarmupMultiStep(LRScheduler):
    """Step decay after a linear warm-up, the schedule of LDAM-DRW (Cao et al., NeurIPS 2019).

    In epoch ``e = 1, 2, ...`` the rate is ``lr e / W`` up to epoch W, and ``lr gamma^m`` after it, where m is the
    number of milestones below e.

    Args:
        optimizer: Its rates are the ``lr`` of each group.
        milestones: Epochs after which the rate drops, ascending.
        gamma: The factor of each drop.
        warmup_epochs: W; 0 for no warm-up.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> schedule = WarmupMultiStep(optimizer, milestones=[160, 180], gamma=0.01)
        >>> round(schedule.get_last_lr()[0], 5)
        0.02
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1, warmup_epochs: int = 5
    ) -> None:
        if list(milestones) != sorted(set(milestones)) or not milestones or milestones[0] < 1:
            raise ValueError(f"milestones is {milestones}; it must hold ascending epochs from 1 on.")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it must be in (0, 1].")
        if not 0 <= warmup_epochs <= milestones[0]:
            raise ValueError(
                f"warmup_epochs is {warmup_epochs}; it must be between 0 and the first milestone ({milestones[0]})."
            )
        self.milestones, self.gamma, self.warmup_epochs = list(milestones), gamma, warmup_epochs
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group in the coming epoch."""
        epoch = self.last_epoch + 1
        if epoch <= self.warmup_epochs:
            factor = epoch / self.warmup_epochs
        else:
            factor = self.gamma ** sum(milestone < epoch for milestone in self.milestones)
        return [float(base) * factor for base in self.base_lrs]
