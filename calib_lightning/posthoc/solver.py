"""How a smooth function of a vector is minimised: to the optimum, or as the papers did it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.posthoc.spec import Described

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps a point ``(P,)`` float64 to its value (0-d) and gradient ``(P,)``, float64, without autograd."""

CONVERGED = 1e-6
"""A gradient with no entry above this (in nats by unit of a parameter) is taken for zero."""


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
        """Whether the gradient is zero but for rounding."""
        return self.gradient_norm <= CONVERGED


class Solver(Described, ABC):
    """A way to minimise a smooth function."""

    @abstractmethod
    def minimise(self, objective: Objective, start: Tensor) -> Solution:
        """Minimise.

        Args:
            objective: The function.
            start: ``(P,)`` float64.

        Returns:
            Where it stopped; never above the start.
        """


class _Counted:
    """Counts evaluations and keeps the best point; values that are not finite are never the best."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.passes = objective, 0
        self.value, self.point, self.gradient = torch.inf, torch.empty(0), torch.empty(0)

    def __call__(self, point: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = self.objective(point)
        self.passes += 1
        if self.passes == 1 or float(value) < self.value:
            self.value, self.point, self.gradient = float(value), point.clone(), gradient.clone()
        return value, gradient

    def best(self) -> Solution:
        return Solution(self.point, self.value, float(self.gradient.abs().max()), self.passes)


@dataclass(frozen=True)
class LBFGS(Solver):
    """L-BFGS with a strong Wolfe line search, until the gradient is zero but for rounding (Nocedal and Wright, 2006).

    Args:
        max_passes: Most evaluations of the objective.
        tolerance: Largest absolute entry of the gradient at the end.
    """

    max_passes: int = 1000
    tolerance: float = 1e-9

    def minimise(self, objective: Objective, start: Tensor) -> Solution:
        """Minimise; see `Solver.minimise`."""
        counted = _Counted(objective)
        _torch_lbfgs(counted, start, lr=1.0, steps=self.max_passes, tolerance=self.tolerance, search="strong_wolfe")
        return counted.best()


@dataclass(frozen=True)
class PlainLBFGS(Solver):
    """L-BFGS with a fixed step and no line search, as in the code of Guo et al. (2017); it stops far from the optimum.

    Args:
        lr: Length of a step.
        steps: Number of steps.
    """

    lr: float = 0.01
    steps: int = 50

    def minimise(self, objective: Objective, start: Tensor) -> Solution:
        """Minimise; the last point is the result, as in that code."""
        counted = _Counted(objective)
        point = _torch_lbfgs(counted, start, lr=self.lr, steps=self.steps, tolerance=1e-7, search=None)
        return _at(counted, point)


@dataclass(frozen=True)
class GradientDescent(Solver):
    """Full-batch gradient descent with a fixed rate, as some papers fit vector and matrix scaling.

    Args:
        lr: Rate.
        epochs: Number of steps.
    """

    lr: float = 1e-3
    epochs: int = 1000

    def minimise(self, objective: Objective, start: Tensor) -> Solution:
        """Minimise; the last point is the result."""
        counted, point = _Counted(objective), start.clone()
        for _ in range(self.epochs):
            point = point - self.lr * counted(point)[1]
        return _at(counted, point)


@dataclass(frozen=True)
class AdamDescent(Solver):
    """Full-batch Adam with a fixed rate.

    Args:
        lr: Rate.
        epochs: Number of steps.
    """

    lr: float = 1e-3
    epochs: int = 1000

    def minimise(self, objective: Objective, start: Tensor) -> Solution:
        """Minimise; the last point is the result."""
        counted, point = _Counted(objective), start.clone().requires_grad_()
        adam = torch.optim.Adam([point], lr=self.lr)
        for _ in range(self.epochs):
            point.grad = counted(point.detach())[1]
            adam.step()
        return _at(counted, point.detach())


def _at(counted: _Counted, point: Tensor) -> Solution:
    value, gradient = counted(point)
    return Solution(point, float(value), float(gradient.abs().max()), counted.passes)


def _torch_lbfgs(
    objective: Objective, start: Tensor, *, lr: float, steps: int, tolerance: float, search: str | None
) -> Tensor:
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        lr=lr,
        max_iter=steps,
        max_eval=steps if search else None,
        tolerance_grad=tolerance,
        tolerance_change=0.0 if search else 1e-9,
        history_size=20 if search else 100,
        line_search_fn=search,
    )

    def closure() -> Tensor:
        value, gradient = objective(point.detach())
        point.grad = gradient
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return point.detach()
