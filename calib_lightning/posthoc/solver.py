"""Minimisation of smooth functions: to the optimum, or as in the literature."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.utils.described import Described

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps a point ``(P,)`` float64 to its value (0-d) and gradient ``(P,)``, float64, without autograd."""

Preconditioner = Callable[[Tensor], Tensor]
"""Multiplies a gradient ``(P,)`` by an approximate inverse Hessian; linear, symmetric and positive semidefinite."""

Curvature = Callable[[Tensor], Preconditioner]
"""Maps a point ``(P,)`` to an approximate inverse Hessian."""

CONVERGED = 1e-6
"""A gradient whose entries are all at most this (nats per unit of a parameter) counts as zero."""

_PAIRS = 10
_RENEWAL = 20
_MOST_TRIALS = 30
# Values whose relative difference is below this are compared by their slopes instead.
_NOISE = 1e-14


class Solution(NamedTuple):
    """Where a solver stopped.

    Attributes:
        point: ``(P,)`` float64.
        value: The objective there.
        gradient_norm: Largest absolute entry of its gradient there.
        passes: How often the objective was evaluated.
    """

    point: Tensor
    value: float
    gradient_norm: float
    passes: int

    @property
    def converged(self) -> bool:
        """Whether the gradient is zero up to rounding."""
        return self.gradient_norm <= CONVERGED


class Solver(Described, ABC):
    """A way to minimise a smooth function."""

    @abstractmethod
    def minimise(self, objective: Objective, start: Tensor, curvature: Curvature | None = None) -> Solution:
        """Minimise a function.

        Args:
            objective: The function.
            start: ``(P,)`` float64.
            curvature: Approximate inverse Hessian, for solvers that use it; those of the literature do not.

        Returns:
            Where the solver stopped.
        """


