"""Temperature scaling by likelihood (Guo et al., 2017), with a fixed value, or by the focal loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from calib_lightning.metrics.functional.temperature import (
    LOG_BETA_BOUND,
    TemperatureSearch,
    search_inverse_temperature,
    tempered_rows,
)
from calib_lightning.posthoc.base import Calibrator, Optimum
from calib_lightning.posthoc.solver import CONVERGED, PlainLBFGS, Solver

_LEAST_RANGE = 1e-3
_SCAN_STEP = 0.25
_SCAN_WINDOW = 5.0


def tempered(logits: Tensor, beta: Tensor) -> Tensor:
    """Log-probabilities of ``softmax(beta z)``.

    Args:
        logits: ``(N, K)`` float32 or float64.
        beta: Inverse temperature ``1 / T``, 0-d.

    Returns:
        ``(N, K)`` in the dtype of the logits.
    """
    # The largest logit is taken off first, so that a large beta cannot overflow.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return torch.log_softmax(shifted * beta.to(logits.dtype), dim=-1)


class _Tempered(Calibrator):
    """``q = softmax(z / T)``; the state is ``beta = 1 / T``."""

    preserves_argmax = True
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("beta")

    @property
    def temperature(self) -> float:
        """The fitted T; above 1 it lowers confidence."""
        return 1.0 / float(self.beta)

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Divide by T; see `Calibrator.transform`."""
        return tempered(logits, self.beta)


class FixedTemperature(_Tempered):
    """Temperature scaling with a given T; the fit looks at K alone.

    Args:
        temperature: T > 0.

    Example:
        >>> FixedTemperature(1.5).fit(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).temperature
        1.5
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}: it must be a number above 0, such as 1.5")
        self._given = float(temperature)

    @property
    def temperature(self) -> float:
        """T."""
        return self._given

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Take T as it is; see `Calibrator.fit_rows`."""
        self.beta = logits.new_tensor(1.0 / self._given, dtype=torch.float64)
        return Optimum()


class Temperature(_Tempered):
    """Temperature scaling by likelihood (Guo et al., 2017).

    ``q = softmax(z / T)`` with the T of the least mean negative log-likelihood. The optimum is found by Newton steps in
    a bracket, in float64, for logits of any scale. Where all labels are the largest logits T is stopped at
    ``exp(-16)``. Where the labels have no more than the average logit the best distribution is uniform, and T is
    stopped where the logits of a row still differ by 1e-3 on average, so that float32 can tell the classes apart.

    Args:
        solver: ``None`` for the optimum. A solver descends on T as papers did: `PlainLBFGS` from T = 1.5 is the fit of
            the code of Guo et al., ``GradientDescent()`` from T = 1 that of papers which name 1000 epochs; others start
            from T = 1 too. The report says how far from the optimum it stopped. Where it ends higher than it began, or
            with T <= 0, T = 1 is used, and a warning says so.

    Raises:
        TypeError: ``solver`` is no `Solver`.

    Deviations: Guo et al. stop L-BFGS without a line search after 50 steps. With a best T of 2.5 that ends 0.08 nats
    above the optimum for 10 classes and 0.17 for 100; gradient descent ends 0.1 above. The default ends at it.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(Temperature().fit(logits, torch.tensor([0, 0, 0, 0])).temperature, 6)  # 1 / log 3
        0.910239
    """

    def __init__(self, solver: Solver | None = None) -> None:
        super().__init__()
        if not (solver is None or isinstance(solver, Solver)):
            raise TypeError(f"solver={solver!r}: give a solver such as PlainLBFGS(), or None for the optimum")
        self.solver = solver

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Find T; see `Calibrator.fit_rows`."""
        if self.solver is not None:
            beta, optimum = _descended(self.solver, logits, labels)
        else:
            beta, optimum = most_likely(logits, labels)
        self.beta = logits.new_tensor(beta, dtype=torch.float64)
        return optimum


class FocalTemperature(_Tempered):
    """Temperature scaling by the focal loss (Lin et al., 2017).

    ``q = softmax(z / T)`` with the T of the least ``mean (1 - q_y)^gamma (-log q_y)``. It is above the T of the
    likelihood. The loss may have several minima: it is scanned, and the lowest point found refined.

    Args:
        gamma: Exponent >= 0; 0 is the likelihood.

    Raises:
        ValueError: ``gamma`` < 0.

    Example:
        >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(FocalTemperature().fit(logits, torch.tensor([0, 0, 0, 0])).temperature, 4)
        1.3692
    """

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma={gamma!r}: it must be a number >= 0, such as 1.0")
        self.gamma = gamma

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Find T; see `Calibrator.fit_rows`."""

        def focal(beta: float, dtype: torch.dtype) -> Sloped:
            nll, slope, _ = tempered_rows(logits, labels, beta, dtype)
            miss = -torch.expm1(-nll)
            ratio = torch.where(nll > 0.0, nll / miss, 1.0)
            factor = miss.pow(self.gamma)
            by_nll = factor * (1.0 + self.gamma * (1.0 - miss) * ratio)
            return Sloped(float((factor * nll).mean()), float((by_nll * slope).mean()))

        beta, optimum = lowest(focal, logits, labels)
        self.beta = logits.new_tensor(beta, dtype=torch.float64)
        return optimum


