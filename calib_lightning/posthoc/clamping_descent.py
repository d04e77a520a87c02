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

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.temperature import LOG_BETA_BOUND
from calib_lightning.posthoc.clamping_rows import WHERE, ClampRows, reduced, several_processes
from calib_lightning.posthoc.temperature import FocalTemperature, Temperature
from calib_lightning.utils.described import Described

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


def _penalty_slope(delta: Tensor, penalty: Penalty) -> Tensor:
    """Gradient of R; 0 at 0."""
    delta = delta.detach()
    return 2.0 * delta if penalty == "l2sq" else delta / delta.norm().clamp_min(torch.finfo(delta.dtype).tiny)


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


@dataclass(frozen=True)
class ClampDescent(Described):
    """Stochastic gradient descent on delta and log T; the defaults are those of Tang et al. (2024).

    Their code uses a momentum of 0.9, and its demonstration a learning rate of 0.01. In each step every process takes a
    batch, and gradients are averaged over all their rows.

    Args:
        epochs: Passes over the rows, at least 1.
        lr: Learning rate.
        momentum: In ``[0, 1)``.
        seed: Seed of the order of the rows; it does not reorder given batches.

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

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.epochs < 1 or not 0.0 < self.lr < math.inf or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"{self!r}: epochs must be >= 1, lr finite and > 0, and momentum in [0, 1).")

    def run(self, objective: Objective, start: Tensor, after_epoch: Callable[[], Any]) -> Clamped:
        """Minimise from a start with T = 1, and return the last point.

        Args:
            objective: The objective.
            start: ``(C, H, W)``.
            after_epoch: Called after every epoch.

        Returns:
            Final delta and T.

        Raises:
            FloatingPointError: The loss is not finite, or log T has left ``[-16, 16]``.
        """
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
                    raise self._diverged(objective, f"the loss is {loss} in epoch {epoch + 1}")
                delta.grad = (sums[:-3] / count).view_as(delta) + objective.weight * _penalty_slope(
                    delta, objective.penalty
                )
                log_t.grad = sums[-3] / count
                slopes, total = slopes + float(sums[-3]), total + count
                optimizer.step()
            slope = slopes / total
            after_epoch()
        if not (bool(delta.isfinite().all()) and abs(float(log_t)) <= LOG_BETA_BOUND):
            raise self._diverged(objective, f"it ends with log T = {float(log_t):g}")
        return Clamped(delta.detach(), float(log_t), slope)

    def _diverged(self, objective: Objective, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{WHERE}: {what} with gamma={objective.gamma:g}, lambda={objective.weight:g} and lr={self.lr:g}; use a "
            "lower lr."
        )


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
