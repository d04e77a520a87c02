"""Calibrators of one probability, that of an event such as "the prediction is right"."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.state import FittedState
from calib_lightning.utils.described import Described

FLOOR = 1e-6
"""Frequencies are kept between this and one minus this: no calibration set can tell them from 0 and 1."""


class BinaryCalibrator(FittedState, Described, ABC):
    """Maps the log-odds of an event to calibrated log-odds, once it is fitted on how often the event happened.

    Log-odds come in and go out, because a probability of ``1 - 1e-20`` is 1 in floating point and its log-odds are not.
    A subclass keeps its constructor's arguments as attributes of the same names, names its state with `register_state`,
    and writes `fit_rows` and `transform`. `OneVsRest` and `TopLabel` make a `Calibrator` of it.
    """

    instead = "OneVsRest({0}) or TopLabel({0})"

    @property
    def fitted(self) -> bool:
        """Whether it can be used."""
        return any(buffer.numel() > 0 for buffer in self.buffers())

    @abstractmethod
    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Fit to rows that were checked, and assign the state.

        Args:
            log_odds: ``(N,)`` float64, finite; N >= 1.
            hits: ``(N,)`` bool.

        Returns:
            How it went.
        """

    @abstractmethod
    def transform(self, log_odds: Tensor) -> Tensor:
        """Calibrate; nothing here may depend on the values of a tensor in Python, so that it can be exported.

        Args:
            log_odds: ``(N,)`` float64.

        Returns:
            Calibrated log-odds ``(N,)`` float64, finite.
        """

    def fit(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Fit to held-out rows.

        Args:
            log_odds: ``log p / (1 - p)`` of the event, ``(N,)``, floating point, finite; N >= 1.
            hits: Whether it happened, ``(N,)`` bool.

        Returns:
            How it went.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, no rows, or log-odds that are not finite.
        """
        where = f"{type(self).__name__}.fit"
        if not log_odds.is_floating_point() or hits.dtype != torch.bool:
            raise TypeError(f"{where}: log_odds are {log_odds.dtype} and hits {hits.dtype}; give floats and bool")
        if log_odds.ndim != 1 or hits.shape != log_odds.shape or len(hits) == 0:
            raise ValueError(
                f"{where}: log_odds have shape {tuple(log_odds.shape)} and hits {tuple(hits.shape)}; give (N,) of "
                "both, N at least 1"
            )
        bad = ~log_odds.isfinite()
        if bool(bad.any()):
            raise ValueError(f"{where}: log_odds[{int(bad.int().argmax())}] is not finite; leave such rows out")
        with torch.no_grad():
            return self.fit_rows(log_odds.detach().double(), hits.detach())

    def forward(self, log_odds: Tensor) -> Tensor:
        """Calibrate.

        Args:
            log_odds: ``(N,)``, floating point. They are widened to float64: rounded otherwise than in the fit, a row
                could fall on the other side of a bin's edge.

        Returns:
            Calibrated log-odds ``(N,)`` float64, finite.

        Raises:
            RuntimeError: It was not fitted.
        """
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted: call fit(log_odds, hits) or load a fitted one.")
        return self.transform(log_odds.double())


def log_sigmoid(log_odds: Tensor) -> Tensor:
    """Logarithm of the probability, of steps that neither overflow nor saturate.

    The one of torch is exported to ONNX as the logarithm of the sigmoid, which is infinite below some -745 and has lost
    its digits long before.

    Args:
        log_odds: Any shape.

    Returns:
        The same shape.

    Example:
        >>> log_sigmoid(torch.tensor([-2000.0, 0.0]))
        tensor([-2.0000e+03, -6.9315e-01])
    """
    return log_odds.clamp_max(0.0) - torch.log1p(torch.exp(-log_odds.abs()))


def bounded_log_odds(probs: Tensor) -> Tensor:
    """Log-odds of frequencies, which are first kept between 1e-6 and ``1 - 1e-6``.

    Args:
        probs: Any shape, float64, in ``[0, 1]``.

    Returns:
        The same shape.

    Example:
        >>> bounded_log_odds(torch.tensor([0.5, 1.0], dtype=torch.float64))
        tensor([ 0.0000, 13.8155], dtype=torch.float64)
    """
    kept = probs.clamp(FLOOR, 1.0 - FLOOR)
    return torch.log(kept) - torch.log1p(-kept)


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Interpolate linearly between knots; outside of them the first and the last value go on.

    Args:
        x: Where, any shape.
        knots: ``(M,)``, strictly increasing; M >= 2.
        values: ``(M,)``.

    Returns:
        Values in the shape of ``x``.

    Example:
        >>> interpolate(torch.tensor([-1.0, 0.5, 9.0]), torch.tensor([0.0, 1.0]), torch.tensor([2.0, 4.0]))
        tensor([2., 3., 4.])
    """
    right = torch.bucketize(x, knots).clamp(1, knots.shape[0] - 1)
    start, end = knots[right - 1], knots[right]
    share = ((x - start) / (end - start)).clamp(0.0, 1.0)
    # From both ends, so that the knots themselves get their very values.
    return torch.lerp(values[right - 1], values[right], share)
