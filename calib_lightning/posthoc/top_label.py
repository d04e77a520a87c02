"""Assigning a new confidence to the predicted class, and the rest to the other classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import log_sigmoid

_MARGIN = 1e-3
"""Relative distance of c' to the largest other probability: enough for the arithmetic of an exported model."""


def top_log_odds(logits: Tensor) -> Tensor:
    """Log-odds ``(N,)`` of the confidence, ``log c / (1 - c) = z_top - logsumexp(z without top)``; no saturation."""
    top, index = logits.max(dim=-1)
    others = logits.masked_fill(_is_class(index, logits.shape[-1]), -torch.inf)
    second = others.amax(dim=-1)
    # The difference of two large logits is exact; that of their logsumexp is not.
    return (top - second) - torch.logsumexp(others - second.unsqueeze(-1), dim=-1)


def with_top_confidence(logits: Tensor, log_odds: Tensor) -> Tensor:
    """Distribution with a new confidence ``c'`` in the predicted class, the others keeping their proportions.

    ``q_top = c'`` and ``q_k = (1 - c') r_k`` with ``r_k = p_k / (1 - c)``, computed as a softmax over the other logits
    so that it is valid where c rounds to 1. The predicted class, the first of the largest logits, stays the same: c' is
    at least just above ``1 / K``, and if the largest of the others would reach c', they are mixed with their mean,
    ``(1 - a) r_k + a / (K - 1)``, with the smallest a that keeps it just below c'. The order of all classes is kept.
    """
    classes, margin = logits.shape[-1], _MARGIN
    least = math.log1p(margin) - math.log(classes - 1 - margin)
    odds = log_odds.to(logits.dtype).clamp_min(least).unsqueeze(-1)
    is_top = _is_class(logits.argmax(dim=-1), classes)
    share = torch.log_softmax(logits.masked_fill(is_top, -torch.inf), dim=-1)
    largest = share.amax(dim=-1, keepdim=True).exp()
    # The largest share that stays below c'. For odds above e any does, and exp cannot overflow.
    allowed = odds.clamp_max(1.0).exp() * (1.0 - margin)
    mean = 1.0 / (classes - 1)
    # 1 - a instead of a, which can round to 1. If the lower bound of the denominator applies, the others are equal and
    # need no mixing.
    kept = (allowed - mean).clamp_min(0.0) / (largest - mean).clamp_min(torch.finfo(logits.dtype).tiny)
    share = torch.where(kept < 1.0, torch.log(kept * share.exp() + (1.0 - kept) * mean), share)
    return torch.where(is_top, log_sigmoid(odds), log_sigmoid(-odds) + share)


def _is_class(index: Tensor, classes: int) -> Tensor:
    """Mask ``(N, K)`` of one class per row."""
    return torch.arange(classes, device=index.device) == index.unsqueeze(-1)
