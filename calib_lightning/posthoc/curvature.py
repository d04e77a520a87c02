"""Newton's method for affine maps of many classes, whose parameters are too many to store the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.posthoc.solver import Objective

_BLOCK = 2**18
_JITTER = 1e-9
_MOST_PRODUCTS = 200
_MOST_STEPS = 100
_MOST_TRIALS = 8
_ROUGHEST = 0.3
_WORN = 16
_LEAST_WEIGHT = 1e-2
_LEAST_PROB = 1e-15

Linear = Callable[[Tensor], Tensor]
"""A symmetric linear map of changes of ``[W, b]``, ``(K, K + 1)``."""


class Quadratic(NamedTuple):
    """What bends the objective of `FullMap` beside the likelihood.

    Attributes:
        ridge: Its factors: off the diagonal, on it, of b.
        pull: The Hessian of the ridge.
        free: The projection of changes on those that are allowed.
    """

    ridge: tuple[float, float, float]
    pull: Linear
    free: Linear


class Whitened:
    """Rows ``[x, 1]`` in a basis in which their second moments are the identity, for products in float32.

    Args:
        inputs: x, ``(N, K)`` float64.

    Attributes:
        rows: ``[x, 1] B``, ``(N, K + 1)`` float32.
        basis: B, ``(K + 1, K + 1)`` float64.
        inverse: The inverse of B.
    """

    def __init__(self, inputs: Tensor) -> None:
        design = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        values, vectors = torch.linalg.eigh(design.T @ design / len(design))
        scale = values.clamp_min(_JITTER * float(values[-1])).sqrt()
        self.basis, self.inverse = vectors / scale, scale.unsqueeze(1) * vectors.T
        self.rows = (design @ self.basis).float()

    def probs(self, matrix: Tensor) -> Tensor:
        """``softmax(W x + b)``, ``(N, K)`` float32; those that no product would notice are 0."""
        probs = torch.softmax(self.rows @ (matrix @ self.inverse.T).float().T, dim=1)
        return probs.masked_fill_(probs < _LEAST_PROB, 0.0)  # processors are slow on subnormal numbers

    def times(self, probs: Tensor, change: Tensor) -> Tensor:
        """The Hessian of the mean negative log-likelihood at these probabilities times a change of ``[W, b]``."""
        moved = (change @ self.inverse.T).float()
        total = torch.zeros_like(moved)
        step = max(64, _BLOCK // len(moved))
        for some, own in zip(torch.split(self.rows, step), torch.split(probs, step), strict=True):
            spread = (some @ moved.T).mul_(own)
            spread.addcmul_(own, spread.sum(dim=1, keepdim=True), value=-1.0)
            total.addmm_(spread.T, some)
        result: Tensor = total.double() @ self.inverse
        return result.div_(len(probs))

    def inverse_of_blocks(self, probs: Tensor, ridge: tuple[float, float, float]) -> Linear:
        """Invert a block of the Hessian for each row of ``[W, b]``: ``E[p_k (1 - p_k) [x, 1] [x, 1]^T]`` and ridge."""
        rows, classes = probs.shape
        off_diagonal, diagonal, bias = ridge
        hessian = self.rows.new_empty(classes, classes + 1, classes + 1)
        for own, block in zip((probs * (1.0 - probs)).T.contiguous(), hessian, strict=True):
            # The other rows hardly count, and there are many of them.
            kept = (own > _LEAST_WEIGHT * own.amax()).nonzero().squeeze(1)
            some = self.rows[kept] * own[kept].sqrt().unsqueeze(1)
            torch.mm(some.T, some, out=block)
        of_weight, of_bias = self.basis[:-1], self.basis[-1]
        wide = hessian.double().div_(rows)
        wide += 2.0 * (off_diagonal * of_weight.T @ of_weight + bias * torch.outer(of_bias, of_bias))
        wide += 2.0 * (diagonal - off_diagonal) * of_weight.unsqueeze(2) * of_weight.unsqueeze(1)
        entries = wide.diagonal(dim1=1, dim2=2)
        entries += 1e-7 * entries.mean(dim=1, keepdim=True)
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(wide)).float()

        def inverse(gradient: Tensor) -> Tensor:
            solved = torch.bmm(inverses, (gradient @ self.basis).float().unsqueeze(2)).squeeze(2)
            result: Tensor = solved.double() @ self.basis.T
            return result

        return inverse


class _Directions:
    """Solves Newton's equations by conjugate gradients, no more exactly than is worth while.

    The products are in float32, which limits how well a direction is known, but not how well the optimum is.
    """

    def __init__(self, whitened: Whitened, bend: Quadratic) -> None:
        self._whitened, self._bend = whitened, bend
        self._inverse: Linear | None = None
        self._first = 0.0

    def __call__(self, matrix: Tensor, gradient: Tensor) -> Tensor:
        """The inverse Hessian at ``[W, b]`` times the gradient, ``(K, K + 1)``."""
        probs, free = self._whitened.probs(matrix), self._bend.free
        inverse = self._inverse = self._inverse or self._whitened.inverse_of_blocks(probs, self._bend.ridge)
        rest, result = gradient.clone(), torch.zeros_like(gradient)
        way = towards = free(inverse(free(rest)))
        size = start = float((rest * towards).sum())
        self._first = self._first or start
        enough = start * min(_ROUGHEST**2, (max(start, 0.0) / self._first) ** 0.5) if self._first > 0.0 else 0.0
        products = 0
        while size > enough and products < _MOST_PRODUCTS:
            turned = free(self._whitened.times(probs, way) + self._bend.pull(way))
            bent = float((way * turned).sum())
            if not bent > 0.0:
                break
            products += 1
            result += (size / bent) * way
            rest -= (size / bent) * turned
            towards = free(inverse(free(rest)))
            size, before = float((rest * towards).sum()), size
            way = towards + (size / before) * way
        if products > _WORN:
            self._inverse = None  # the rows weigh differently by now
        return result if products else towards


class Descent(NamedTuple):
    """Where Newton's method stopped: ``[W, b]`` flattened, and how often the objective was evaluated."""

    point: Tensor
    passes: int


