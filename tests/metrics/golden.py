"""Inputs without random numbers, and float64 numpy references written from the definitions."""

import numpy as np
import torch
from torch import Tensor

KEYS = ("accuracy", "nll", "brier", "ece", "signed_gap", "correctness_auroc")

GOLDEN = {
    "accuracy": 0.764,
    "nll": 0.670436471058,
    "brier": 0.352934082499,
    "ece": 0.054325825305,
    "signed_gap": -0.039006782131,
    "correctness_auroc": 0.755213417340,
}
GOLDEN_COUNTS = [0, 0, 0, 2, 6, 16, 40, 40, 48, 40, 48, 49, 47, 63, 101]

EDGE_CONFIDENCE = [0.0, 0.2, 0.2, 0.35, 0.4, 0.55, 0.6, 0.6, 0.75, 0.8, 1.0, 1.0]
EDGE_CORRECT = [0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1]


def golden_set() -> tuple[Tensor, Tensor]:
    """500 float64 rows of 5 logits that are over-confident in places and under-confident in others."""
    i = np.arange(500.0)[:, None]
    k = np.arange(5.0)[None, :]
    z = 1.6 * np.sin(0.37 * i + 2.1 * k + 0.011 * i * k) + 1.6 * np.cos(1.7 * i * (k + 1))
    z += 0.9 * np.sin(0.05 * i) * np.cos(k**2 + 0.3 * i)
    labels = (z + 0.9 * np.sin(3.1 * i + 1.3 * k**2 + 0.5) * (1 + np.cos(0.21 * i))).argmax(axis=1)
    return torch.from_numpy(1.6 * z), torch.from_numpy(labels)


def random_set(n: int, classes: int, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float64 logits whose prediction is right in some six of ten rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    other = torch.randint(classes, (n,), generator=generator)
    labels = torch.where(torch.rand(n, generator=generator) < 0.6, logits.argmax(dim=1), other)
    return logits, labels


def reference(logits: Tensor, labels: Tensor, n_bins: int = 15) -> dict[str, float]:
    """All metrics by plain loops and sums in float64."""
    z = logits.double().numpy()
    y = labels.numpy()
    n, classes = z.shape
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    top = z.argmax(axis=1)
    correct = top == y
    confidence = p[np.arange(n), top]
    error = 0.0
    for m in range(n_bins):
        inside = (confidence > m / n_bins) & (confidence <= (m + 1) / n_bins)
        error += abs(correct[inside].sum() - confidence[inside].sum()) / n
    rest = np.where(np.arange(classes) == top[:, None], -np.inf, z)
    second = rest.max(axis=1)
    margin = z.max(axis=1) - second - np.log(np.exp(rest - second[:, None]).sum(axis=1))
    return {
        "accuracy": correct.mean(),
        "nll": (
            np.log(np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1)) + z.max(axis=1) - z[np.arange(n), y]
        ).mean(),
        "brier": ((p - np.eye(classes)[y]) ** 2).sum(axis=1).mean(),
        "ece": error,
        "signed_gap": confidence.mean() - correct.mean(),
        "correctness_auroc": pair_auroc(margin, correct),
    }


def pair_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, a tie counting one half."""
    above, below = scores[positive], scores[~positive]
    if not len(above) or not len(below):
        return np.nan
    ordered = np.sort(below)
    wins = np.searchsorted(ordered, above, side="left") + np.searchsorted(ordered, above, side="right")
    return wins.sum() / (2.0 * len(above) * len(below))
