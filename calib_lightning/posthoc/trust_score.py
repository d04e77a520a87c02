"""TrustScore (Jiang et al., 2018): how much closer a row is to the predicted class than to the others."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.evidence import check_features, check_width
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.types import Prediction

_SMALLEST = 1e-12
_BLOCK = 2**22


class TrustScore(Calibrator):
    """Ratio of the distances to the nearest other class and to the predicted class (Jiang et al., 2018).

    ``s = log (d_other + 1e-12) - log (d_predicted + 1e-12)``, where the distance to a class is the Euclidean distance
    to its nearest row. The score ranks predictions but is not a probability: `predict` leaves the probabilities as they
    are and returns the confidence ``sigmoid(s) = d_other / (d_other + d_predicted)``, which has the order of s. It can
    improve the correctness AUROC, but calibration errors of this confidence mean little.

    Rows in sparse regions can be left out first: in each class the fraction ``alpha`` with the largest distance to
    their k-th nearest row of the class (the row itself counts as the first).

    Args:
        neighbours: k of that distance, at least 1; has no effect if ``alpha`` is 0.
        alpha: Fraction of each class that is left out, in ``[0, 1)``.

    Attributes:
        reference: Rows ``(M, d)`` that were kept, sorted by class.
        classes: Their labels ``(M,)``.
        places: Their positions ``(M,)`` among the rows of the fit.

    Raises:
        ValueError: An argument out of range.

    Deviations:
        The paper fits it to the training rows; here it is fitted, like every calibrator, to the rows that are passed,
        which `calib calibrate` takes from the calibration split. The authors' code uses the second nearest row for
        every query, because training rows would find themselves; here only rows of the fit leave themselves out. That
        code finds the nearest other class by comparing distances and so misses a class at the same distance; here the
        predicted class is masked. The logarithm keeps the order and is symmetric. All distances are computed, in
        blocks, without trees, which do not help in many dimensions.

    Example:
        >>> features, labels = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1])
        >>> trust = TrustScore().fit(3 * torch.eye(2)[labels], labels, features)
        >>> round(trust.score(torch.tensor([[2.0]]), torch.tensor([0])).exp().item(), 6)  # 2 to class 1, 1 to class 0
        2.0
    """

    needs = ("logits", "features")
    preserves_argmax = True
    full_distribution = False

    reference: Tensor
    classes: Tensor
    places: Tensor

    def __init__(self, neighbours: int = 10, alpha: float = 0.0) -> None:
        super().__init__()
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise ValueError(f"neighbours is {neighbours!r}; it must be an integer >= 1. 10 is the usual value.")
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha is {alpha!r}; it must be in [0, 1). 0 keeps all rows.")
        self.neighbours, self.alpha = neighbours, alpha
        self.register_state("reference", "classes", "places")

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Store the rows; see `Calibrator.fit_rows`."""
        assert features is not None
        places = torch.argsort(labels, stable=True)
        reference, classes = features[places], labels[places]
        if self.alpha > 0.0:
            _, counts = torch.unique_consecutive(classes, return_counts=True)
            kept = torch.cat([self._dense(own - own.mean(dim=0)) for own in torch.split(reference, counts.tolist())])
            reference, classes, places = reference[kept], classes[kept], places[kept]
        self.reference, self.classes, self.places = reference, classes, places
        return Optimum()

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Leave the probabilities as they are; see `Calibrator.transform`."""
        return torch.log_softmax(logits, dim=-1)

    def with_confidence(self, logits: Tensor, features: Tensor | None) -> Prediction:
        """Return the confidence ``sigmoid(s)``, ``(N,)`` float64; see `Calibrator.with_confidence`."""
        return self._predicted(logits, features, None)

    def of_fitted_rows(self, logits: Tensor, features: Tensor | None, place: Tensor) -> Prediction:
        """Exclude each row from its own neighbours; see `Calibrator.of_fitted_rows`."""
        return self._predicted(logits, features, place)

    @torch.no_grad()
    def score(self, features: Tensor, predicted: Tensor) -> Tensor:
        """Score predictions; those with a higher score are more trustworthy.

        Args:
            features: ``(N, d)``, floating point, finite; of rows that are not among those of the fit.
            predicted: Predicted class ``(N,)``, integer.

        Returns:
            ``(N,)`` float64; -inf where the predicted class has no rows, inf where no other class has any.

        Raises:
            RuntimeError: It is not fitted.
            TypeError: A wrong dtype of ``predicted``.
            ValueError: A wrong shape, another d than in the fit, or features that are not floating point and finite.
        """
        self.check_fitted()
        if predicted.is_floating_point() or predicted.dtype == torch.bool:
            raise TypeError(f"TrustScore.score: predicted is {predicted.dtype}; it must be of an integer dtype.")
        if predicted.ndim != 1:
            raise ValueError(f"TrustScore.score: predicted has shape {tuple(predicted.shape)}; it must be (N,).")
        return self._scores(check_features(features, len(predicted), "TrustScore.score"), predicted, None)

    def _predicted(self, logits: Tensor, features: Tensor | None, own: Tensor | None) -> Prediction:
        assert features is not None
        scores = self._scores(features, logits.argmax(dim=-1), own)
        # A row of nan has no predicted class.
        scores = scores.masked_fill(logits.isnan().any(dim=-1), torch.nan)
        return Prediction(self.transform(logits, features), torch.sigmoid(scores))

    def _scores(self, features: Tensor, predicted: Tensor, own: Tensor | None) -> Tensor:
        check_width(features, self.reference.shape[1], "TrustScore")
        if torch.compiler.is_compiling():  # an exported graph takes all its rows at once
            return self._block_scores(features, predicted, own)
        blocks = torch.split(torch.arange(len(features), device=features.device), _step(len(self.reference)))
        parts = [self._block_scores(features[i], predicted[i], None if own is None else own[i]) for i in blocks]
        return torch.cat(parts)

    def _block_scores(self, features: Tensor, predicted: Tensor, own: Tensor | None) -> Tensor:
        rows, reference = features.double(), self.reference.double()
        centre = reference.mean(dim=0)  # a common offset would cost the fast distances digits
        distance = torch.cdist(rows - centre, reference - centre)
        if own is not None:
            distance = distance.masked_fill(self.places == own.unsqueeze(1), torch.inf)
        is_own = self.classes == predicted.unsqueeze(1)
        nearest_own = _to_nearest(rows, reference, distance.masked_fill(~is_own, torch.inf))
        nearest_other = _to_nearest(rows, reference, distance.masked_fill(is_own, torch.inf))
        scores = torch.log(nearest_other + _SMALLEST) - torch.log(nearest_own + _SMALLEST)
        # The only row of a fit has no other rows at all: inf - inf.
        return scores.masked_fill(nearest_own.isinf() & nearest_other.isinf(), 0.0)

    def _dense(self, rows: Tensor) -> Tensor:
        """Mask ``(n,)`` of the rows of a class that are not in its sparse regions."""
        nearest = min(self.neighbours, len(rows))
        blocks = torch.split(rows, _step(len(rows)))
        radius = torch.cat([torch.cdist(block, rows).kthvalue(nearest, dim=1).values for block in blocks])
        return radius <= torch.quantile(radius, 1.0 - self.alpha)


def _to_nearest(rows: Tensor, reference: Tensor, distance: Tensor) -> Tensor:
    """Exact distance ``(N,)`` to the nearest row that is not masked; that of `cdist` has lost digits."""
    least, nearest = distance.min(dim=1)
    exact = torch.linalg.vector_norm(rows - reference[nearest], dim=1)
    return torch.where(least.isinf(), least, exact)


def _step(columns: int) -> int:
    return max(1, _BLOCK // columns)
