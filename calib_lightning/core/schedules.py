"""Learning-rate schedules that torch does not have; all are stepped once an epoch."""

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
    """Put an optimiser and its schedule together as Lightning takes them.

    Args:
        optimizer: The optimiser.
        scheduler: Builds its schedule, stepped once an epoch; ``ReduceLROnPlateau`` watches ``val/nll``.
        epochs: Epochs that a `CosineToEnd` lasts; -1 where they are not known.

    Returns:
        What ``configure_optimizers`` returns.
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
    """Half a cosine down to a least rate at the end of the run, or of the stage that it belongs to.

    ``lr_e = m + (lr - m) (1 + cos(pi e / E)) / 2`` in epoch ``e = 0, ..., E - 1``. Torch's ``CosineAnnealingLR`` must
    be told E; this one learns it from the trainer and the stage switches, so that nothing has to be changed with the
    number of epochs. In a training loop of one's own, call `set_epochs`.

    Args:
        optimizer: Its rates are the ``lr`` of each group.
        eta_min: m, the least rate.

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
        """Say how many epochs there are, before the first is over.

        Args:
            epochs: E.

        Raises:
            ValueError: If it is not at least 1.
        """
        if epochs < 1:
            raise ValueError(
                f"CosineToEnd must know the number of epochs, but max_epochs is {epochs}: set trainer.max_epochs, or "
                "use torch.optim.lr_scheduler.CosineAnnealingLR with a T_max."
            )
        self.epochs = epochs

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group in the epoch that begins."""
        if self.epochs is None and self.last_epoch > 0:
            raise RuntimeError("CosineToEnd does not know the number of epochs: call set_epochs before the first step.")
        share = min(1.0, self.last_epoch / (self.epochs or 1))
        return [
            self.eta_min + (float(base) - self.eta_min) * (1 + math.cos(math.pi * share)) / 2 for base in self.base_lrs
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state without the number of epochs: a run that is resumed for longer has another end."""
        return {name: value for name, value in super().state_dict().items() if name != "epochs"}


class WarmupCosine(LRScheduler):
    """Half a cosine after a linear warm-up, the schedule of contrastive pretraining (Khosla et al., NeurIPS 2020).

    In epoch ``e = 1, ..., E`` the rate is ``c(e) = m + (lr - m) (1 + cos(pi e / E)) / 2`` with ``m = lr decay^3``. In
    the first W epochs it is ``s + (c(W) - s) (e - 1/2) / W`` instead, with ``s`` the start of the warm-up. After epoch
    E it stays at ``m``.

    Args:
        optimizer: Its rates are the ``lr`` of each group.
        epochs: E, the epochs of the stage that is trained with it.
        warmup_epochs: W, less than E; 0 for no warm-up.
        warmup_start: s, a learning rate.
        decay: In ``(0, 1]``; the schedule ends at ``lr decay^3``.

    Raises:
        ValueError: If a number is outside its range, or the warm-up would have to fall.

    Deviations:
        The authors' warm-up grows from step to step. Here each epoch has the mean of that ramp in it, so that the rate
        is a function of the epoch alone.

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
            raise ValueError(f"epochs is {epochs}; it must be at least 1: the epochs of the stage.")
        if not 0 <= warmup_epochs < epochs:
            raise ValueError(
                f"warmup_epochs is {warmup_epochs}; it must be at least 0 and less than epochs ({epochs}). Give 0 for "
                "no warm-up, or more epochs."
            )
        if not 0 <= warmup_start < math.inf:
            raise ValueError(f"warmup_start is {warmup_start}; it must be at least 0 and finite (0.01 in the paper).")
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}; it must lie in (0, 1] (0.1 in the paper).")
        self.epochs, self.warmup_epochs = epochs, warmup_epochs
        self.warmup_start, self.decay = warmup_start, decay
        rate = min(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        if warmup_epochs and rate < warmup_start:
            raise ValueError(
                f"The learning rate {rate} is below warmup_start, {warmup_start}: a warm-up must rise. Give a smaller "
                "warmup_start, or warmup_epochs=0."
            )
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group in the epoch that begins."""
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
    """Steps down behind a linear warm-up, the schedule of LDAM-DRW (Cao et al., NeurIPS 2019).

    In epoch ``e = 1, 2, ...`` the rate is ``lr e / W`` up to epoch W, and ``lr gamma^m`` behind it, with m the number
    of milestones that are over: those below e.

    Args:
        optimizer: Its rates are the ``lr`` of each group.
        milestones: Epochs after which the rate falls, ascending.
        gamma: What it is multiplied by.
        warmup_epochs: W; 0 for no warm-up.

    Raises:
        ValueError: If a number is outside its range.

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
            raise ValueError(f"milestones is {milestones}; it must be ascending epochs from 1 on.")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; it must lie in (0, 1].")
        if not 0 <= warmup_epochs <= milestones[0]:
            raise ValueError(
                f"warmup_epochs is {warmup_epochs}; it must lie between 0 and the first milestone ({milestones[0]})."
            )
        self.milestones, self.gamma, self.warmup_epochs = list(milestones), gamma, warmup_epochs
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group in the epoch that begins."""
        epoch = self.last_epoch + 1
        if epoch <= self.warmup_epochs:
            factor = epoch / self.warmup_epochs
        else:
            factor = self.gamma ** sum(milestone < epoch for milestone in self.milestones)
        return [float(base) * factor for base in self.base_lrs]
