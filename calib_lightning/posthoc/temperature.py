"""Temperature scaling by likelihood (Guo et al., 2017), with a fixed value, by grid search, or by the focal loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calib_lightning.posthoc.base import Calibrator, Optimum


class _Tempered(Calibrator):
    """``q = softmax(z / T)``; the state is ``beta = 1 / T``."""

    preserves_argmax = True
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("beta")

    @property
    def temperature(self) -> float:
        """The fitted T; above 1 it lowers confidence."""
        return 1.0 / float(self.beta)

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Divide by T; see `Calibrator.transform`."""
        # The largest logit is taken off first, so that a large beta cannot overflow.
        shifted = logits - logits.amax(dim=-1, keepdim=True)
        return torch.log_softmax(shifted * self.beta.to(logits.dtype), dim=-1)


class FixedTemperature(_Tempered):
    """Temperature scaling with a given T; the fit looks at K alone.

    Args:
        temperature: T > 0.

    Example:
        >>> FixedTemperature(1.5).fit(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).temperature
        1.5
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r}: it must be a number above 0, such as 1.5")
        self._given = float(temperature)

    @property
    def temperature(self) -> float:
        """T."""
        return self._given

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Take T as it is; see `Calibrator.fit_rows`."""
        self.beta = logits.new_tensor(1.0 / self._given, dtype=torch.float64)
        return Optimum()
