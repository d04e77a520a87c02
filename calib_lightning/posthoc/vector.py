"""Vector scaling (Guo et al., 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.metrics.functional.temperature import fit_inverse_temperature
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.linear import DiagonalMap, default_ridge, notes_on_separation, separates
from calib_lightning.posthoc.solver import LBFGS, Solver, checked_ridge, checked_solver
from calib_lightning.posthoc.temperature import bounded_temperature


class VectorScaling(Calibrator):
    """Vector scaling (Guo et al., "On calibration of modern neural networks", 2017): a weight and a bias per class.

    ``q = softmax(w * z + b)`` with w and b of the lowest ``NLL + r (|T w - 1|^2 + |b|^2)``, NLL the mean negative
    log-likelihood and T its best temperature. Without a solver they are fitted to the optimum, from ``w = 1/T, b = 0``.
    A constant added to all logits of a row changes the result.

    Args:
        solver: A method of the literature, from ``w = 1, b = 0`` and without a ridge, such as `GradientDescent` or
            `AdamDescent`; ``None`` fits to the optimum.
        ridge: r >= 0; 0 is the maximum likelihood. ``None`` is ``K/N min(1, 10 K/N)``, or ``K/N`` if a class has no
            rows, which matters only where rows are few; the report says so then.

    Raises:
        TypeError: ``solver`` is not a `Solver`.
        ValueError: ``ridge`` is negative or not finite, or is given with a solver.

    Attributes:
        weight: w, ``(K,)``.
        bias: b, ``(K,)``, with mean zero.

    Deviations:
        Gradient descent with learning rate 1e-3 for 1000 epochs, as in some papers, stops far from the optimum, and the
        report says so: for 5000 rows with logits 2.5 times too large the negative log-likelihood ended 0.38 nats above
        the optimum with 10 classes and 1.24 with 100; Adam with the same rate ended 9e-5 and 3e-3 above. Guo et al.
        have no ridge. Without one, accurate networks need hundreds of rows a class, as few errors decide, and a class
        without rows keeps w = 1/T, and its b is the mean of the others, since the likelihood has no maximum in b.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]] * 5)
        >>> labels = torch.tensor([0, 0, 1, 1] * 4 + [0, 1, 0, 1])
        >>> fitted = VectorScaling(ridge=0.0).fit(logits, labels)
        >>> [round(weight, 4) for weight in fitted.weight.tolist()]
        [1.0986, 1.0986]
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
            fit = DiagonalMap(logits.double(), labels).fit(0.0, self.solver, 1.0)
            self.weight, self.bias = fit.matrix
            return Optimum(fit.solution.converged, fit.solution.passes, fit.solution.gradient_norm)
        search, classes = bounded_temperature if self.ridge != 0.0 else fit_inverse_temperature, logits.shape[1]
        temperature = search(logits, labels)
        inputs = logits.double() * temperature.beta
        ridge, notes = default_ridge(labels, classes, 2 * classes) if self.ridge is None else (self.ridge, ())
        fit = DiagonalMap(inputs, labels).fit(ridge, LBFGS(), 1.0)
        separated = separates(torch.addcmul(fit.matrix[1], inputs, fit.matrix[0]), labels)
        notes += notes_on_separation(ridge) if separated else ()
        self.weight, self.bias = fit.matrix[0] * temperature.beta, fit.matrix[1]
        solution, at_bound = fit.solution, temperature.at_bound or (separated and ridge == 0.0)
        return Optimum(solution.converged, solution.passes, solution.gradient_norm, at_bound, notes)

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Scale and shift; see `Calibrator.transform`."""
        return torch.log_softmax(logits * self.weight.to(logits.dtype) + self.bias.to(logits.dtype), dim=-1)
