"""Calibrators of one probability: that of an event such as "the prediction is correct"."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.state import FittedState
from calib_lightning.utils.described import Described

FLOOR = 1e-6
"""Frequencies are kept between this and one minus this, since no calibration set can tell them from 0 and 1."""


class BinaryCalibrator(FittedState, Described, ABC):
    """Maps the log-odds of an event to calibrated log-odds; fitted to how often the event happened.

    Input and output are log-odds because ``1 - 1e-20`` rounds to 1 in floating point while its log-odds are finite. A
    subclass names its state with `register_state` and implements `fit_rows` and `transform`. `OneVsRest` and `TopLabel`
    turn it into a `Calibrator`.
    """

    instead = "OneVsRest({0}) or TopLabel({0})"

    @abstractmethod
    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Fit to checked rows and assign the state.

        Args:
            log_odds: ``(N,)`` float64, finite; N >= 1.
            hits: Whether the event happened, ``(N,)`` bool.

        Returns:
            How the fit went.
        """

    @abstractmethod
    def transform(self, log_odds: Tensor) -> Tensor:
        """Calibrate; must be traceable by `torch.export`, so no Python branch may depend on the values of a tensor.

        Args:
            log_odds: ``(N,)`` float64.

        Returns:
            Calibrated log-odds ``(N,)`` float64, finite.
        """

    def fit(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Fit to held-out rows.

        Args:
            log_odds: ``log p / (1 - p)`` of the event, ``(N,)``, floating point, finite; N >= 1.
            hits: Whether the event happened, ``(N,)`` bool.

        Returns:
            How the fit went.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, no rows, or log-odds that are not finite.
        """
        where = f"{type(self).__name__}.fit"
        if not log_odds.is_floating_point() or hits.dtype != torch.bool:
            raise TypeError(
                f"{where}: log_odds is {log_odds.dtype} and hits {hits.dtype}; they must be floating point and bool."
            )
        if log_odds.ndim != 1 or hits.shape != log_odds.shape or len(hits) == 0:
            raise ValueError(
                f"{where}: log_odds has shape {tuple(log_odds.shape)} and hits {tuple(hits.shape)}; both must have "
                "shape (N,) with N >= 1."
            )
        bad = ~log_odds.isfinite()
        if bool(bad.any()):
            raise ValueError(f"{where}: log_odds[{int(bad.int().argmax())}] is not finite. Leave such rows out.")
        with torch.no_grad():
            return self.fit_rows(log_odds.detach().double(), hits.detach())

    def forward(self, log_odds: Tensor) -> Tensor:
        """Calibrate.

        Args:
            log_odds: ``(N,)``, floating point. They are widened to float64, because a row that is rounded differently
                than in the fit could fall on the other side of a bin's edge.

        Returns:
            Calibrated log-odds ``(N,)`` float64, finite.

        Raises:
            RuntimeError: It is not fitted.
        """
        self.check_fitted()
        return self.transform(log_odds.double())


def log_sigmoid(log_odds: Tensor) -> Tensor:
    """Logarithm of the probability, in operations that neither overflow nor saturate.

    That of torch is exported to ONNX as the logarithm of a sigmoid, which is -inf below about -745 and inaccurate long
    before.
    """
    return log_odds.clamp_max(0.0) - torch.log1p(torch.exp(-log_odds.abs()))


def bounded_log_odds(probs: Tensor) -> Tensor:
    """Log-odds of frequencies, after these are limited to ``[1e-6, 1 - 1e-6]``."""
    kept = probs.clamp(FLOOR, 1.0 - FLOOR)
    return torch.log(kept) - torch.log1p(-kept)


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Interpolate linearly between strictly increasing knots ``(M,)``, M >= 2; constant outside."""
    right = torch.bucketize(x, knots).clamp(1, knots.shape[0] - 1)
    start, end = knots[right - 1], knots[right]
    share = ((x - start) / (end - start)).clamp(0.0, 1.0)
    # From both ends, so that the knots get exactly their values.
    return torch.lerp(values[right - 1], values[right], share)
