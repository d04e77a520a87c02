"""What affine maps of logits share: the likelihood and its gradient, the ridge, and the curvature that speeds them up.

A full map is kept as one matrix ``M = [W, b]`` of shape ``(K, K + 1)``, a map of each class by itself as ``[w; b]`` of
shape ``(2, K)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.temperature import fit_inverse_temperature
from calib_lightning.posthoc.solver import LBFGS, Objective, Preconditioner, Solution, Solver

LOG_TINY = -87.33654475055310
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
