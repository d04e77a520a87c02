"""Isotonic regression (Zadrozny and Elkan, 2002): the non-decreasing map with least squared error."""

from __future__ import annotations

import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from calib_lightning.posthoc.binary import FLOOR, BinaryCalibrator, interpolate
from calib_lightning.posthoc.fit_report import Optimum

_TILT = 1e-9


def isotonic_knots(scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the steps ``(M,)``, M >= 2, and values there, of the non-decreasing function with least squared error.

    Adjacent violators are pooled, and so are equal scores ``(N,)``.
    """
    fit = IsotonicRegression(y_min=0.0, y_max=1.0)  # type: ignore[no-untyped-call]
    fit.fit(scores.cpu().numpy(), hits.double().cpu().numpy())
    knots = torch.from_numpy(fit.X_thresholds_).to(scores)
    values = torch.from_numpy(fit.y_thresholds_).to(scores).clamp(0.0, 1.0)
    if len(knots) == 1:  # one score: a step has two ends
        knots, values = torch.cat([knots, knots + 1.0 + knots.abs()]), values.repeat(2)
    return knots, values


class Isotonic(BinaryCalibrator):
    """Isotonic regression (Zadrozny and Elkan, 2002), ``(f(p) + 1e-9 p) / (1 + 1e-9)`` with f non-decreasing.

    f is constant on the steps of the fit, linear in the log-odds between them, and constant outside. Equal scores are
    pooled. The second term keeps the order of rows on the same step in float64; rounded to float32 they are tied, which
    can lower the AUROC.

    Deviations: Values are kept between 1e-6 and ``1 - 1e-6``, so that no outcome has probability 0.

    Example:
        >>> isotonic = Isotonic()
        >>> _ = isotonic.fit(torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([True, False, True, False]))
        >>> torch.sigmoid(isotonic(torch.tensor([-5.0, 0.0, 5.0])))
        tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    knots: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("knots", "values")

    def fit_rows(self, log_odds: Tensor, hits: Tensor) -> Optimum:
        """Pool adjacent violators; see `BinaryCalibrator.fit_rows`."""
        knots, values = isotonic_knots(log_odds, hits)
        self.knots, self.values = knots, values.clamp(FLOOR, 1.0 - FLOOR)
        return Optimum()

    def transform(self, log_odds: Tensor) -> Tensor:
        """Interpolate; see `BinaryCalibrator.transform`."""
        value = interpolate(log_odds, self.knots, self.values)
        above = value + _TILT * torch.sigmoid(log_odds)
        return torch.log(above) - torch.log((1.0 - value) + _TILT * torch.sigmoid(-log_odds))
