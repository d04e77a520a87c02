"""Label-distribution-aware margins with deferred re-weighting, LDAM-DRW (Cao et al., NeurIPS 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, Head, ModuleOptions
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.methods.class_balanced import checked_counts, counts_for, effective_number_weights
from calib_lightning.utils.described import Described


def ldam_margins(class_counts: Sequence[int], max_margin: float = 0.5) -> Tensor:
    """Class margins (Cao et al., 2019), ``m_k = C / n_k^{1/4}``; C scales the largest to ``max_margin``.

    Args:
        class_counts: ``n_k``, training samples per class, at least 1 each.
        max_margin: Margin of the rarest class.

    Returns:
        ``(K,)`` float64, in units of the cosine.

    Example:
        >>> ldam_margins([16, 1])
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    margins = checked_counts(class_counts) ** -0.25
    return margins * (max_margin / margins.max())


def ldam_loss(
    logits: Tensor, labels: Tensor, *, margins: Tensor, scale: float = 30.0, class_weights: Tensor | None = None
) -> Tensor:
    """LDAM loss (Cao et al., 2019): cross-entropy after lowering the true class's logit by its margin.

    ``L = -sum_n w_{y_n} log softmax(z_n - s m_{y_n} onehot(y_n))_{y_n} / sum_n w_{y_n}``.

    Args:
        logits: ``z``, ``(N, K)``: s times the cosines of a `CosineHead` in the paper.
        labels: ``(N,)`` int64.
        margins: ``m``, ``(K,)``, in units of the cosine.
        scale: ``s``.
        class_weights: ``w``, ``(K,)``; ``None`` weights all classes equally.

    Returns:
        Scalar, in nats.

    Example:
        >>> margins = torch.tensor([0.1, 0.2])
        >>> round(ldam_loss(torch.zeros(1, 2), torch.tensor([0]), margins=margins, scale=10.0).item(), 4)
        1.3133
    """
    logits, labels = checked_batch(logits, labels, soft=False)
    lowered = torch.zeros_like(logits).scatter(
        -1, labels.unsqueeze(-1), (scale * margins.to(logits.dtype))[labels].unsqueeze(-1)
    )
    weights = None if class_weights is None else class_weights.to(logits.dtype)
    return F.cross_entropy(logits - lowered, labels, weight=weights)


class LDAMLoss(Described, nn.Module):
    """Criterion of `ldam_loss`.

    Args:
        class_counts: Training samples per class, at least 1 each.
        max_margin: Margin of the rarest class, at least 0.
        scale: ``s``, above 0.
        beta: Parameter of the class weights, see `calib_lightning.methods.effective_number_weights`.

    Raises:
        ValueError: If a class has no sample or a setting is out of range.

    Attributes:
        reweighted: Whether class weights are active, initially False.
    """

    margins: Tensor
    class_weights: Tensor

    def __init__(
        self, class_counts: Sequence[int], max_margin: float = 0.5, scale: float = 30.0, beta: float = 0.9999
    ) -> None:
        super().__init__()
        if not 0 <= max_margin < float("inf"):
            raise ValueError(f"max_margin is {max_margin}; it must be at least 0 and finite. The paper uses 0.5.")
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale is {scale}; it must be above 0 and finite. The paper uses 30.")
        self.scale = scale
        self.reweighted = False
        # not saved: derived from the data
        self.register_buffer("margins", ldam_margins(class_counts, max_margin), persistent=False)
        self.register_buffer("class_weights", effective_number_weights(class_counts, beta), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``."""
        weights = self.class_weights if self.reweighted else None
        return ldam_loss(logits, labels, margins=self.margins, scale=self.scale, class_weights=weights)


class CosineHead(Head):
    """Scaled cosines between features and class weights, ``z_k = s h w_k / (|h| |w_k|)``.

    The class weights start in random directions, with length 1.

    Args:
        in_features: d, the number of features.
        num_classes: K.
        scale: ``s``.

    Example:
        >>> CosineHead(64, 10)(torch.ones(2, 64)).abs().max() <= 30
        tensor(True)
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        # of length 1: the gradient of a cosine falls with the length, so longer vectors would hardly turn
        self.weight = nn.Parameter(F.normalize(torch.empty(num_classes, in_features).uniform_(-1, 1), dim=-1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``."""
        # a cosine in half precision, times 30, would be off by a tenth
        with torch.autocast(features.device.type, enabled=False):
            direction = F.normalize(at_least_float32(features), dim=-1)
            return self.scale * F.linear(direction, F.normalize(self.weight, dim=-1).to(direction.dtype))


class LDAM(ClassificationModule):
    """Train with label-distribution-aware margins and deferred re-weighting, LDAM-DRW (Cao et al., NeurIPS 2019).

    Paper: Cao et al. 2019.
    Mechanism: larger margins and, later, larger weights for rare classes; cosine head.
    Extra cost: none.

    Args:
        num_classes: K; the command line takes it from the data.
        class_counts: Training samples per class; ``None`` counts those of the data.
        max_margin: Margin of the rarest class.
        scale: ``s``, factor of cosines and margins.
        beta: Parameter of the class weights.
        reweight_from: Fraction of the epochs after which class weights are used, in ``[0, 1]``; 160 of 200 epochs in
            the paper, 1 for never.
        **options: See `ClassificationModule`.

    Raises:
        ValueError: If a setting is out of range; at the start of a fit, if there are no class counts or the number of
            epochs is unknown.

    Deviations:
        The head returns scaled cosines in training and evaluation; the authors' network returns unscaled ones, whose
        softmax is almost uniform.

    Example:
        >>> LDAM(10, encoder="digits_cnn").hparams.reweight_from
        0.8
    """

    def __init__(
        self,
        num_classes: int,
        class_counts: Sequence[int] | None = None,
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float = 0.9999,
        reweight_from: float = 0.8,
        **options: Unpack[ModuleOptions],
    ) -> None:
        if not 0 <= reweight_from <= 1:
            raise ValueError(
                f"reweight_from is {reweight_from}; it must be in [0, 1]. The paper uses 0.8; 1 means never."
            )
        settings = max_margin, scale, beta
        # plain data: saved with the hyper-parameters
        class_counts = None if class_counts is None else checked_counts(class_counts).long().tolist()
        LDAMLoss(class_counts or [1] * num_classes, *settings)  # rejects bad values
        super().__init__(num_classes, **options)
        self._settings = settings
        self.head = CosineHead(self.encoder.num_features, num_classes, scale)
        self.class_counts, self.reweight_from = class_counts, reweight_from

    def begin_fit(self) -> None:
        """Build the criterion from the class counts."""
        if self.reweight_from < 1 and (self.trainer.max_epochs is None or self.trainer.max_epochs < 1):
            raise ValueError(
                f"max_epochs is {self.trainer.max_epochs}, but LDAM uses class weights after {self.reweight_from:g} of "
                "the epochs. Set max_epochs to a number, or reweight_from to 1."
            )
        self.criterion = LDAMLoss(counts_for(self, self.class_counts).long().tolist(), *self._settings)

    def begin_step(self, batch: Any) -> None:
        """Turn on class weights when due."""
        assert isinstance(self.criterion, LDAMLoss)
        epochs = self.first_stage_epochs or self.trainer.max_epochs or 0
        first = self.reweight_from * epochs - 1e-9  # 0.55 x 100 is slightly above 55
        late = self.reweight_from < 1 and self.current_epoch >= first
        self.criterion.reweighted = late
