"""Predictions of made-up networks with a known number of errors."""

import numpy as np
import scipy.special

LABELS = np.arange(400) % 4


def network(wrong, margin=3.0, seed=0, labels=LABELS, classes=4):
    """Logits ``(N, K)`` that are wrong on ``wrong`` random rows, with confidences around one margin."""
    random = np.random.default_rng(seed)
    predicted = labels.copy()
    rows = random.permutation(len(labels))[:wrong]
    predicted[rows] = (labels[rows] + random.integers(1, classes, wrong)) % classes
    logits = random.normal(0.0, 0.3, (len(labels), classes))
    logits[np.arange(len(labels)), predicted] += margin
    return logits


def networks(wrong, margin=3.0, seed=0, labels=LABELS):
    """A pair (logits, labels) for each number of errors, by seed."""
    return {place: (network(one, margin, seed + place, labels), labels) for place, one in enumerate(wrong)}


def accuracies(pairs):
    """Share of right rows of each pair."""
    return [float((logits.argmax(1) == labels).mean()) for logits, labels in pairs.values()]


def losses(pairs):
    """Mean negative log-likelihood of each pair, by scipy."""
    logs = [scipy.special.log_softmax(logits, axis=1)[np.arange(len(y)), y] for logits, y in pairs.values()]
    return [float(-one.mean()) for one in logs]


def gaps(pairs):
    """Mean confidence minus accuracy of each pair."""
    confidence = [scipy.special.softmax(logits, axis=1).max(1).mean() for logits, _ in pairs.values()]
    return [float(one - right) for one, right in zip(confidence, accuracies(pairs), strict=True)]
