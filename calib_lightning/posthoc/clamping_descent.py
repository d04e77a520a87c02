"""The objective of Neural Clamping, its descent, and the exact temperature for a fixed perturbation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from calib_lightning.metrics.functional.temperature import LOG_BETA_BOUND
from calib_lightning.posthoc.clamping_objective import Objective, penalty_slope
from calib_lightning.posthoc.clamping_rows import WHERE, ClampRows, reduced, several_processes
from calib_lightning.posthoc.temperature import FocalTemperature, Temperature
from calib_lightning.utils.described import Described


class PenaltyWeight(Described, ABC):
    """A rule for lambda, the weight of the penalty on delta."""

    @abstractmethod
    def weight(self, loss: float, penalty: float) -> float:
        """Compute lambda.

        Args:
            loss: Mean focal loss L0 at the start, T = 1.
            penalty: R(delta_0).

        Returns:
            lambda >= 0.
        """


@dataclass(frozen=True)
class RelativeWeight(PenaltyWeight):
    """``lambda = factor L0``: by default lambda is a tenth of the initial loss.

    Args:
        factor: At least 0.

    Raises:
        ValueError: A factor that is negative or not finite.

    Example:
        >>> RelativeWeight(0.5).weight(loss=2.0, penalty=4.0)
        1.0
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Check the factor."""
        _check_at_least_zero("factor", self.factor)

    def weight(self, loss: float, penalty: float) -> float:
        """See `PenaltyWeight.weight`."""
        return self.factor * loss


@dataclass(frozen=True)
class TermWeight(PenaltyWeight):
    """``lambda = factor L0 / R(delta_0)``: by default the penalty term starts at a tenth of the initial loss.

    Args:
        factor: At least 0.

    Raises:
        ValueError: A factor that is negative or not finite.

    Example:
        >>> TermWeight(0.5).weight(loss=2.0, penalty=4.0)
        0.25
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Check the factor."""
        _check_at_least_zero("factor", self.factor)

    def weight(self, loss: float, penalty: float) -> float:
        """See `PenaltyWeight.weight`; raises ``ValueError`` if the start, and so its penalty, is zero."""
        if penalty == 0.0:
            raise ValueError(f"{self.name}: the start is zero; it must not be. Use RelativeWeight or another start.")
        return self.factor * loss / penalty


@dataclass(frozen=True)
class FixedWeight(PenaltyWeight):
    """A given lambda.

    Args:
        value: At least 0.

    Raises:
        ValueError: A value that is negative or not finite.

    Example:
        >>> FixedWeight(0.3).weight(loss=2.0, penalty=4.0)
        0.3
    """

    value: float

    def __post_init__(self) -> None:
        """Check the weight."""
        _check_at_least_zero("value", self.value)

    def weight(self, loss: float, penalty: float) -> float:
        """See `PenaltyWeight.weight`."""
        return self.value


def _check_at_least_zero(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be finite and >= 0.")


class Clamped(NamedTuple):
    """Final delta and T.

    Attributes:
        delta: ``(C, H, W)``.
        log_temperature: log T.
        slope: Mean derivative of the objective by log T in the last epoch; 0 if T is exact.
        at_bound: Whether T was stopped at its bound, because the likelihood has no maximum.
    """

    delta: Tensor
    log_temperature: float
    slope: float = 0.0
    at_bound: bool = False


class ClampFit(Described, ABC):
    """A way to train delta and T."""

    @abstractmethod
    def run(
        self, objective: Objective, start: Tensor, after_epoch: Callable[[], Any], before: Clamped | None
    ) -> Clamped:
        """Minimise, and return the last point.

        Args:
            objective: The objective.
            start: ``(C, H, W)``.
            after_epoch: Called after every epoch.
            before: Result of the run before in a search, from which a fit to the optimum may go on.

        Returns:
            Final delta and T.

        Raises:
            FloatingPointError: The descent diverged.
        """

    @abstractmethod
    def length(self, runs: int) -> int:
        """Number of epochs of a search."""


@dataclass(frozen=True)
class ClampDescent(ClampFit):
    """Stochastic gradient descent on delta and log T from T = 1; the defaults are those of Tang et al. (2024).

    It is a recipe: with the mean over a batch the default rate ends far from the optimum; see `ClampOptimum`.

    Their code uses a momentum of 0.9, and its demonstration a learning rate of 0.01. In each step every process takes a
    batch, and gradients are averaged over all their rows.

    Args:
        epochs: Passes over the rows, at least 1.
        lr: Learning rate.
        momentum: In ``[0, 1)``.
        seed: Seed of the order of the rows; it does not reorder given batches.
        reduction: ``"mean"`` as in the authors' code, or ``"sum"`` as the paper prints its objective (equation 9): the
            sum over the rows of a batch, with lambda times their number.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> ClampDescent(epochs=20, lr=0.1).name
        'ClampDescent(epochs=20, lr=0.1)'
    """

    epochs: int = 100
    lr: float = 0.001
    momentum: float = 0.0
    seed: int = 0
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {self.reduction!r}; it must be 'mean' or 'sum'.")
        if self.epochs < 1 or not 0.0 < self.lr < math.inf or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"{self!r}: epochs must be >= 1, lr finite and > 0, and momentum in [0, 1).")

    def length(self, runs: int) -> int:
        """See `ClampFit.length`."""
        return self.epochs * runs

    def run(
        self, objective: Objective, start: Tensor, after_epoch: Callable[[], Any], before: Clamped | None
    ) -> Clamped:
        """Minimise from a start with T = 1, independently of other runs; see `ClampFit.run`."""
        delta, log_t = start.clone().requires_grad_(), start.new_zeros((), requires_grad=True)
        optimizer = torch.optim.SGD([delta, log_t], lr=self.lr, momentum=self.momentum)
        generator = torch.Generator().manual_seed(self.seed)
        slope = 0.0
        for epoch in range(self.epochs):
            batches, slopes, total = objective.rows.batches(generator), 0.0, 0.0
            # A process that has used up its rows takes part, without any, until all have.
            while True:
                sums = objective.sums(next(batches, None), delta, log_t)
                loss, count = sums[-2:].tolist()
                if count == 0.0:
                    break
                if not math.isfinite(loss):
                    raise diverged(objective, self.lr, f"the loss is {loss} in epoch {epoch + 1}")
                delta.grad = (sums[:-3] / count).view_as(delta) + objective.weight * penalty_slope(
                    delta, objective.penalty
                )
                log_t.grad = sums[-3] / count
                if self.reduction == "sum":
                    delta.grad, log_t.grad = count * delta.grad, count * log_t.grad
                slopes, total = slopes + float(sums[-3]), total + count
                optimizer.step()
            slope = slopes / total
            after_epoch()
        if not (bool(delta.isfinite().all()) and abs(float(log_t)) <= LOG_BETA_BOUND):
            raise diverged(objective, self.lr, f"it ends with log T = {float(log_t):g}")
        return Clamped(delta.detach(), float(log_t), slope)


def diverged(objective: Objective, lr: float, what: str) -> FloatingPointError:
    """The error of a descent that diverged."""
    settings = f"gamma={objective.gamma:g}, lambda={objective.weight:g} and lr={lr:g}"
    return FloatingPointError(f"{WHERE}: {what} with {settings}; use a lower lr.")


def with_exact_temperature(rows: ClampRows, delta: Tensor, gamma: float) -> Clamped:
    """Find the best T for a fixed delta from the gathered logits of all processes."""
    pairs = [(rows.logits(image + delta.to(image.dtype)), label) for image, label in rows.batches()]
    # A process without rows does not know K.
    classes = int(reduced(torch.tensor([pairs[0][0].shape[1] if pairs else 0], device=delta.device), "MAX"))
    logits = torch.cat([delta.new_empty(0, classes), *(logits.to(delta.dtype) for logits, _ in pairs)])
    labels = torch.cat([torch.empty(0, dtype=torch.int64, device=delta.device), *(label for _, label in pairs)])
    if several_processes():
        logits, labels = torch.cat(gather_all_tensors(logits)), torch.cat(gather_all_tensors(labels))
    calibrator = FocalTemperature(gamma) if gamma else Temperature()
    optimum = calibrator.fit_rows(logits, labels, None)
    return Clamped(delta, math.log(calibrator.temperature), at_bound=optimum.at_bound)
