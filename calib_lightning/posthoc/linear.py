"""What affine maps of logits share: the likelihood and its gradient, the ridge, and the curvature that speeds them up.

A full map is kept as one matrix ``M = [W, b]`` of shape ``(K, K + 1)``, a map of each class by itself as ``[w; b]`` of
shape ``(2, K)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.temperature import fit_inverse_temperature
from calib_lightning.posthoc.solver import Preconditioner, Solution, Solver

LOG_TINY = math.log(torch.finfo(torch.float32).tiny)
"""Logarithm of the smallest normal float32 number; log-probabilities are not taken below it."""

_BLOCK = 2**18
_JITTER = 1e-9


class Ridge(NamedTuple):
    """Factors of the squared distances of the parameters from those of ``start``; see `full_objective`.

    Attributes:
        off_diagonal: Of each entry of W off the diagonal.
        diagonal: Of each entry on it.
        bias: Of each entry of b.
    """

    off_diagonal: float = 0.0
    diagonal: float = 0.0
    bias: float = 0.0


def blocks(inputs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows into blocks of which a few copies fit into the cache."""
    step = max(64, _BLOCK // inputs.shape[1])
    return zip(torch.split(inputs, step), torch.split(labels, step), strict=True)


def _nll_and_residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods, and ``softmax(logits) - onehot(labels)``, which replaces the logits."""
    column = labels.unsqueeze(1)
    logits -= logits.amax(dim=1, keepdim=True)
    of_label = logits.gather(1, column).sum()
    logits.exp_()
    total = logits.sum(dim=1, keepdim=True)
    logits /= total
    nll = torch.log(total).sum() - of_label
    return nll, logits.scatter_add_(1, column, logits.new_full(column.shape, -1.0))


def full_nll(inputs: Tensor, labels: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of ``softmax(W x + b)`` and its gradient.

    Args:
        inputs: ``(N, K)`` float64.
        labels: ``(N,)``.
        matrix: ``[W, b]``, ``(K, K + 1)``.

    Returns:
        The value in nats (0-d) and the gradient ``(K, K + 1)``.
    """
    value, gradient = matrix.new_zeros(()), torch.zeros_like(matrix)
    weight, bias = matrix[:, :-1], matrix[:, -1]
    for some, own in blocks(inputs, labels):
        nll, residual = _nll_and_residual(torch.addmm(bias, some, weight.T), own)
        value += nll
        gradient[:, :-1].addmm_(residual.T, some)
        gradient[:, -1] += residual.sum(dim=0)
    return value / len(labels), gradient / len(labels)


def diagonal_nll(inputs: Tensor, labels: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of ``softmax(w * x + b)`` and its gradient.

    Args:
        inputs: ``(N, K)`` float64.
        labels: ``(N,)``.
        matrix: ``[w; b]``, ``(2, K)``.

    Returns:
        The value in nats (0-d) and the gradient ``(2, K)``.
    """
    value, gradient = matrix.new_zeros(()), torch.zeros_like(matrix)
    for some, own in blocks(inputs, labels):
        nll, residual = _nll_and_residual(torch.addcmul(matrix[1], some, matrix[0]), own)
        value += nll
        gradient[1] += residual.sum(dim=0)
        gradient[0] += residual.mul_(some).sum(dim=0)
    return value / len(labels), gradient / len(labels)


def separates(logits: Tensor, labels: Tensor) -> bool:
    """Whether every label has more than every other class, so that larger logits are more likely without end.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)``.

    Returns:
        Whether it is so.
    """
    column = labels.unsqueeze(1)
    others = logits.scatter(1, column, -torch.inf).amax(dim=1)
    return bool((logits.gather(1, column).squeeze(1) > others).all())


class Fit(NamedTuple):
    """An affine map that was fitted.

    Attributes:
        matrix: ``[W, b]`` or ``[w; b]``; b has mean zero.
        solution: How the solver ended; its value is the objective with the ridge.
    """

    matrix: Tensor
    solution: Solution


class FullMap:
    """``softmax(W x + b)`` on given rows, to be fitted with one ridge after the other.

    The objective is the mean negative log-likelihood plus ``sum_ij R_ij (M_ij - [I, 0]_ij)^2``. A row added to all rows
    of M leaves the likelihood as it is, so of all equivalent M the one with the least ridge is meant; in this way the
    ridge alone never has to hold such a direction, which would be slow.

    What could grow for ever because a class has no labels stays at the start: without a ridge its row of M, and the
    mean over the other rows; with a ridge that leaves the diagonal free, its diagonal entry.

    Args:
        inputs: ``(N, K)`` float64.
        labels: ``(N,)``.

    Attributes:
        identity: ``[I, 0]``, ``(K, K + 1)``.
        start: ``[I / T, 0]`` with the likeliest temperature T.
        temperature: How T was found.
        present: Which classes have labels, ``(K,)``.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels
        classes = inputs.shape[1]
        self.identity = torch.eye(classes, classes + 1, dtype=torch.float64, device=inputs.device)
        self.temperature = fit_inverse_temperature(inputs, labels)
        self.start = self.temperature.beta * self.identity
        self.present = torch.bincount(labels, minlength=classes) > 0

    def fit(self, ridge: Ridge, solver: Solver, start: Tensor | None = None) -> Fit:
        """Fit.

        Args:
            ridge: R.
            solver: How.
            start: ``[W, b]``; ``None`` is the attribute `start`.

        Returns:
            Where the solver stopped.
        """
        shape = self.identity.shape
        factors = torch.full_like(self.identity, ridge.off_diagonal)
        factors[:, -1] = ridge.bias
        factors.fill_diagonal_(ridge.diagonal)
        total = factors.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        free = self._free(ridge)

        def least(matrix: Tensor) -> Tensor:
            change = matrix - self.identity
            return change - (factors * change).sum(dim=0) / total

        def objective(point: Tensor) -> tuple[Tensor, Tensor]:
            matrix = point.view(shape)
            value, gradient = full_nll(self.inputs, self.labels, matrix)
            change = least(matrix)
            pulled = factors * change
            return value + (pulled * change).sum(), free(gradient.add_(pulled, alpha=2.0)).flatten()

        def curvature(point: Tensor) -> Preconditioner:
            inverse = self._inverse_hessian(ridge, point.view(shape))
            return lambda gradient: free(inverse(free(gradient.view(shape)))).flatten()

        solution = solver.minimise(objective, (self.start if start is None else start).flatten(), curvature)
        matrix = self.identity + least(solution.point.view(shape))
        matrix[:, -1] -= matrix[:, -1].mean()
        return Fit(matrix, solution)

    def _free(self, ridge: Ridge) -> Callable[[Tensor], Tensor]:
        """Projects changes of M on those that are allowed."""
        if bool(self.present.all()) or ridge.diagonal > 0.0:
            return lambda change: change
        if ridge.off_diagonal == 0.0:
            return lambda change: (change - change[self.present].mean(dim=0)) * self.present.unsqueeze(1)
        # As a row may be added to all, the diagonal entry is held relative to the mean of the others in its column.
        classes = len(self.identity)
        held = (
            (self.identity * classes - 1.0)
            / (classes - 1)
            * torch.cat([~self.present, torch.zeros_like(self.present[:1])])
        )
        length = classes / (classes - 1)
        return lambda change: change - held * ((held * change).sum(dim=0) / length)

    def _inverse_hessian(self, ridge: Ridge, matrix: Tensor) -> Callable[[Tensor], Tensor]:
        """About the inverse of the Hessian at ``matrix``, which is taken apart into one block for each row of M.

        The block of row k, ``E[p_k (1 - p_k) [x, 1] [x, 1]^T] + 2 diag(R_k)``, is taken for ``s_k C + 2 diag(R_k)``
        with C the mean of its first part over classes and s_k the share of the class. In units of b that make its ridge
        that of the off-diagonals the second part is a multiple of the identity but for one entry, so that the
        eigenvectors of C serve all rows, and the formula of Sherman and Morrison does the rest.
        """
        classes = len(matrix)
        moments, shares = matrix.new_zeros(classes + 1, classes + 1), matrix.new_zeros(classes)
        for some, _ in blocks(self.inputs, self.labels):
            probs = torch.softmax(torch.addmm(matrix[:, -1], some, matrix[:, :-1].T), dim=1)
            spread = probs * (1.0 - probs)
            shares += spread.sum(dim=0)
            design = torch.cat([some, torch.ones_like(some[:, :1])], dim=1)
            # Rows that are certain count a little too, for the case that all are.
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

    Without a ridge w and b of classes without labels stay at the start, and b of the others keeps mean zero, as these
    could else rise together for ever.

    Args:
        inputs: ``(N, K)`` float64.
        labels: ``(N,)``.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels
        ones = torch.ones(inputs.shape[1], dtype=torch.float64, device=inputs.device)
        self.identity = torch.stack([ones, 0.0 * ones])

    def fit(self, ridge: float, solver: Solver, beta: float) -> Fit:
        """Fit.

        Args:
            ridge: r.
            solver: How.
            beta: What w starts from; b starts from zero.

        Returns:
            Where the solver stopped.
        """
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
        """The inverse of the two by two blocks of the Hessian at ``matrix``, one for each class."""
        sums = matrix.new_zeros(3, matrix.shape[1])
        for some, _ in blocks(self.inputs, self.labels):
            probs = torch.softmax(torch.addcmul(matrix[1], some, matrix[0]), dim=1)
            spread = probs * (1.0 - probs) + _JITTER
            first = spread * some
            sums += torch.stack([spread.sum(dim=0), first.sum(dim=0), (first * some).sum(dim=0)])
        one, cross, square = sums / len(self.labels)
        one, square = one + 2.0 * ridge, square + 2.0 * ridge
        # A logit that never changes leaves w and b to each other.
        square = square * (1.0 + _JITTER) + _JITTER
        determinant = (one * square - cross.square()).clamp_min(_JITTER * one * square)

        def inverse(gradient: Tensor) -> Tensor:
            of_weight, of_bias = gradient
            adjugate = torch.stack([one * of_weight - cross * of_bias, square * of_bias - cross * of_weight])
            return adjugate.div_(determinant)

        return inverse
