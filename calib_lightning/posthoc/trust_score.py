"""TrustScore (Jiang et al., 2018): how much nearer a row is to the class that is predicted than to the others."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.posthoc.state import FittedState
from calib_lightning.utils.described import Described

_SMALLEST = 1e-12
_BLOCK = 2**22


class TrustScore(FittedState, Described):
    """Distance to the nearest class that is not predicted over the distance to the predicted one (Jiang et al., 2018).

    ``log (d_other + 1e-12) - log (d_predicted + 1e-12)``, where the distance to a class is the Euclidean one to the
    nearest of its training rows. It ranks predictions and is no probability: `calib_lightning.metrics.functional.auroc`
    takes it as it is, ``auroc(score, predicted == labels)``, and functions that take a confidence take
    ``score.double().sigmoid()``, which is ``d_other / (d_other + d_predicted)`` and has the same order, such as
    ``correctness_auroc(logits, labels, confidence=score.double().sigmoid())``.

    Before that, rows in thin regions can be left out: in each class the ``alpha`` share with the largest distance to
    its k-th nearest row of the class (the row itself counts as the first).

    Args:
        neighbours: k of that distance, at least 1; it matters for ``alpha > 0`` only.
        alpha: Share of each class that is left out, in ``[0, 1)``.

    Attributes:
        reference: Training rows ``(M, d)`` that were kept, in the order of classes.
        classes: Their labels ``(M,)``.

    Raises:
        ValueError: An argument out of range.

    Deviations:
        The code of the authors takes the second nearest row for every query, which is meant for training rows that
        would find themselves; give held-out rows here. It finds the nearest other class by comparing distances, so a
        class at the same distance is lost; here the predicted class is masked. The logarithm keeps the order and is
        symmetric. All distances are computed, in blocks, without trees, which do not help in many dimensions.

    Example:
        >>> train, labels = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1])
        >>> trust = TrustScore().fit(train, labels)
        >>> trust.score(torch.tensor([[2.0]]), torch.tensor([0])).exp()  # 2 to class 1, 1 to class 0
        tensor([2.])
    """

    reference: Tensor
    classes: Tensor

    def __init__(self, neighbours: int = 10, alpha: float = 0.0) -> None:
        super().__init__()
        if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
            raise ValueError(f"neighbours={neighbours!r}: it must be a whole number from 1 on; 10 is customary")
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha={alpha!r}: it must be in [0, 1); 0 leaves out nothing")
        self.neighbours, self.alpha = neighbours, alpha
        self.register_state("reference", "classes")

    @property
    def fitted(self) -> bool:
        """Whether it can be used."""
        return self.reference.numel() > 0

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor) -> Self:
        """Keep the training rows.

        Args:
            features: ``(M, d)``, floating point, finite; half precision is widened.
            labels: Class labels ``(M,)``, integer, at least 0.

        Returns:
            Itself.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, a value that is not finite, a negative label, or no rows.
        """
        features = _checked(features, labels, "labels", "TrustScore.fit")
        if len(labels) == 0:
            raise ValueError("TrustScore.fit: no rows were given; give the features and labels of training rows")
        order = torch.argsort(labels, stable=True)
        reference, classes = features[order], labels[order].long()
        if self.alpha > 0.0:
            _, counts = torch.unique_consecutive(classes, return_counts=True)
            kept = torch.cat([self._dense(own - own.mean(dim=0)) for own in torch.split(reference, counts.tolist())])
            reference, classes = reference[kept], classes[kept]
        self.reference, self.classes = reference, classes
        return self

    @torch.no_grad()
    def score(self, features: Tensor, predicted: Tensor) -> Tensor:
        """Score predictions; higher is to be trusted more.

        Args:
            features: ``(N, d)``, floating point, finite; of rows that were not fitted to.
            predicted: Predicted class ``(N,)``, integer.

        Returns:
            ``(N,)``, float32 or float64; -inf where the predicted class has no training rows, inf where no other has.

        Raises:
            RuntimeError: It was not fitted.
            TypeError: A wrong dtype.
            ValueError: A wrong shape, another d, or a value that is not finite.
        """
        if not self.fitted:
            raise RuntimeError("TrustScore is not fitted: call fit(features, labels) or load a fitted one.")
        features = _checked(features, predicted, "predicted", "TrustScore.score")
        if features.shape[1] != self.reference.shape[1]:
            raise ValueError(
                f"TrustScore was fitted to {self.reference.shape[1]} features, got {features.shape[1]}: shape "
                f"{tuple(features.shape)}"
            )
        reference = self.reference.to(features.dtype)
        centre = reference.mean(dim=0)
        names, counts = torch.unique_consecutive(self.classes, return_counts=True)
        parts = torch.split(reference, counts.tolist())
        scores = []
        for rows, own in zip(_blocks(features, len(reference)), _blocks(predicted, len(reference)), strict=True):
            distance = torch.stack([_to_nearest(rows, part, centre) for part in parts], dim=1)
            is_own = own.unsqueeze(1) == names
            nearest_own = distance.masked_fill(~is_own, torch.inf).amin(dim=1)
            nearest_other = distance.masked_fill(is_own, torch.inf).amin(dim=1)
            scores.append(torch.log(nearest_other + _SMALLEST) - torch.log(nearest_own + _SMALLEST))
        return torch.cat(scores)

    def _dense(self, rows: Tensor) -> Tensor:
        """Which rows ``(n,)`` of a class are not in its thin regions."""
        nearest = min(self.neighbours, len(rows))
        radii = [torch.cdist(block, rows).kthvalue(nearest, dim=1).values for block in _blocks(rows, len(rows))]
        radius = torch.cat(radii)
        return radius <= torch.quantile(radius, 1.0 - self.alpha)


def _to_nearest(rows: Tensor, part: Tensor, centre: Tensor) -> Tensor:
    # The quick distances are differences of squares, wrong by some 1e-4 of the norm in float32, the more so with a
    # common offset: they tell which row is nearest, and the distance to that one is computed anew.
    nearest = torch.cdist(rows - centre, part - centre).argmin(dim=1)
    distance: Tensor = torch.linalg.vector_norm(rows - part[nearest], dim=1)
    return distance


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    return torch.split(rows, max(1, _BLOCK // columns))


def _checked(features: Tensor, index: Tensor, name: str, where: str) -> Tensor:
    if features.ndim != 2 or not features.is_floating_point():
        raise TypeError(
            f"{where}: features must be floating point of shape (N, d), got {features.dtype} of shape "
            f"{tuple(features.shape)}"
        )
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must be class numbers of an integer dtype, got {index.dtype}")
    if index.shape != features.shape[:1]:
        raise ValueError(f"{where}: {name} must have shape ({len(features)},), got {tuple(index.shape)}")
    bad = ~features.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{where}: row {int(bad.int().argmax())} of the features is not finite")
    if len(index) and int(index.min()) < 0:
        raise ValueError(f"{where}: {name} must be at least 0, got {int(index.min())} in row {int(index.argmin())}")
    return at_least_float32(features.detach())
