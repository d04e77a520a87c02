"""The rows of one batch, and the few quantities that every metric is made of."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from calib_lightning.functional import at_least_float32
from calib_lightning.metrics.functional.checks import InputKind, check_kind, check_shapes, check_values


class Rows:
    """The rows of one batch; each derived quantity is computed once, on demand.

    With ``w`` the probabilities up to a factor and ``w_top`` that of the predicted class, the odds against it are
    ``q = sum_{k != top} w_k / w_top``, and all quantities follow without cancellation or saturation:
    ``c = 1 / (1 + q)``, ``log c / (1 - c) = -log q`` and ``-log p_y = log(1 + q) + z_top - z_y``. Matrices ``(N, K)``
    keep the dtype of the logits (at least float32); sums over a row are float64, so they do not depend on how the rows
    were cut into batches.

    On the CPU, where reading a value needs no sync, odds too small for a difference are summed separately for the rows
    that need it; elsewhere for all rows.

    Args:
        logits: Scores ``(N, K)`` that passed `check_shapes`: logits, or probabilities with ``input="probs"``.
        labels: Class labels ``(N,)`` in ``0..K-1``.
        confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability, or ``None``.
        input: ``"logits"`` or ``"probs"``.
    """

    def __init__(self, logits: Tensor, labels: Tensor, confidence: Tensor | None, input: InputKind) -> None:
        self.scores = at_least_float32(logits.detach())
        self.labels = labels.long()
        self.is_probs = input == "probs"
        self._given = None if confidence is None else confidence.detach()
        self._on_host = self.scores.device.type == "cpu"
        # Below 64 classes or so torch's softmax kernel is slower than its steps.
        self._by_steps = self._on_host and not self.is_probs and self.scores.shape[1] < 64

    @cached_property
    def _index(self) -> Tensor:
        # On the CPU numpy finds the maximum about ten times faster than torch.
        if self._on_host:
            return torch.from_numpy(self.scores.numpy().argmax(axis=-1))
        return self.scores.argmax(dim=-1)

    @cached_property
    def _top(self) -> Tensor:
        return self.scores.gather(-1, self._index.unsqueeze(-1))

    @cached_property
    def correct(self) -> Tensor:
        """Whether the predicted class (the first of the largest) is the label, ``(N,)`` bool."""
        return self._index == self.labels

    @cached_property
    def _score_of_label(self) -> Tensor:
        return self.scores.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1).double()

    @cached_property
    def _weights(self) -> Tensor:
        if self.is_probs:
            return self.scores
        if self._by_steps:
            return (self.scores - self._top).exp_()
        return self.scores.softmax(dim=-1)

    @cached_property
    def _top_weight(self) -> Tensor:
        return self._weights.gather(-1, self._index.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def _wide_weights(self) -> Tensor:
        # float64 also because squares of small float32 numbers are subnormal, and processors are slow on them.
        return self._weights.double()

    @cached_property
    def _total(self) -> Tensor:
        return self._wide_weights.sum(dim=-1)

    @cached_property
    def _odds(self) -> tuple[Tensor, Tensor]:
        """The odds against the top class and their negative logarithm, float64."""
        if not self._on_host:
            log_odds = self._exact_log_odds(slice(None))
            return torch.exp(-log_odds), log_odds
        top = self._top_weight.double()
        rest = self._total - top
        odds = rest / top
        # The difference is accurate to about 1e-16; where that is not enough, the other classes are summed separately.
        small = (rest < (1e-8 if self.scores.dtype == torch.float32 else 1e-3)).nonzero().squeeze(-1)
        if not len(small):
            return odds, -torch.log(odds)
        exact = self._exact_log_odds(small)
        odds[small] = torch.exp(-exact)
        return odds, (-torch.log(odds)).index_copy_(0, small, exact)

    def _exact_log_odds(self, rows: Tensor | slice) -> Tensor:
        # Relative to the runner-up the sum of the others cannot underflow; the clamp is for K = 1, without a runner-up.
        scores = self.scores[rows]
        top, index = self._top[rows], self._index[rows].unsqueeze(-1)
        if self.is_probs:
            return torch.log(top.squeeze(-1).double()) - torch.log(
                scores.scatter(-1, index, 0.0).sum(dim=-1, dtype=torch.float64)
            )
        others = scores.scatter(-1, index, -torch.inf)
        second = others.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(others.dtype).min)
        gap = (top.double() - second.double()).squeeze(-1)
        return gap - torch.log(others.sub_(second).exp_().sum(dim=-1, dtype=torch.float64))

    @cached_property
    def _largest_prob(self) -> Tensor:
        if self._by_steps:
            return self._total.reciprocal().to(self.scores.dtype)
        return self._top_weight

    @property
    def confidence(self) -> Tensor:
        """Confidence ``(N,)``: the given one, else the largest probability."""
        return self._largest_prob if self._given is None else self._given

    @cached_property
    def log_odds(self) -> Tensor:
        """Log-odds of the confidence ``(N,)``; float64 if the input it comes from is, else float32."""
        if self._given is None:
            return self._odds[1].to(self.scores.dtype)
        given = self._given.double()
        return (torch.log(given) - torch.log1p(-given)).to(at_least_float32(self._given).dtype)

    @cached_property
    def nll(self) -> Tensor:
        """Negative log-likelihood ``(N,)`` of the label in nats, float64."""
        if self.is_probs:
            return -torch.log(self._score_of_label)
        return torch.log1p(self._odds[0]) + (self._top.squeeze(-1).double() - self._score_of_label)

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities ``(N, K)``, at least float32."""
        if self._by_steps:
            return self._weights / self._total.to(self.scores.dtype).unsqueeze(-1)
        return self._weights

    @property
    def class_totals(self) -> Tensor | None:
        """Sum of the probabilities of each class, ``(K,)`` float64; ``None`` where it is expensive."""
        return None if self._by_steps else self._wide_weights.sum(dim=0)

    @cached_property
    def _scale(self) -> Tensor:
        # Divides the weights into probabilities, with more digits than a float32 softmax has.
        return self._top_weight.double() * (1.0 + self._odds[0])

    @cached_property
    def brier(self) -> Tensor:
        """Squared distance ``(N,)`` between the probabilities and the one-hot label, float64."""
        wide = self._wide_weights
        squares = torch.from_numpy(np.vecdot(wide.numpy(), wide.numpy())) if self._on_host else (wide * wide).sum(-1)
        if self.is_probs:
            return squares - 2.0 * self._score_of_label + 1.0
        brier: Tensor = squares / self._scale.square() - 2.0 * torch.exp(-self.nll) + 1.0
        return brier

    @cached_property
    def entropy(self) -> Tensor:
        """Entropy ``(N,)`` of the probabilities in nats, float64."""
        if self.is_probs:
            entropy: Tensor = torch.special.entr(self._wide_weights).sum(dim=-1)
            return entropy
        # Far below the largest logit the difference may overflow, and 0 * inf is nan.
        least = torch.finfo(self.scores.dtype).min
        below = (self.scores - self._top).clamp_min_(least).mul_(self._weights).sum(dim=-1, dtype=torch.float64)
        entropy = torch.log1p(self._odds[0]) - below / self._scale
        return entropy


def checked_rows(
    name: str, logits: Tensor, labels: Tensor, confidence: Tensor | None = None, input: InputKind = "logits"
) -> Rows:
    """Check type, shape and values of the inputs of a function and return their rows."""
    check_kind(input)
    check_shapes(logits, labels, confidence, name)
    check_values(logits, labels, confidence, input, name)
    return Rows(logits, labels, confidence, input)