def newton(
    objective: Objective, start: Tensor, whitened: Whitened, bend: Quadratic, tolerance: float, most: int
) -> Descent:
    """Minimise the objective of `FullMap` until no entry of its gradient is above a tolerance, or no step is lower.

    Args:
        objective: Maps ``[W, b]`` flattened to value and gradient.
        start: Where to begin.
        whitened: The rows.
        bend: The ridge.
        tolerance: Largest absolute entry of the gradient at the end.
        most: Largest number of evaluations of the objective.

    Returns:
        The last point.
    """
    directions, shape = _Directions(whitened, bend), (-1, whitened.rows.shape[1])
    point, (value, gradient), passes = start, objective(start), 1
    for _ in range(_MOST_STEPS):
        if float(gradient.abs().max()) <= tolerance:
            break
        direction = directions(point.view(shape), gradient.view(shape)).flatten()
        slope, length = -float(direction @ gradient), 1.0
        for _ in range(_MOST_TRIALS):
            if not slope < 0.0 or passes >= most:
                return Descent(point, passes)
            following = point - length * direction
            value_there, gradient_there = objective(following)
            passes += 1
            slope_there = -float(direction @ gradient_there)
            # Values that differ by rounding only are compared by slopes.
            lower = float(value_there) <= float(value) + 1e-4 * length * slope
            if lower or (abs(slope_there) <= 0.9 * abs(slope) and float(value_there) <= float(value) * (1.0 + 1e-14)):
                break
            # The zero of a line through the slopes, kept away from both ends.
            part = slope / (slope - slope_there) if slope_there > 0.0 else 0.3
            length *= min(max(part, 0.1), 0.7)
        else:
            return Descent(point, passes)
        point, value, gradient = following, value_there, gradient_there
    return Descent(point, passes)
