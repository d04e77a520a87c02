"""Structured vector and matrix scaling (Berta, Holzmüller, Jordan and Bach, 2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.metrics.functional.temperature import OptimalTemperature, fit_inverse_temperature
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.linear import DiagonalMap, Fit, FullMap, Ridge
from calib_lightning.posthoc.solver import LBFGS


def smoothed_log_probs(logits: Tensor, beta: Tensor, share: Tensor) -> Tensor:
    """``log((1 - w) softmax(beta z) + w / K)``: a share w of the probability is spread over all classes."""
    beta, share = beta.to(logits.dtype), share.to(logits.dtype)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) * beta
    tempered = torch.log_softmax(shifted, dim=-1)
    return torch.logaddexp(tempered + torch.log1p(-share), torch.log(share / logits.shape[-1]))


class _Structured(Calibrator):
    """An affine map with a ridge towards smoothed temperature scaling."""

    preserves_argmax = False
    per_class = True
    beta: Tensor
    share: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("beta", "share", "weight", "bias")

    def _start(self, logits: Tensor, labels: Tensor) -> tuple[OptimalTemperature, Tensor]:
        """Fit T, and return it with the input of the map."""
        temperature = fit_inverse_temperature(logits, labels)
        wide = logits.double()
        self.beta, self.share = wide.new_tensor(temperature.beta), wide.new_tensor(1.0 / (len(labels) + 1))
        return temperature, smoothed_log_probs(wide, self.beta, self.share)

    def _ended(self, temperature: OptimalTemperature, fit: Fit, weight: Tensor, bias: Tensor) -> Optimum:
        """Assign the map, and say how the fit went."""
        self.weight, self.bias = weight.contiguous(), bias.contiguous()
        solution = fit.solution
        return Optimum(solution.converged, solution.passes, solution.gradient_norm, temperature.at_bound)


class StructuredVectorScaling(_Structured):
    """Structured vector scaling, SVS (Berta, Holzmüller, Jordan and Bach, AISTATS 2026, "Structured matrix scaling").

    Vector scaling with a ridge towards temperature scaling that is stronger with fewer rows.
    ``q = softmax((1 + v) * x + b)`` with ``x = log((1 - w) softmax(z/T) + w/K)``, T the maximum likelihood temperature
    and ``w = 1/(N + 1)``; v and b minimise ``NLL + K/N (|v|^2 + |b|^2)``, NLL the mean negative log-likelihood.

    Attributes:
        beta: 1/T.
        share: w.
        weight: ``1 + v``, ``(K,)``.
        bias: b, ``(K,)``, with mean zero.

    Deviations:
        None known. Since w > 0, even perfectly predicted rows have a likelihood below 1, and x needs no lower bound.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]] * 5)
        >>> labels = torch.tensor([0, 0, 1, 1] * 4 + [0, 1, 0, 1])
        >>> [round(weight, 3) for weight in StructuredVectorScaling().fit(logits, labels).weight.tolist()]
        [1.047, 1.047]
    """

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Minimise the objective; see `Calibrator.fit_rows`."""
        temperature, inputs = self._start(logits, labels)
        fit = DiagonalMap(inputs, labels).fit(inputs.shape[1] / len(labels), LBFGS(), 1.0)
        return self._ended(temperature, fit, fit.matrix[0], fit.matrix[1])

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Temper, smooth, scale and shift; see `Calibrator.transform`."""
        inputs = smoothed_log_probs(logits, self.beta, self.share)
        return torch.log_softmax(inputs * self.weight.to(inputs.dtype) + self.bias.to(inputs.dtype), dim=-1)


class StructuredMatrixScaling(_Structured):
    """Structured matrix scaling, SMS (Berta, Holzmüller, Jordan and Bach, AISTATS 2026, "Structured matrix scaling").

    Matrix scaling with a ridge towards temperature scaling that is stronger with fewer rows.
    ``q = softmax((I + D) x + b)`` with the x of `StructuredVectorScaling`; D and b minimise
    ``NLL + K/N (sum_k D_kk^2 + |b|^2) + K (K - 1)/N sum_{i != j} D_ij^2``.

    Attributes:
        beta: 1/T.
        share: w.
        weight: ``I + D``, ``(K, K)``.
        bias: b, ``(K,)``, with mean zero.

    Deviations:
        None known; see `StructuredVectorScaling`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]] * 5)
        >>> labels = torch.tensor([0, 0, 1, 1] * 4 + [0, 1, 0, 1])
        >>> StructuredMatrixScaling().fit(logits, labels).weight.shape
        torch.Size([2, 2])
    """

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Minimise the objective; see `Calibrator.fit_rows`."""
        temperature, inputs = self._start(logits, labels)
        rows, classes = inputs.shape
        ridge = Ridge(off_diagonal=classes * (classes - 1) / rows, diagonal=classes / rows, bias=classes / rows)
        full = FullMap(inputs, labels)
        fit = full.fit(ridge, LBFGS(), full.identity)
        return self._ended(temperature, fit, fit.matrix[:, :-1], fit.matrix[:, -1])

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Temper, smooth and map; see `Calibrator.transform`."""
        inputs = smoothed_log_probs(logits, self.beta, self.share)
        return torch.log_softmax(inputs @ self.weight.to(inputs.dtype).T + self.bias.to(inputs.dtype), dim=-1)
