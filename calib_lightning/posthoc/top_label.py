"""Giving the predicted class a new confidence, and the other classes what is left."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import log_sigmoid

_MARGIN = 1e-3
"""How far, relatively, c' stays above the largest of the others: enough for the arithmetic of an exported model."""


def top_log_odds(logits: Tensor) -> Tensor:
    """Log-odds of the confidence, ``log c / (1 - c) = z_top - logsumexp(z without top)``; they do not saturate.

    Args:
        logits: ``(N, K)`` float32 or float64, finite; K >= 2.

    Returns:
        ``(N,)`` in the dtype of the logits.

    Example:
        >>> top_log_odds(torch.tensor([[100.0, 0.0]]))
        tensor([100.])
    """
    top, index = logits.max(dim=-1)
    others = logits.masked_fill(_is_class(index, logits.shape[-1]), -torch.inf)
    second = others.amax(dim=-1)
    # Near the maximum first: the difference of two large numbers is exact, that of their sums is not.
    return (top - second) - torch.logsumexp(others - second.unsqueeze(-1), dim=-1)


def with_top_confidence(logits: Tensor, log_odds: Tensor) -> Tensor:
    """Distribution with a new confidence ``c'`` in the predicted class, the others keeping their proportions.

    ``q_top = c'`` and ``q_k = (1 - c') r_k`` with ``r_k = p_k / (1 - c)``, computed as a softmax over the other logits,
    so that it holds where c is 1 in floating point. The predicted class, the first of the largest logits, stays it: c'
    is at least just above ``1 / K``, and where the largest of the others would reach c', the others are mixed with
    their mean, ``(1 - a) r_k + a / (K - 1)``, with the least a that puts it just below c'. The order of all classes is
    kept.

    Args:
        logits: ``(N, K)`` float32 or float64, finite; K >= 2.
        log_odds: New log-odds ``(N,)`` of the confidence, floating point; infinite ones mean 0 and 1.

    Returns:
        Log-probabilities ``(N, K)`` in the dtype of the logits; each row sums to one.

    Example:
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> with_top_confidence(logits, torch.tensor([0.8]).logit()).exp()
        tensor([[0.8000, 0.1200, 0.0800]])
    """
    classes, margin = logits.shape[-1], _MARGIN
    least = math.log1p(margin) - math.log(classes - 1 - margin)
    odds = log_odds.to(logits.dtype).clamp_min(least).unsqueeze(-1)
    is_top = _is_class(logits.argmax(dim=-1), classes)
    share = torch.log_softmax(logits.masked_fill(is_top, -torch.inf), dim=-1)
    largest = share.amax(dim=-1, keepdim=True).exp()
    # The largest share that keeps below c'; from odds of e on any does, and exp cannot overflow.
    allowed = odds.clamp_max(1.0).exp() * (1.0 - margin)
    mean = 1.0 / (classes - 1)
    # 1 - a, not a: where the other classes are one and c' is small, a rounds to 1. Where the bound acts the others are
    # equal, so that nothing has to be mixed.
    kept = (allowed - mean).clamp_min(0.0) / (largest - mean).clamp_min(torch.finfo(logits.dtype).tiny)
    share = torch.where(kept < 1.0, torch.log(kept * share.exp() + (1.0 - kept) * mean), share)
    return torch.where(is_top, log_sigmoid(odds), log_sigmoid(-odds) + share)


def _is_class(index: Tensor, classes: int) -> Tensor:
    return torch.arange(classes, device=index.device) == index.unsqueeze(-1)
