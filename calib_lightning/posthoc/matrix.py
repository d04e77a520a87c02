"""Matrix scaling (Guo et al., 2017), plain and with the off-diagonal and intercept ridge of Kull et al. (2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.metrics.functional.temperature import fit_inverse_temperature
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.linear import FullMap, Ridge, default_ridge, notes_on_separation, separates
from calib_lightning.posthoc.odir import RidgedMatrix
from calib_lightning.posthoc.solver import LBFGS, Solver, checked_ridge, checked_solver
from calib_lightning.posthoc.temperature import bounded_temperature


class MatrixScaling(Calibrator):
    """Matrix scaling (Guo et al., "On calibration of modern neural networks", 2017): an affine map of the logits.

    ``q = softmax(W z + b)``: logistic regression of the label on the logits. W and b have the lowest
    ``NLL + r (sum_k D_kk^2 + |b|^2 + (K - 1) sum_{i != j} D_ij^2)`` with ``D = T W - I``, NLL the mean negative
    log-likelihood and T its best temperature. The K (K + 1) parameters overfit unless there are many times more
    calibration rows; prefer `MatrixScalingODIR` or `StructuredMatrixScaling`. Without a solver they are fitted to the
    optimum, from ``W = I/T``. Only differences between the rows of W matter; of equivalent W that with the smallest
    ridge is used, without one that whose mean is that of the start.

    Args:
        solver: A method of the literature, from ``W = I, b = 0`` and without a ridge, such as `GradientDescent` or
            `AdamDescent`; ``None`` fits to the optimum.
        ridge: r >= 0; 0 is the maximum likelihood. ``None`` is ``K/N min(1, 5 K (K + 1)/N)``, or ``K/N`` if a class has
            no rows; the report says so where rows are few.

    Raises:
        TypeError: ``solver`` is not a `Solver`.
        ValueError: ``ridge`` is negative or not finite, or is given with a solver.

    Attributes:
        weight: W, ``(K, K)``.
        bias: b, ``(K,)``, with mean zero.

    Deviations:
        As with `VectorScaling`, Guo et al. have no ridge, and gradient descent stops far from the optimum, which the
        report says. Without a ridge, the row of W of a class without rows keeps the starting value and its b is the
        mean of the others.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]] * 5)
        >>> labels = torch.tensor([0, 0, 1, 1] * 4 + [0, 1, 0, 1])
        >>> MatrixScaling(ridge=0.0).fit(logits, labels)(torch.tensor([[2.0, 0.0]])).exp()
        tensor([[0.9000, 0.1000]])
    """

    preserves_argmax = False
    per_class = True
    weight: Tensor
    bias: Tensor

    def __init__(self, solver: Solver | None = None, ridge: float | None = None) -> None:
        super().__init__()
        self.solver, self.ridge = checked_solver(solver), checked_ridge(ridge, solver)
        self.register_state("weight", "bias")

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Minimise the objective; see `Calibrator.fit_rows`."""
        if self.solver is not None:
            full = FullMap(logits.double(), labels)
            fit = full.fit(Ridge(), self.solver, full.identity)
            self.weight, self.bias = fit.matrix[:, :-1].contiguous(), fit.matrix[:, -1].contiguous()
            return Optimum(fit.solution.converged, fit.solution.passes, fit.solution.gradient_norm)
        search, classes = bounded_temperature if self.ridge != 0.0 else fit_inverse_temperature, logits.shape[1]
        temperature = search(logits, labels)
        full = FullMap(logits.double() * temperature.beta, labels)
        parameters = classes * (classes + 1)
        ridge, notes = default_ridge(labels, classes, parameters) if self.ridge is None else (self.ridge, ())
        fit = full.fit(Ridge(off_diagonal=(classes - 1) * ridge, diagonal=ridge, bias=ridge), LBFGS(), full.identity)
        weight, bias = fit.matrix[:, :-1], fit.matrix[:, -1].contiguous()
        separated = separates(torch.addmm(bias, full.inputs, weight.T), labels)
        notes += notes_on_separation(ridge) if separated else ()
        self.weight, self.bias = weight * temperature.beta, bias
        solution, at_bound = fit.solution, temperature.at_bound or (separated and ridge == 0.0)
        return Optimum(solution.converged, solution.passes, solution.gradient_norm, at_bound, notes)

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Map; see `Calibrator.transform`."""
        mapped = logits @ self.weight.to(logits.dtype).T + self.bias.to(logits.dtype)
        return torch.log_softmax(mapped, dim=-1)


class MatrixScalingODIR(RidgedMatrix):
    """Matrix scaling with the ridge ODIR (Kull et al., NeurIPS 2019, "Beyond temperature scaling").

    ``q = softmax(W z + b)``; W and b minimise the objective of `RidgedMatrix`, whose arguments and attributes it has.
    A constant added to all logits of a row changes the result; this is not so with `Dirichlet`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]] * 5)
        >>> labels = torch.tensor([0, 0, 1, 1] * 4 + [0, 1, 0, 1])
        >>> MatrixScalingODIR(lambdas=(1.0,)).fit(logits, labels)(torch.tensor([[2.0, 0.0]])).exp()
        tensor([[0.9000, 0.1000]])
    """

    def inputs(self, logits: Tensor) -> Tensor:
        """Return the logits themselves."""
        return logits
