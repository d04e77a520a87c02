"""Ensemble temperature scaling (Zhang et al., 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib_lightning.metrics.functional.temperature import tempered_rows
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.solver import CONVERGED
from calib_lightning.posthoc.temperature import Sloped, fitted_temperature, lowest, most_likely, tempered

_MOST_UNIFORM = 1.0 - 1e-6
_BLOCK = 2**20
_MOST_STEPS = 100

Array = NDArray[np.float64]
Model = tuple[float, Array, Array]
"""Value, gradient ``(3,)`` and Hessian ``(3, 3)`` of a loss of three weights."""


def mixed(logits: Tensor, beta: Tensor, weights: Tensor) -> Tensor:
    """Log-probabilities of ``w1 softmax(beta z) + w2 softmax(z) + w3 / K``, ``(N, K)`` in the dtype of the logits."""
    log_weights = torch.log(weights.to(logits.dtype))
    uniform = torch.full_like(logits, -math.log(logits.shape[-1]))
    parts = torch.stack([tempered(logits, beta), torch.log_softmax(logits, dim=-1), uniform])
    return torch.logsumexp(parts + log_weights[:, None, None], dim=0)


class EnsembleTemperature(Calibrator):
    """Ensemble temperature scaling, ETS (Zhang et al., 2020).

    ``q = w1 softmax(z / T) + w2 softmax(z) + w3 / K`` with ``w >= 0`` and ``w1 + w2 + w3 = 1``. First T is fitted with
    w = (1, 0, 0), then w with T fixed, both to the optimum. w3 is at most ``1 - 1e-6``, so that classes keep their
    order.

    Args:
        loss: Objective of both steps: ``"mse"``, the squared distance between probabilities and one-hot labels (mean
            over rows and classes), or ``"nll"``, the mean negative log-likelihood.

    Raises:
        ValueError: An unknown ``loss``.

    Deviations: the authors' code searches T between 0.05 and 5, starting from 1, and always uses ``"mse"``. Here T is
    the best value between the bounds of `Temperature`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> ets = EnsembleTemperature().fit(logits, torch.tensor([0, 0, 0, 0]))
        >>> ets.forward(logits)[0].exp()
        tensor([0.7500, 0.2500])
    """

    preserves_argmax = True
    beta: Tensor
    weights: Tensor

    def __init__(self, loss: Literal["mse", "nll"] = "mse") -> None:
        super().__init__()
        if loss not in ("mse", "nll"):
            raise ValueError(f"loss is {loss!r}; it must be 'mse' or 'nll'.")
        self.loss = loss
        self.register_state("beta", "weights")

    @property
    def temperature(self) -> float:
        """The fitted T of the first part. An error before the fit."""
        return fitted_temperature(self, self.beta)

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Find T, then w; see `Calibrator.fit_rows`."""
        if self.loss == "mse":
            beta, optimum = lowest(lambda b, dtype: _squared(logits, labels, b, dtype), logits, labels)
            gram, inner = _products(logits, labels, beta)
            objective = _quadratic(gram, inner)
        else:
            beta, optimum = most_likely(logits, labels)
            objective = _log_likelihood(logits, labels, beta)
        weights, gradient, steps = _best_weights(objective)
        notes: tuple[str, ...] = ()
        if weights[2] > _MOST_UNIFORM:
            # The rest goes to the part without a temperature.
            weights = np.array([0.0, 1.0 - _MOST_UNIFORM, _MOST_UNIFORM])
            notes = ("the uniform distribution fits best: the logits carry no information about the labels",)
        self.beta = logits.new_tensor(beta, dtype=torch.float64)
        self.weights = torch.from_numpy(weights).to(logits.device)
        return Optimum(
            converged=optimum.converged and gradient <= CONVERGED,
            passes=optimum.passes + steps,
            gradient_norm=max(optimum.gradient_norm, gradient),
            at_bound=optimum.at_bound,
            notes=notes,
        )

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Mix the three parts; see `Calibrator.transform`."""
        return mixed(logits, self.beta, self.weights)


def _squared(logits: Tensor, labels: Tensor, beta: float, dtype: torch.dtype) -> Sloped:
    """Mean squared distance to the one-hot labels and its derivative by beta."""
    # With s the logits less their mean under q, half the slope of a row's squares is sum_k (q_k - y_k) q_k s_k.
    value = slope = 0.0
    step = max(1, _BLOCK // logits.shape[1])
    for some, own in zip(torch.split(logits, step), torch.split(labels, step), strict=True):
        wide = some.to(torch.promote_types(some.dtype, dtype))
        shifted = (wide - wide.amax(dim=-1, keepdim=True)).to(dtype)
        q = torch.softmax(beta * shifted, dim=-1)
        centred = shifted.sub_((q * shifted).sum(dim=-1, keepdim=True))
        own_q, own_centred = (part.gather(-1, own.unsqueeze(-1)).squeeze(-1) for part in (q, centred))
        squares = q.square()
        value += float((squares.sum(dim=-1) - 2.0 * own_q + 1.0).sum(dtype=torch.float64))
        slope += 2.0 * float(((squares * centred).sum(dim=-1) - own_q * own_centred).sum(dtype=torch.float64))
    return Sloped(value / logits.numel(), slope / logits.numel())


def _products(logits: Tensor, labels: Tensor, beta: float) -> tuple[Array, Array]:
    """Means over rows and classes of the products of the parts, ``(3, 3)``, and of parts and one-hot labels."""
    gram, inner = np.zeros((3, 3)), np.zeros(3)
    step = max(1, _BLOCK // logits.shape[1])
    for some, own in zip(torch.split(logits, step), torch.split(labels, step), strict=True):
        parts = _parts(some, beta)
        gram += torch.einsum("ank,bnk->ab", parts, parts).cpu().numpy()
        inner += parts.gather(-1, own[None, :, None].expand(3, -1, 1)).sum(dim=(1, 2)).cpu().numpy()
    return gram / logits.numel(), inner / logits.numel()


def _parts(logits: Tensor, beta: float) -> Tensor:
    """The three distributions that are mixed, ``(3, N, K)`` float64."""
    wide = logits.double()
    shifted = wide - wide.amax(dim=-1, keepdim=True)
    uniform = torch.full_like(wide, 1.0 / wide.shape[1])
    return torch.stack([torch.softmax(beta * shifted, dim=-1), torch.softmax(shifted, dim=-1), uniform])


def _quadratic(gram: Array, inner: Array) -> Callable[[Array], Model]:
    """The squared distance as a function of the weights."""

    def at(w: Array) -> Model:
        return float(w @ gram @ w - 2.0 * inner @ w), 2.0 * (gram @ w - inner), 2.0 * gram

    return at


def _log_likelihood(logits: Tensor, labels: Tensor, beta: float) -> Callable[[Array], Model]:
    """The negative log-likelihood as a function of the weights."""
    nll = torch.stack([tempered_rows(logits, labels, b)[0] for b in (beta, 1.0)])
    uniform = torch.full_like(nll[:1], 1.0 / logits.shape[1])
    own = torch.cat([torch.exp(-nll), uniform]).cpu().numpy()

    def at(w: Array) -> Model:
        q = w @ own
        if not q.min() > 0.0:
            return math.inf, np.zeros(3), np.zeros((3, 3))
        ratio = own / q
        return -float(np.log(q).mean()), -ratio.mean(axis=1), ratio @ ratio.T / own.shape[1]

    return at


def _best_weights(objective: Callable[[Array], Model]) -> tuple[Array, float, int]:
    """Minimise a convex loss on the simplex by Newton steps; return weights, gradient residual and evaluations."""
    w = np.full(3, 1.0 / 3.0)
    value, gradient, hessian = objective(w)
    passes = 1
    for _ in range(_MOST_STEPS):
        step = _least_on_simplex(gradient - hessian @ w, hessian) - w
        gain, length = float(gradient @ step), 1.0
        if gain > -1e-16:
            break
        following = objective(w + step)
        passes += 1
        while not following[0] <= value + 1e-4 * length * gain and length > 1e-10:
            length *= 0.5
            following = objective(w + length * step)
            passes += 1
        if not following[0] <= value:
            break
        w, (value, gradient, hessian) = w + length * step, following
    w = np.maximum(w, 0.0) / np.maximum(w, 0.0).sum()
    price = gradient - w @ gradient
    return w, float(np.where(w > 0.0, np.abs(price), np.maximum(-price, 0.0)).max()), passes


def _least_on_simplex(linear: Array, hessian: Array) -> Array:
    """Minimise a convex quadratic function on the simplex."""
    # The optimum solves the linear equations on one of the seven faces.
    best, point = math.inf, np.zeros(3)
    for size in (1, 2, 3):
        for face in map(list, combinations(range(3), size)):
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = hessian[np.ix_(face, face)], 0.0
            w = np.zeros(3)
            w[face] = np.linalg.lstsq(system, np.append(-linear[face], 1.0), rcond=None)[0][:size]
            value = float(linear @ w + 0.5 * w @ hessian @ w)
            if w.min() >= 0.0 and abs(w.sum() - 1.0) < 1e-9 and value < best:
                best, point = value, w
    return point