def most_likely(logits: Tensor, labels: Tensor) -> tuple[float, Optimum]:
    """Inverse temperature of the least mean negative log-likelihood, stopped where the order of classes would be lost.

    Args:
        logits: ``(N, K)``, finite; N >= 1.
        labels: ``(N,)`` in ``0..K-1``.

    Returns:
        ``beta = 1 / T``, and how it went; the gradient is that by ``log T``.
    """
    (beta, _, at_bound), slope, passes = search_inverse_temperature(logits, labels)
    gradient = abs(beta * slope)
    optimum = Optimum(not at_bound and gradient <= CONVERGED, passes, gradient, at_bound)
    return _still_ordered(beta, logits) if at_bound else beta, optimum


class Sloped(NamedTuple):
    """A loss and its derivative by ``beta = 1 / T``."""

    value: float
    slope: float


def lowest(loss: Callable[[float, torch.dtype], Sloped], logits: Tensor, labels: Tensor) -> tuple[float, Optimum]:
    """Inverse temperature of the least loss, which may have several minima.

    The loss is scanned on ``log T`` in steps of 1/4, to 5 on both sides of the optimum of the likelihood (between the
    bounds of `Temperature` if the lowest point is an end, or the likelihood has no optimum), and the root of its slope
    beside the lowest point is found by Brent's method.

    Args:
        loss: Maps ``beta`` and a dtype to calculate in to the loss; what it gives for float32 is only compared.
        logits: ``(N, K)``, finite; N >= 1.
        labels: ``(N,)`` in ``0..K-1``.

    Returns:
        ``beta = 1 / T``, and how it went; the gradient is that by ``log T``.
    """
    likely: TemperatureSearch = search_inverse_temperature(logits, labels)
    centre, passes = math.log(likely.optimum.beta), likely.passes

    def by_log(log_beta: float) -> float:
        nonlocal passes
        passes += 1
        return math.exp(log_beta) * loss(math.exp(log_beta), torch.float64).slope

    def scan(low: float, high: float) -> tuple[float, bool]:
        nonlocal passes
        points = [centre + _SCAN_STEP * i for i in range(-128, 129) if low <= centre + _SCAN_STEP * i <= high]
        values = {point: loss(math.exp(point), torch.float32).value for point in points}
        passes += len(points)
        best = min(points, key=lambda point: (values[point], abs(point - centre)))  # constant logits: the centre
        return best, best in (points[0], points[-1])

    low, high = max(centre - _SCAN_WINDOW, -LOG_BETA_BOUND), min(centre + _SCAN_WINDOW, LOG_BETA_BOUND)
    best, at_end = scan(low, high)
    if likely.optimum.at_bound or at_end:
        best, at_end = scan(-LOG_BETA_BOUND, LOG_BETA_BOUND)
    slope = by_log(best)
    if slope == 0.0 and not at_end:
        return math.exp(best), Optimum(True, passes, 0.0)
    # The slope says on which side the minimum is; it is not beyond the next point, which is no lower.
    side = min(max(best - math.copysign(_SCAN_STEP, slope), -LOG_BETA_BOUND), LOG_BETA_BOUND)
    if by_log(side) * slope < 0.0:
        best = brentq(by_log, best, side, xtol=1e-12, rtol=1e-14)
    elif at_end:
        beta = math.exp(math.copysign(LOG_BETA_BOUND, best))
        return _still_ordered(beta, logits), Optimum(False, passes, abs(slope), True)
    gradient = abs(by_log(best))
    return math.exp(best), Optimum(gradient <= CONVERGED, passes, gradient)


def _still_ordered(beta: float, logits: Tensor) -> float:
    # The bound on T is where float32 log-probabilities still differ.
    spread = float((logits.amax(dim=-1).double() - logits.amin(dim=-1).double()).mean())
    return max(beta, min(_LEAST_RANGE / spread, 1.0)) if spread > 0.0 else beta


def _descended(solver: Solver, logits: Tensor, labels: Tensor) -> tuple[float, Optimum]:
    def by_temperature(point: Tensor) -> tuple[Tensor, Tensor]:
        temperature = float(point)
        beta = 1.0 / temperature if temperature else math.nan
        # A step may lead below zero, where the order of the logits is reversed.
        sign = math.copysign(1.0, beta)
        value, slope, _ = tempered_rows(sign * logits, labels, abs(beta))
        return value.mean(), (-sign * slope.mean() * beta**2).reshape(1)

    first = 1.5 if isinstance(solver, PlainLBFGS) else 1.0
    start = logits.new_tensor([first], dtype=torch.float64)
    found = solver.minimise(by_temperature, start)
    temperature, gradient = float(found.point), found.gradient_norm * abs(float(found.point))
    raw, highest = (float(by_temperature(start.new_tensor([t]))[0]) for t in (1.0, first))
    passes = found.passes + 2
    if not (0.0 < temperature < math.inf and found.value <= highest):
        note = f"{solver.name} ran away to T = {temperature:.4g}; T = 1 is used. Temperature() finds the optimum"
        value, slope = by_temperature(start.new_tensor([1.0]))
        return 1.0, Optimum(False, passes + 1, float(slope.abs()), notes=(note,))
    notes = (f"{solver.name} stopped at T = {temperature:.4g}, which is worse than T = 1",) if found.value > raw else ()
    return 1.0 / temperature, Optimum(gradient <= CONVERGED, passes, gradient, notes=notes)
