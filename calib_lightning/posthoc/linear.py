"""What affine maps of logits share: likelihood and gradient, ridge, and an approximate Hessian for preconditioning.

A full map is stored as one matrix ``M = [W, b]`` of shape ``(K, K + 1)``, a diagonal map as ``[w; b]`` of shape
``(2, K)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.posthoc.curvature import Quadratic, Whitened, newton
from calib_lightning.posthoc.solver import LBFGS, Preconditioner, Solution, Solver
from calib_lightning.posthoc.temperature import bounded_temperature

LOG_TINY = math.log(torch.finfo(torch.float32).tiny)
"""Logarithm of the smallest normal float32 number, a lower bound for log-probabilities."""

_BLOCK = 2**18
_JITTER, _ROWS_A_PARAMETER = 1e-9, 5
_MANY_CLASSES, _ROWS_A_CLASS = range(32, 201), 10


class Ridge(NamedTuple):
    """Factors of the squared distances of the entries of W and b from those of the identity; see `FullMap`."""

    off_diagonal: float = 0.0
    diagonal: float = 0.0
    bias: float = 0.0


def blocks(inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows into blocks of which a few copies fit in the cache."""
    step = max(64, _BLOCK // inputs.shape[1])
    return zip(torch.split(inputs, step), torch.split(labels, step), strict=True)


def _nll_and_residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods, and ``softmax(logits) - onehot(labels)``, which overwrites the logits."""
    column = labels.unsqueeze(1)
    logits -= logits.amax(dim=1, keepdim=True)
    of_label = logits.gather(1, column).sum()
    logits.exp_()
    total = logits.sum(dim=1, keepdim=True)
    logits /= total
    nll = torch.log(total).sum() - of_label
    return nll, logits.scatter_add_(1, column, logits.new_full(column.shape, -1.0))


def full_nll(inputs: Tensor, labels: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood (0-d) of ``softmax(W x + b)`` and its gradient by ``[W, b]``, ``(K, K + 1)``."""
    value, gradient = matrix.new_zeros(()), torch.zeros_like(matrix)
    weight, bias = matrix[:, :-1], matrix[:, -1]
    for some, own in blocks(inputs, labels):
        nll, residual = _nll_and_residual(torch.addmm(bias, some, weight.T), own)
        value += nll
        gradient[:, :-1].addmm_(residual.T, some)
        gradient[:, -1] += residual.sum(dim=0)
    return value / len(labels), gradient / len(labels)


def diagonal_nll(inputs: Tensor, labels: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood (0-d) of ``softmax(w * x + b)`` and its gradient by ``[w; b]``, ``(2, K)``."""
    value, gradient = matrix.new_zeros(()), torch.zeros_like(matrix)
    for some, own in blocks(inputs, labels):
        nll, residual = _nll_and_residual(torch.addcmul(matrix[1], some, matrix[0]), own)
        value += nll
        gradient[1] += residual.sum(dim=0)
        gradient[0] += residual.mul_(some).sum(dim=0)
    return value / len(labels), gradient / len(labels)


def separates(logits: Tensor, labels: Tensor) -> bool:
    """Whether the label's logit is the largest in every row, so that the likelihood has no maximum."""
    column = labels.unsqueeze(1)
    others = logits.scatter(1, column, -torch.inf).amax(dim=1)
    return bool((logits.gather(1, column).squeeze(1) > others).all())


class DefaultRidge(NamedTuple):
    """The ridge of a map that was given none, and a note if the rows are too few to do without."""

    strength: float
    notes: tuple[str, ...]


def default_ridge(labels: Tensor, classes: int, parameters: int) -> DefaultRidge:
    """``r = K/N min(1, 5 P/N)`` for P parameters, ``K/N`` if a class has no rows.

    With many rows it vanishes faster than the error of the maximum likelihood; with few it is that of Berta et al.
    (2026).
    """
    rows, enough = len(labels), _ROWS_A_PARAMETER * parameters
    share = 1.0 if bool((torch.bincount(labels, minlength=classes) == 0).any()) else min(1.0, enough / rows)
    few = f"{rows} rows are few for {parameters} parameters, which a ridge therefore holds near temperature scaling"
    return DefaultRidge(share * classes / rows, (few,) if rows <= enough else ())


def notes_on_separation(ridge: float) -> tuple[str, ...]:
    """What keeps the parameters finite where the mapped logits separate the rows."""
    held = "only the ridge holds the parameters" if ridge else "the parameters grow until the gradient is zero"
    return (f"the map separates the rows, so the likelihood has no maximum and {held}",)


class Fit(NamedTuple):
    """A fitted affine map ``[W, b]`` or ``[w; b]``, b with mean zero, and where the solver stopped."""

    matrix: Tensor
    solution: Solution


class FullMap:
    """``softmax(W x + b)`` on given rows, which can be fitted with several ridges.

    The objective is the mean negative log-likelihood plus ``sum_ij R_ij (M_ij - [I, 0]_ij)^2``. Adding the same row to
    all rows of M does not change the likelihood; of all equivalent M the one with the smallest ridge is used, so that
    the solver need not find it along directions in which only the ridge changes, which would be slow.

    Parameters that could grow without bound because a class has no labels keep their starting values: without a ridge
    the row of M of that class, and the mean over the other rows; with a ridge that leaves the diagonal free, its
    diagonal entry.

    Args:
        inputs: ``(N, K)`` float64.
        labels: ``(N,)``.

    Attributes:
        identity: ``[I, 0]``, ``(K, K + 1)``.
        start: ``[I / T, 0]`` with the maximum likelihood temperature T.
        temperature: Result of the search for T.
        present: Which classes have labels, ``(K,)``.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels
        classes = inputs.shape[1]
        self.identity = torch.eye(classes, classes + 1, dtype=torch.float64, device=inputs.device)
        self.temperature = bounded_temperature(inputs, labels)
        self.start = self.temperature.beta * self.identity
        self.present = torch.bincount(labels, minlength=classes) > 0

    @cached_property
    def _whitened(self) -> Whitened:
        return Whitened(self.inputs)

    def fit(self, ridge: Ridge, solver: Solver, start: Tensor | None = None, as_written: bool = False) -> Fit:
        """Fit with a ridge R, from ``[W, b]`` or the attribute `start`; ``as_written`` keeps M as it is for R."""
        shape = self.identity.shape
        factors = torch.full_like(self.identity, ridge.off_diagonal)
        factors[:, -1] = ridge.bias
        factors.fill_diagonal_(ridge.diagonal)
        total = factors.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        free = self._free(ridge)

        def least(matrix: Tensor) -> Tensor:
            change = matrix - self.identity
            return change if as_written else change - (factors * change).sum(dim=0) / total

        def objective(point: Tensor) -> tuple[Tensor, Tensor]:
            matrix = point.view(shape)
            value, gradient = full_nll(self.inputs, self.labels, matrix)
            change = least(matrix)
            pulled = factors * change
            return value + (pulled * change).sum(), free(gradient.add_(pulled, alpha=2.0)).flatten()

        def pull(change: Tensor) -> Tensor:
            return 2.0 * factors * (change - (factors * change).sum(dim=0) / total)

        def curvature(point: Tensor) -> Preconditioner:
            inverse = self._inverse_hessian(ridge, point.view(shape))
            return lambda gradient: free(inverse(free(gradient.view(shape)))).flatten()

        point, passes = (self.start if start is None else start).flatten(), 0
        many = shape[0] in _MANY_CLASSES and len(self.labels) >= _ROWS_A_CLASS * shape[0]
        if isinstance(solver, LBFGS) and ridge.off_diagonal > 0.0 and many:
            # Here its inverses cost no more than the rows. L-BFGS goes on where it cannot, and else ends at once.
            limits = solver.tolerance, solver.max_passes
            point, passes = newton(objective, point, self._whitened, Quadratic(ridge, pull, free), *limits)
        solution = solver.minimise(objective, point, curvature)
        matrix = self.identity + least(solution.point.view(shape))
        matrix[:, -1] -= matrix[:, -1].mean()
        return Fit(matrix, solution._replace(passes=passes + solution.passes))

    def _free(self, ridge: Ridge) -> Callable[[Tensor], Tensor]:
        """Return the projection of changes of M on those that are allowed."""
        if bool(self.present.all()) or ridge.diagonal > 0.0:
            return lambda change: change
        if ridge.off_diagonal == 0.0:
            return lambda change: (change - change[self.present].mean(dim=0)) * self.present.unsqueeze(1)
        # As a row may be added to all, the diagonal entry is held relative to the mean of the others in its column.
        classes = len(self.identity)
        absent = torch.nn.functional.pad(~self.present, (0, 1))
        held, length = (self.identity * classes - 1.0) / (classes - 1) * absent, classes / (classes - 1)
        return lambda change: change - held * ((held * change).sum(dim=0) / length)

    def _inverse_hessian(self, ridge: Ridge, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        """Approximate the inverse Hessian at ``matrix`` by one block for each row of M.

        The block of row k, ``E[p_k (1 - p_k) [x, 1] [x, 1]^T] + 2 diag(R_k)``, is approximated by
        ``s_k C + 2 diag(R_k)``, where C is the mean of the first part over classes and s_k the weight of the class. If
        b is scaled so that its ridge equals that of the off-diagonal entries, the second part is a multiple of the
        identity except for one entry. Then the eigenvectors of C serve all rows, with the formula of Sherman and
        Morrison for that entry.
        """
        classes = len(matrix)
        moments, shares = matrix.new_zeros(classes + 1, classes + 1), matrix.new_zeros(classes)
        for some, _ in blocks(self.inputs, self.labels):
            probs = torch.softmax(torch.addmm(matrix[:, -1], some, matrix[:, :-1].T), dim=1)
            spread = probs * (1.0 - probs)
            shares += spread.sum(dim=0)
            design = torch.cat([some, torch.ones_like(some[:, :1])], dim=1)
            # Certain rows get a little weight too, in case all rows are certain.
            moments.addmm_((design * (spread.mean(dim=1, keepdim=True) + _JITTER)).T, design)
        rows = len(self.labels)
        shares = (shares / (shares.mean() + rows * _JITTER)).clamp_min_(1e-3)

        units = torch.ones_like(matrix[0])
        if ridge.bias > 0.0:
            units[-1] = (ridge.off_diagonal / ridge.bias) ** 0.5
        values, vectors = torch.linalg.eigh(moments / rows * units * units.unsqueeze(1))
        values = values.clamp_min(_JITTER * float(values[-1]))
        spread = shares.unsqueeze(1) * values
        whole = spread + 2.0 * ridge.off_diagonal
        rotated = (vectors[:classes] / whole) @ vectors.T
        remains = (vectors[:classes].square() * (spread + 2.0 * ridge.diagonal) / whole).sum(dim=1)
        factor = 2.0 * (ridge.off_diagonal - ridge.diagonal) / remains

        def inverse(gradient: Tensor) -> Tensor:
            result: Tensor = (((gradient * units) @ vectors) / whole) @ vectors.T
            return result.addcmul_((factor * result.diagonal()).unsqueeze(1), rotated).mul_(units)

        return inverse


class DiagonalMap:
    """``softmax(w * x + b)`` on given rows; the ridge is ``r (|w - 1|^2 + |b|^2)``.

    Without a ridge w and b of classes without labels keep their starting values, and b of the others keeps mean zero,
    since otherwise all could grow together without bound.

    Args:
        inputs: ``(N, K)`` float64.
        labels: ``(N,)``.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels
        ones = torch.ones(inputs.shape[1], dtype=torch.float64, device=inputs.device)
        self.identity = torch.stack([ones, 0.0 * ones])

    def fit(self, ridge: float, solver: Solver, beta: float) -> Fit:
        """Fit with a ridge r, from w = beta and b = 0."""
        shape = self.identity.shape
        fitted = torch.bincount(self.labels, minlength=shape[1]) > 0
        if ridge > 0.0:
            fitted[:] = True

        def free(change: Tensor) -> Tensor:
            return torch.stack([change[0] * fitted, (change[1] - change[1][fitted].mean()) * fitted])

        def objective(point: Tensor) -> tuple[Tensor, Tensor]:
            matrix = point.view(shape)
            value, gradient = diagonal_nll(self.inputs, self.labels, matrix)
            change = matrix - self.identity
            return value + ridge * change.square().sum(), free(gradient + 2.0 * ridge * change).flatten()

        def curvature(point: Tensor) -> Preconditioner:
            inverse = self._inverse_hessian(ridge, point.view(shape))
            return lambda gradient: free(inverse(free(gradient.view(shape)))).flatten()

        solution = solver.minimise(objective, (self.identity * beta).flatten(), curvature)
        matrix = solution.point.view(shape).clone()
        matrix[1] -= matrix[1].mean()
        return Fit(matrix, solution)

    def _inverse_hessian(self, ridge: float, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        """Invert the two by two blocks of the Hessian at ``matrix``, one for each class."""
        sums = matrix.new_zeros(3, matrix.shape[1])
        for some, _ in blocks(self.inputs, self.labels):
            probs = torch.softmax(torch.addcmul(matrix[1], some, matrix[0]), dim=1)
            spread = probs * (1.0 - probs) + _JITTER
            first = spread * some
            sums += torch.stack([spread.sum(dim=0), first.sum(dim=0), (first * some).sum(dim=0)])
        one, cross, square = sums / len(self.labels)
        one, square = one + 2.0 * ridge, square + 2.0 * ridge
        # If a logit is constant, w and b are not identified separately.
        square = square * (1.0 + _JITTER) + _JITTER
        determinant = (one * square - cross.square()).clamp_min(_JITTER * one * square)

        def inverse(gradient: Tensor) -> Tensor:
            of_weight, of_bias = gradient
            adjugate = torch.stack([one * of_weight - cross * of_bias, square * of_bias - cross * of_weight])
            return adjugate.div_(determinant)

        return inverse
