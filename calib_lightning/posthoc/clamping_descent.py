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
"""R, the squared Euclidean norm of delta or the norm."""


def focal_rows(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Focal loss (Lin et al., 2017) of each row, ``-(1 - p_y)^gamma log p_y``; ``gamma = 0`` is cross-entropy.

    Args:
        logits: ``(N, K)``, floating point; half precision is widened.
        labels: ``(N,)`` int64 in ``0..K-1``.
        gamma: Focusing parameter, at least 0.

    Returns:
        ``(N,)`` in nats.

    Example:
        >>> focal_rows(torch.zeros(1, 2), torch.tensor([0]), 1.0)
        tensor([0.3466])
    """
    log_probs = torch.log_softmax(at_least_float32(logits), dim=-1)
    of_label = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if gamma == 0.0:
        return -of_label
    # The slope of x^gamma at 0 is not finite for gamma < 1.
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
        """Work it out.

        Args:
            loss: Mean focal loss L0 at the start, T = 1.
            penalty: R(delta_0).

        Returns:
            lambda >= 0.
        """


@dataclass(frozen=True)
class RelativeWeight(PenaltyWeight):
    """``lambda = factor L0``: a tenth of the initial loss is the coefficient.

    Args:
        factor: At least 0.
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a negative factor."""
        _check_at_least_zero("factor", self.factor)

    def weight(self, loss: float, penalty: float) -> float:
        """See `PenaltyWeight.weight`."""
        return self.factor * loss


@dataclass(frozen=True)
class TermWeight(PenaltyWeight):
    """``lambda = factor L0 / R(delta_0)``: a tenth of the initial loss is the initial penalty, lambda included.

    Args:
        factor: At least 0.
    """

    factor: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a negative factor."""
        _check_at_least_zero("factor", self.factor)

    def weight(self, loss: float, penalty: float) -> float:
        """See `PenaltyWeight.weight`; a start of zero has none.

        Raises:
            ValueError: The start is zero.
        """
        if penalty == 0.0:
            raise ValueError(f"{self.name}: the start is zero, so its penalty is; use RelativeWeight or another start")
        return self.factor * loss / penalty


@dataclass(frozen=True)
class FixedWeight(PenaltyWeight):
    """A given lambda.

    Args:
        value: At least 0.
    """

    value: float

    def __post_init__(self) -> None:
        """Refuse a negative weight."""
        _check_at_least_zero("value", self.value)

    def weight(self, loss: float, penalty: float) -> float:
        """See `PenaltyWeight.weight`."""
        return self.value


def _check_at_least_zero(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}={value!r}: it must be at least 0 and finite")


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
        """Sum up what a step needs over the rows of a batch of all processes, without the penalty.

        Args:
            batch: Images and labels; ``None`` where this process has no more.
            delta: ``(C, H, W)``, with gradient.
            log_t: log T, 0-d, with gradient.

        Returns:
            The slope by every entry of delta, then the slope by log T, the loss, and the number of rows.
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
    """Where delta and T ended.

    Attributes:
        delta: ``(C, H, W)``.
        log_temperature: log T.
        slope: Mean slope of the objective by log T in the last epoch; 0 where T is exact.
        at_bound: Whether T would grow or fall for ever.
    """

    delta: Tensor
    log_temperature: float
    slope: float = 0.0
    at_bound: bool = False


@dataclass(frozen=True)
class ClampDescent(Described):
    """Stochastic gradient descent on delta and log T; the defaults are those of Tang et al. (2024).

    Their code uses a momentum of 0.9, and its demonstration a rate of 0.01. Every process takes a batch in each step,
    and gradients are averaged over the rows of all.

    Args:
        epochs: Passes over the rows, at least 1.
        lr: Rate.
        momentum: In ``[0, 1)``.
        seed: Of the order of the rows; batches that are given keep theirs.
    """

    epochs: int = 100
    lr: float = 0.001
    momentum: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot step."""
        if self.epochs < 1 or not 0.0 < self.lr < math.inf or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"{self!r}: epochs must be at least 1, lr above 0 and momentum in [0, 1)")

    def run(self, objective: Objective, start: Tensor, after_epoch: Callable[[], Any]) -> Clamped:
        """Minimise from a start with T = 1; the last point is the result.

        Args:
            objective: The objective.
            start: ``(C, H, W)``.
            after_epoch: Called after every epoch.

        Returns:
            Where it ended, with the mean slope of the last epoch by log T.

        Raises:
            FloatingPointError: The loss is not finite, or log T has left ``[-16, 16]``.
        """
        delta, log_t = start.clone().requires_grad_(), start.new_zeros((), requires_grad=True)
        optimizer = torch.optim.SGD([delta, log_t], lr=self.lr, momentum=self.momentum)
        generator = torch.Generator().manual_seed(self.seed)
        slope = 0.0
        for epoch in range(self.epochs):
            batches, slopes, total = objective.rows.batches(generator), 0.0, 0.0
            # A process whose rows are used up goes on with none until those of all are.
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
            "lower lr"
        )


def with_exact_temperature(rows: ClampRows, delta: Tensor, gamma: float) -> Clamped:
    """Find the best T for a delta that stays as it is; the logits of all processes are gathered.

    Args:
        rows: Images and network.
        delta: ``(C, H, W)``.
        gamma: Focusing parameter of the loss; 0 is cross-entropy.

    Returns:
        delta as it was, with T.
    """
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