class _Counted:
    """Counts the evaluations of an objective."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.passes = objective, 0

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += 1
        return self.objective(point)


class _Place(NamedTuple):
    """A point with its value, gradient, and slope along the search direction."""

    point: Tensor
    value: float
    gradient: Tensor
    slope: float


@dataclass(frozen=True)
class LBFGS(Solver):
    """L-BFGS until the gradient is zero up to rounding (Nocedal and Wright, 2006, algorithm 7.5).

    Steps are accepted by the approximate Wolfe conditions (Hager and Zhang, 2005), in which slopes show a decrease even
    where values no longer differ. Up to rounding, the result is never above the start.

    Args:
        max_passes: Largest number of evaluations of the objective.
        tolerance: Largest absolute entry of the gradient at the end.

    Example:
        >>> bowl = lambda x: ((x - 3).square().sum(), 2 * (x - 3))
        >>> LBFGS().minimise(bowl, torch.zeros(2, dtype=torch.float64)).point
        tensor([3., 3.], dtype=torch.float64)
    """

    max_passes: int = 1000
    tolerance: float = 1e-9

    def minimise(self, objective: Objective, start: Tensor, curvature: Curvature | None = None) -> Solution:
        """Minimise; see `Solver.minimise`."""
        counted = _Counted(objective)
        value, gradient = counted(start)
        here = _Place(start, float(value), gradient, 0.0)
        pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_PAIRS)
        precondition, steps = None, 0
        while counted.passes < self.max_passes and float(here.gradient.abs().max()) > self.tolerance:
            if curvature and steps % _RENEWAL == 0:
                precondition = curvature(here.point)
            steps += 1
            direction = -_quasi_newton(here.gradient, pairs, precondition)
            slope = float(direction @ here.gradient)
            # Without curvature the gradient does not determine the length of the step.
            first = 1.0 if pairs or precondition else min(1.0, 1.0 / float(here.gradient.abs().sum()))
            trials = min(_MOST_TRIALS, self.max_passes - counted.passes)
            found = _search(counted, here._replace(slope=slope), direction, first, trials) if slope < 0.0 else None
            if found is None:
                if not pairs:
                    break
                pairs.clear()  # they may be misleading; retry with the gradient alone
                continue
            moved, turned = found.point - here.point, found.gradient - here.gradient
            product = moved @ turned
            if float(product) > 0.0:
                pairs.append((moved, turned, product))
            here = found
        return Solution(here.point, here.value, float(here.gradient.abs().max()), counted.passes)


def _quasi_newton(
    gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, Tensor]], precondition: Preconditioner | None
) -> Tensor:
    """The gradient times the inverse Hessian estimated from pairs of steps and changes of the gradient."""
    rest = gradient.clone()
    shares = []
    for moved, turned, product in reversed(pairs):
        share = (moved @ rest) / product
        rest -= share * turned
        shares.append(share)
    result = precondition(rest) if precondition else rest
    if pairs:
        _, turned, product = pairs[-1]
        result = result * (product / (turned @ (precondition(turned) if precondition else turned)))
    for (moved, turned, product), share in zip(pairs, reversed(shares), strict=True):
        result = result + (share - (turned @ result) / product) * moved
    return result


def _search(objective: Objective, start: _Place, direction: Tensor, first: float, trials: int) -> _Place | None:
    """Find a step with a much flatter slope and no higher value, or the best one found; ``None`` if none is lower.

    It lies between one where the function still decreases steeply and one where it increases or is too high.
    """
    ceiling = start.value + _NOISE * abs(start.value)
    low, low_slope, high, high_slope = 0.0, start.slope, math.inf, math.nan
    step, lowest = first, None
    for _ in range(trials):
        point = start.point + step * direction
        value, gradient = objective(point)
        here = _Place(point, float(value), gradient, float(gradient @ direction))
        too_far = not here.value <= ceiling or not here.slope <= -0.8 * start.slope
        if not too_far and here.slope >= 0.9 * start.slope:
            return here
        if here.value < (lowest or start).value and math.isfinite(here.slope):
            lowest = here
        if too_far:
            high, high_slope = step, here.slope
        else:
            low, low_slope = step, here.slope
        step = _between(low, low_slope, high, high_slope)
    return lowest


def _between(low: float, low_slope: float, high: float, high_slope: float) -> float:
    """Next step to try."""
    if high == math.inf:
        return 4.0 * low
    if not 0.0 < high_slope < math.inf:
        return low + 0.3 * (high - low)
    # The zero of a line through the slopes, kept away from both ends.
    part = low_slope / (low_slope - high_slope)
    return low + min(max(part, 0.1), 0.9) * (high - low)


def checked_solver(solver: Solver | None) -> Solver | None:
    """Return a solver or ``None``; raise ``TypeError`` for anything else, at once instead of in the fit."""
    if not (solver is None or isinstance(solver, Solver)):
        raise TypeError(f"solver is {solver!r}; it must be a Solver such as PlainLBFGS(), or None for the optimum.")
    return solver


def checked_ridge(ridge: float | None, solver: Solver | None) -> float | None:
    """Return the ridge of an affine map; raise ``ValueError`` if it is not allowed."""
    if ridge is not None and not (0.0 <= ridge < math.inf and solver is None):
        raise ValueError(
            f"ridge is {ridge!r} and solver {solver!r}; ridge must be finite and >= 0, and solvers of the literature "
            "have none. Leave one of them out."
        )
    return ridge


@dataclass(frozen=True)
class PlainLBFGS(Solver):
    """L-BFGS with a fixed step and no line search, as in the code of Guo et al. (2017); it stops far from the optimum.

    Args:
        lr: Step length.
        steps: Number of steps.

    Example:
        >>> PlainLBFGS(steps=20).name
        'PlainLBFGS(steps=20)'
    """

    lr: float = 0.01
    steps: int = 50

    def minimise(self, objective: Objective, start: Tensor, curvature: Curvature | None = None) -> Solution:
        """Minimise; return the last point, as that code does."""
        counted, point = _Counted(objective), start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([point], lr=self.lr, max_iter=self.steps)

        def closure() -> Tensor:
            value, point.grad = counted(point.detach())
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return _at(counted, point.detach())


@dataclass(frozen=True)
class GradientDescent(Solver):
    """Full-batch gradient descent with a fixed learning rate, used by some papers for vector and matrix scaling.

    Args:
        lr: Learning rate.
        epochs: Number of steps.

    Example:
        >>> bowl = lambda x: ((x - 3).square().sum(), 2 * (x - 3))
        >>> GradientDescent(lr=0.5, epochs=1).minimise(bowl, torch.zeros(1, dtype=torch.float64)).point
        tensor([3.], dtype=torch.float64)
    """

    lr: float = 1e-3
    epochs: int = 1000

    def minimise(self, objective: Objective, start: Tensor, curvature: Curvature | None = None) -> Solution:
        """Minimise; return the last point."""
        counted, point = _Counted(objective), start.clone()
        for _ in range(self.epochs):
            point = point - self.lr * counted(point)[1]
        return _at(counted, point)


@dataclass(frozen=True)
class AdamDescent(Solver):
    """Full-batch Adam with a fixed learning rate.

    Args:
        lr: Learning rate.
        epochs: Number of steps.

    Example:
        >>> AdamDescent(epochs=10).name
        'AdamDescent(epochs=10)'
    """

    lr: float = 1e-3
    epochs: int = 1000

    def minimise(self, objective: Objective, start: Tensor, curvature: Curvature | None = None) -> Solution:
        """Minimise; return the last point."""
        counted, point = _Counted(objective), start.clone().requires_grad_()
        adam = torch.optim.Adam([point], lr=self.lr)
        for _ in range(self.epochs):
            point.grad = counted(point.detach())[1]
            adam.step()
        return _at(counted, point.detach())


def _at(counted: _Counted, point: Tensor) -> Solution:
    """Evaluate the objective at the last point."""
    value, gradient = counted(point)
    return Solution(point, float(value), float(gradient.abs().max()), counted.passes)
