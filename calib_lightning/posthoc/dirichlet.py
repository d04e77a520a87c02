"""Dirichlet calibration (Kull et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from calib_lightning.posthoc.linear import LOG_TINY
from calib_lightning.posthoc.odir import RidgedMatrix


class Dirichlet(RidgedMatrix):
    """Dirichlet calibration, with the ridge ODIR (Kull et al., NeurIPS 2019, "Beyond temperature scaling").

    ``q = softmax(W ln p + b)`` with ``p = softmax(z)``; W and b minimise the objective of `RidgedMatrix`, whose
    arguments and attributes it has. ``ln p`` is bounded below by the log of the smallest normal float32 number, -87.3.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]] * 5)
        >>> labels = torch.tensor([0, 0, 1, 1] * 4 + [0, 1, 0, 1])
        >>> Dirichlet(lambdas=(1.0,)).fit(logits, labels)(torch.tensor([[2.0, 0.0]])).exp()
        tensor([[0.9000, 0.1000]])
    """

    def inputs(self, logits: Tensor) -> Tensor:
        """Return the logarithms of the probabilities."""
        return torch.log_softmax(logits, dim=-1).clamp_min(LOG_TINY)
