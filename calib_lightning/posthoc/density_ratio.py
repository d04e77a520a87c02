"""Calibration by densities of correct and wrong predictions over confidence and proximity (Xiong et al., 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.evidence import check_width
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.top_label import top_log_odds, with_top_confidence
from calib_lightning.types import Prediction

FEWEST = 5
"""Fewest correct, and fewest wrong, predictions for an estimate of their density."""

FLOOR = 1e-10
"""Density below which the confidence stays as it is."""

_LEAST_SPREAD = 1e-3
_BLOCK = 2**22


def proximity(features: Tensor, reference: Tensor, neighbours: int, power: float, *, own: Tensor | None) -> Tensor:
    """``D(x) = mean_k exp(-d_k^power)`` over the nearest neighbours, ``(N,)`` in ``[0, 1]``.

    Rows of both sets have length one. Rows at the positions ``own`` of the reference are not their own neighbours.
    """
    cosine = features @ reference.T
    if own is not None:
        cosine.scatter_(1, own.unsqueeze(1), -torch.inf)
    nearest = cosine.topk(neighbours, dim=1).values
    squared = (2.0 - 2.0 * nearest).clamp_min(0.0)
    return torch.exp(-squared.pow(0.5 * power)).mean(dim=1)


def log_density(points: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
    """Logarithm of a kernel density estimate at ``points``, with a product of Gaussian kernels of the given widths."""
    exponent = torch.zeros(points.shape[0], centres.shape[0], dtype=points.dtype, device=points.device)
    # Column by column, since a tensor of all differences would be larger.
    for column in range(points.shape[1]):
        gap = (points[:, column : column + 1] - centres[:, column]) / widths[column]
        exponent = exponent - 0.5 * gap * gap
    scale = math.log(centres.shape[0]) + 0.5 * points.shape[1] * math.log(2.0 * math.pi)
    return torch.logsumexp(exponent, dim=1) - torch.log(widths).sum() - scale


def reference_widths(points: Tensor) -> Tensor:
    """Normal-reference bandwidths ``1.06 std_j m^(-1 / (4 + c))`` of points ``(m, c)``, ``std_j`` at least 1e-3."""
    rows, columns = points.shape
    shrinking: float = rows ** (-1.0 / (4 + columns))
    return points.std(dim=0, correction=0).clamp_min(_LEAST_SPREAD) * (1.06 * shrinking)


class DensityRatio(Calibrator):
    """Proximity-informed calibration by density ratios (Xiong et al., NeurIPS 2023).

    ``c' = f1 / (f1 + f0 n0 / n1)``, where f1 and f0 are the densities of (c, D) over the correct and the wrong
    calibration rows, and n1 and n0 their numbers. c is the confidence and D the proximity of a row to the calibration
    rows: the mean of ``exp(-d^power)`` over its nearest neighbours there, with features scaled to length one. The
    densities are Gaussian kernel estimates with bandwidths ``1.06 std n^(-1/6)``. The other classes share ``1 - c'`` in
    their old proportions, and the predicted class is kept as in `with_top_confidence`. It is usually applied after a
    temperature.

    It stores the features of all calibration rows, and the cost per row is proportional to their number.

    Args:
        neighbours: Number of neighbours, at least 1.
        distance_power: Exponent of the Euclidean distance; 2 as in the authors' code, 1 as in the paper.

    Raises:
        ValueError: An argument out of range.

    Deviations:
        Where both densities fall below 1e-10, that code returns a confidence of 0. Here ``1e-10 c`` is added to f1 and
        ``1e-10 (1 - c)`` to the other term, so that far from all calibration rows the confidence stays c. With fewer
        than 5 correct or wrong calibration rows nothing changes, and the report says so.

    Example:
        >>> logits, labels, features = torch.randn(60, 3), torch.arange(60) % 3, torch.randn(60, 8)
        >>> DensityRatio().fit(logits, labels, features).predict(logits, features).confidence.shape
        torch.Size([60])
    """

    preserves_argmax = True
    full_distribution = False
    needs = ("logits", "features")

    reference: Tensor
    right: Tensor
    wrong: Tensor

    def __init__(self, neighbours: int = 10, distance_power: float = 2.0) -> None:
        super().__init__()
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise ValueError(f"neighbours is {neighbours!r}; it must be an integer >= 1. 10 is the usual value.")
        if not 0.0 < distance_power < math.inf:
            raise ValueError(f"distance_power is {distance_power!r}; it must be finite and > 0. 2 is the usual value.")
        self.neighbours, self.distance_power = neighbours, distance_power
        self.register_state("reference", "right", "wrong")

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Store the points of correct and wrong rows; see `Calibrator.fit_rows`."""
        assert features is not None
        correct = logits.argmax(dim=1) == labels
        rows, right = len(labels), int(correct.sum())
        if min(right, rows - right) < FEWEST:
            self.reference = features[:0]
            self.right = self.wrong = torch.zeros(0, 2, dtype=torch.float64, device=logits.device)
            note = (
                f"{right} correct and {rows - right} wrong predictions are too few for densities (at least {FEWEST} of "
                "each): the confidence is not changed"
            )
            return Optimum(notes=(note,))
        reference = F.normalize(features, dim=1)
        neighbours = min(self.neighbours, rows - 1)
        near = [
            proximity(reference[own], reference, neighbours, self.distance_power, own=own)
            for own in torch.split(torch.arange(rows, device=logits.device), _step(rows))
        ]
        points = torch.stack([_confidence(logits), torch.cat(near).double()], dim=1)
        self.reference, self.right, self.wrong = reference, points[correct], points[~correct]
        return Optimum()

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Give the predicted class the ratio; see `Calibrator.transform`."""
        return self.with_confidence(logits, features).logits

    def with_confidence(self, logits: Tensor, features: Tensor | None) -> Prediction:
        """Return the confidence c', ``(N,)`` float64; it may be below ``1 / K``. See `Calibrator.with_confidence`."""
        return self._predicted(logits, features, None)

    def of_fitted_rows(self, logits: Tensor, features: Tensor | None, place: Tensor) -> Prediction:
        """Exclude each row from its own neighbours; see `Calibrator.of_fitted_rows`."""
        return self._predicted(logits, features, place)

    def _predicted(self, logits: Tensor, features: Tensor | None, own: Tensor | None) -> Prediction:
        log_odds = self._log_odds(logits, features, own)
        return Prediction(with_top_confidence(logits, log_odds), torch.sigmoid(log_odds))

    def _log_odds(self, logits: Tensor, features: Tensor | None, own: Tensor | None) -> Tensor:
        assert features is not None
        check_width(features, self.reference.shape[1], "DensityRatio")
        if self.reference.shape[0] == 0:
            return top_log_odds(logits.double())
        if torch.compiler.is_compiling():  # an exported graph takes all its rows at once
            return self._block_log_odds(logits, features, own)
        blocks = torch.split(torch.arange(len(logits), device=logits.device), _step(len(self.reference)))
        parts = [self._block_log_odds(logits[i], features[i], None if own is None else own[i]) for i in blocks]
        return torch.cat(parts)

    def _block_log_odds(self, logits: Tensor, features: Tensor, own: Tensor | None) -> Tensor:
        odds = top_log_odds(logits.double())
        reference = self.reference.to(features.dtype)
        neighbours = min(self.neighbours, reference.shape[0] - (own is not None))
        near = proximity(F.normalize(features, dim=1), reference, neighbours, self.distance_power, own=own)
        points = torch.stack([torch.sigmoid(odds), near.double()], dim=1)
        right = log_density(points, self.right, reference_widths(self.right))
        wrong = log_density(points, self.wrong, reference_widths(self.wrong))
        wrong = wrong + math.log(self.wrong.shape[0] / self.right.shape[0])
        floor = math.log(FLOOR)
        return torch.logaddexp(right, floor + F.logsigmoid(odds)) - torch.logaddexp(wrong, floor + F.logsigmoid(-odds))


def _confidence(logits: Tensor) -> Tensor:
    step = max(1, _BLOCK // logits.shape[1])
    return torch.sigmoid(torch.cat([top_log_odds(block.double()) for block in torch.split(logits, step)]))


def _step(columns: int) -> int:
    return max(1, _BLOCK // columns)
