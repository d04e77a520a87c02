"""Matrix scaling (Guo et al., 2017), plain and with the off-diagonal and intercept ridge of Kull et al. (2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.linear import FullMap, Ridge, separates
from calib_lightning.posthoc.odir import RidgedMatrix
from calib_lightning.posthoc.solver import LBFGS, Solver, checked_solver


class MatrixScaling(Calibrator):
    """Matrix scaling (Guo et al., "On calibration of modern neural networks", 2017): an affine map of the logits.

    ``q = softmax(W z + b)`` with the maximum likelihood W and b: logistic regression of the label on the logits. Its
    K (K + 1) parameters overfit unless there are many times more calibration rows; prefer `MatrixScalingODIR`. Without
    a solver they are fitted to the optimum, from ``W = I/T`` with the maximum likelihood temperature T. Only
    differences between the rows of W matter; their mean is that of the start.

    Args:
        solver: A method of the literature, from ``W = I, b = 0``, such as `GradientDescent` or `AdamDescent`; ``None``
            fits to the optimum.

    Raises:
        TypeError: ``solver`` is not a `Solver`.

    Attributes:
        weight: W, ``(K, K)``.
        bias: b, ``(K,)``, with mean zero.

    Deviations:
        As with `VectorScaling`, gradient descent stops far from the optimum, and the report says so. For a class
        without rows, its row of W keeps the starting value and its b is the mean of the others.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]] * 5)
        >>> labels = torch.tensor([0, 0, 1, 1] * 4 + [0, 1, 0, 1])
        >>> MatrixScaling().fit(logits, labels)(torch.tensor([[2.0, 0.0]])).exp()
        tensor([[0.9000, 0.1000]])
    """

    preserves_argmax = False
    per_class = True
    weight: Tensor
    bias: Tensor

    def __init__(self, solver: Solver | None = None) -> None:
        super().__init__()
        self.solver = checked_solver(solver)
        self.register_state("weight", "bias")

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Minimise the negative log-likelihood; see `Calibrator.fit_rows`."""
        full = FullMap(logits.double(), labels)
        if self.solver is None:
            fit = full.fit(Ridge(), LBFGS())
            logits = torch.addmm(fit.matrix[:, -1], full.inputs, fit.matrix[:, :-1].T)
            held_at_bound = full.temperature.at_bound and not bool(full.present.all())
            at_bound = held_at_bound or separates(logits, labels)
        else:
            fit, at_bound = full.fit(Ridge(), self.solver, full.identity), False
        self.weight, self.bias = fit.matrix[:, :-1].contiguous(), fit.matrix[:, -1].contiguous()
        return Optimum(fit.solution.converged, fit.solution.passes, fit.solution.gradient_norm, at_bound)

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
