"""Beta calibration (Kull, Silva Filho and Flach, 2017), fitted by exact maximum likelihood."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from calib_lightning.posthoc.binary import BinaryCalibrator, log_sigmoid
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.platt import fit_logistic

Variant = Literal["abm", "am", "ab"]
"""Which parameters of beta calibration are free."""


def beta_columns(log_odds: Tensor) -> Tensor:
    """The two features of beta calibration, ``ln p`` and ``-ln(1 - p)``, ``(N, 2)`` without cancellation."""
    return torch.stack([log_sigmoid(log_odds), -log_sigmoid(-log_odds)], dim=-1)


class Beta(BinaryCalibrator):
    """Beta calibration (Kull et al., 2017), ``sigmoid(a ln p - b ln(1 - p) + c)`` with ``a, b >= 0``.

    The map follows from beta distributions of the scores of hits and of misses. With a = b = 1, c = 0 it is the
    identity. The state is ``coefficients = (a, b, c)``.

    Args:
        variant: ``"abm"``: all three; ``"am"``: a = b, the same as `Platt`; ``"ab"``: one half stays one half,
            ``c = (a - b) ln 2``.

    Raises:
        ValueError: An unknown variant.

    Deviations: The authors' code stops its solver early, so its coefficients differ in the third digit. If the
    likelihood has no maximum, the targets are smoothed; see `fit_logistic`.

    Example:
        >>> log_odds = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.0, 0.0])
        >>> beta = Beta("am")
        >>> _ = beta.fit(log_odds, torch.tensor([True, True, True, False, True, False]))
        >>> torch.sigmoid(beta(torch.tensor([2.0, 0.0])))
        tensor([0.7500, 0.5000], dtype=torch.float64)
    """

    coefficients: Tensor

    def __init__(self, variant: Variant = "abm") -> None:
        super().__init__()
        if variant not in ("abm", "am", "ab"):
            raise ValueError(f"variant is {variant!r}; it must be 'abm', 'am' or 'ab'.")
        self.variant = variant
        self.register_state("coefficients")

    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Maximise the likelihood; see `BinaryCalibrator.fit_rows`."""
        if self.variant == "am":
            fit = fit_logistic(log_odds.unsqueeze(1), log_odds, hits, intercept=True)
            self.coefficients = torch.stack([fit.slopes[0], fit.slopes[0], fit.intercept])
            return fit.optimum
        columns = beta_columns(log_odds)
        if self.variant == "abm":
            fit = fit_logistic(columns, log_odds, hits, intercept=True)
            self.coefficients = torch.stack([fit.slopes[0], fit.slopes[1], fit.intercept])
            return fit.optimum
        log_two = math.log(2.0)
        fit = fit_logistic(columns + columns.new_tensor([log_two, -log_two]), log_odds, hits, intercept=False)
        self.coefficients = torch.stack([*fit.slopes, (fit.slopes[0] - fit.slopes[1]) * log_two])
        return fit.optimum

    def transform(self, log_odds: Tensor) -> Tensor:
        """Apply the map; see `BinaryCalibrator.transform`."""
        a, b, c = self.coefficients.unbind()
        below, above = beta_columns(log_odds).unbind(dim=-1)
        return a * below + b * above + c
