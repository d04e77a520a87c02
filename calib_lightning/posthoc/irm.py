"""Isotonic regression for several classes, IRM (Zhang, Kailkhura and Han, 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.functional import one_hot
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.binary import interpolate
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.isotonic import isotonic_knots

_TILT = 1e-9


class IRM(Calibrator):
    """One isotonic map, fitted to all ``N * K`` pairs of a probability and whether its class is the label (IRM).

    ``q_k = (f(p_k) + 1e-9 p_k) / sum_j (f(p_j) + 1e-9 p_j)`` (Zhang et al., 2020) with one non-decreasing f for all
    classes, linear between the ends of its steps. The numerator increases strictly with p, so the predicted class stays
    the same; it is kept a few units in the last place above the others, because the second term is lost in float32. The
    fit sorts all pairs in memory, about 50 bytes each.

    Deviations: f is kept above 1e-9, so that no label has probability 0.

    Example:
        >>> logits, labels = torch.randn(60, 3), torch.arange(60) % 3
        >>> IRM().fit(logits, labels)(logits).argmax(dim=1).equal(logits.argmax(dim=1))
        True
    """

    preserves_argmax = True

    knots: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("knots", "values")

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Pool adjacent violators among all pairs; see `Calibrator.fit_rows`."""
        own = one_hot(labels, logits.shape[1], torch.bool)
        knots, values = isotonic_knots(logits.double().softmax(dim=1).flatten(), own.flatten())
        self.knots, self.values = knots, values.clamp_min(_TILT)
        return Optimum()

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Map every probability and divide by the sum; see `Calibrator.transform`."""
        probs = logits.double().softmax(dim=-1)
        scores = torch.log(interpolate(probs, self.knots, self.values) + _TILT * probs)
        is_top = torch.arange(logits.shape[-1], device=logits.device) == logits.argmax(dim=-1, keepdim=True)
        ahead = 32.0 * torch.finfo(logits.dtype).eps
        return torch.log_softmax(torch.where(is_top, scores + ahead, scores), dim=-1).to(logits.dtype)
