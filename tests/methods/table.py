"""One row for every training-time method: what the shared tests need to know about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from calib_lightning import methods
from calib_lightning.core import ClassificationModule


@dataclass(frozen=True)
class Row:
    module: type[ClassificationModule]
    criterion: nn.Module
    """The criterion with the settings that `reference` has."""
    reference: Callable[[np.ndarray, np.ndarray], float]
    """The equation in float64 numpy, from logits (N, K) and one-hot or soft targets (N, K), written from the paper."""
    file: str
    options: dict[str, Any] = field(default_factory=dict)


def _softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _cross_entropy(z, t):
    return -np.mean(np.sum(t * np.log(_softmax(z)), axis=1))


def _label_smoothing(z, t):
    smoothed = 0.9 * t + 0.1 / z.shape[1]
    return -np.mean(np.sum(smoothed * np.log(_softmax(z)), axis=1))


def _entropy_regularization(z, t):
    p = _softmax(z)
    entropy = -np.sum(p * np.log(p), axis=1)
    return _cross_entropy(z, t) - 0.3 * np.mean(entropy)


def _brier(z, t):
    return np.mean(np.sum((_softmax(z) - t) ** 2, axis=1))


def _focal(z, t):
    p = _softmax(z)
    return -np.mean(np.sum(t * (1 - p) ** 3 * np.log(p), axis=1))


ROWS = [
    Row(methods.CrossEntropy, methods.CrossEntropyLoss(), _cross_entropy, "cross_entropy"),
    Row(
        methods.LabelSmoothing,
        methods.LabelSmoothingLoss(0.1),
        _label_smoothing,
        "label_smoothing",
        {"smoothing": 0.1},
    ),
    Row(
        methods.EntropyRegularization,
        methods.EntropyRegularizationLoss(0.3),
        _entropy_regularization,
        "entropy_regularization",
        {"strength": 0.3},
    ),
    Row(methods.Brier, methods.BrierLoss(), _brier, "brier"),
    Row(methods.Focal, methods.FocalLoss(3.0), _focal, "focal", {"gamma": 3.0}),
]
