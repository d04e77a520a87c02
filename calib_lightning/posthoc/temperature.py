"""Temperature scaling by likelihood (Guo et al., 2017), with a given value, or by the focal loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.optimize import brentq
from torch import Tensor

from calib_lightning.metrics.functional.temperature import (
    LOG_BETA_BOUND,
    OptimalTemperature,
    search_inverse_temperature,
    tempered_rows,
)
from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.fit_report import Optimum
from calib_lightning.posthoc.solver import CONVERGED, PlainLBFGS, Solver, checked_solver

_LEAST_RANGE = 1e-3
_SCAN_STEP = 0.5
_VALLEYS = 3


def tempered(logits: Tensor, beta: Tensor) -> Tensor:
    """Log-probabilities of ``softmax(beta z)``, ``(N, K)`` in the dtype of the logits."""
    # Subtracting the largest logit first prevents an overflow for large beta.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return torch.log_softmax(shifted * beta.to(logits.dtype), dim=-1)


def fitted_temperature(calibrator: Calibrator, beta: Tensor) -> float:
    """T of a fitted ``beta``; with one class, which leaves nothing to fit, 1."""
    if beta.numel():
        return 1.0 / float(beta)
    calibrator.check_fitted()
    return 1.0


class _Tempered(Calibrator):
    """``q = softmax(z / T)``; the state is ``beta = 1 / T``."""

    preserves_argmax = True
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_state("beta")

    @property
    def temperature(self) -> float:
        """The fitted T; above 1 it lowers confidence. An error before the fit."""
        return fitted_temperature(self, self.beta)

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Divide by T; see `Calibrator.transform`."""
        return tempered(logits, self.beta)


class FixedTemperature(_Tempered):
    """Temperature scaling with a given T; the fit only records K.

    ``q = softmax(z / T)``.

    Args:
        temperature: T > 0.

    Raises:
        ValueError: A temperature that is not finite and above 0.

    Example:
        >>> FixedTemperature(1.5).fit(torch.randn(4, 3), torch.tensor([0, 1, 2, 0])).temperature
        1.5
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}; it must be finite and > 0.")
        self._given = float(temperature)

    @property
    def temperature(self) -> float:
        """T."""
        return self._given

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Set the given T; see `Calibrator.fit_rows`."""
        self.beta = logits.new_tensor(1.0 / self._given, dtype=torch.float64)
        return Optimum()


class Temperature(_Tempered):
    """Temperature scaling by likelihood (Guo et al., 2017).

    ``q = softmax(z / T)`` with the T of lowest mean negative log-likelihood. The optimum is found by safeguarded Newton
    steps in float64, for logits of any scale. If all predictions are correct, the likelihood rises as T falls to 0;
    then T is that of smoothed targets, ``1 - 1 / (N + 2)`` for the label and the rest for the others (Platt, 1999), or
    1 if this is lower. If the logits of the labels are not above average, the best distribution is uniform, and T stops
    where the logits of a row still differ by 1e-3 on average, so that float32 can tell the classes apart. Both are
    bounds, and the report says so.

    Args:
        solver: ``None`` for the optimum, or a method of the literature: `PlainLBFGS` starts from T = 1.5, as the code
            of Guo et al.; ``GradientDescent()`` and others start from T = 1, as papers with 1000 epochs. The report
            says how far from the optimum it stopped. If it ends above its starting value or with T <= 0, T = 1 is used,
            with a warning.

    Raises:
        TypeError: ``solver`` is not a `Solver`.

    Deviations: Guo et al. stop L-BFGS without a line search after 50 steps. For an optimal T of 2.5 this ends 0.08 nats
    above the optimum with 10 classes and 0.17 with 100; gradient descent ends 0.1 above. The default reaches it.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> round(Temperature().fit(logits, torch.tensor([0, 0, 0, 0])).temperature, 6)  # 2 / log 3
        1.820478
    """

    def __init__(self, solver: Solver | None = None) -> None:
        super().__init__()
        self.solver = checked_solver(solver)

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Find T; see `Calibrator.fit_rows`."""
        if self.solver is not None:
            beta, optimum = _descended(self.solver, logits, labels)
        else:
            beta, optimum = most_likely(logits, labels)
        self.beta = logits.new_tensor(beta, dtype=torch.float64)
        return optimum


class FocalTemperature(_Tempered):
    """Temperature scaling by the focal loss (Lin et al., 2017).

    ``q = softmax(z / T)`` with the T of lowest ``mean (1 - q_y)^gamma (-log q_y)``, which is above the maximum
    likelihood T. The loss can have several minima: it is scanned, and the lowest minimum found is used.

    Args:
        gamma: Exponent >= 0; 0 is the likelihood.

    Raises:
        ValueError: ``gamma`` is negative or not finite.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
        >>> round(FocalTemperature().fit(logits, torch.tensor([0, 0, 0, 0])).temperature, 4)
        3.23
    """

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        if not 0.0 <= gamma < math.inf:
            raise ValueError(f"gamma is {gamma!r}; it must be finite and >= 0. 1.0 is the usual value.")
        self.gamma = gamma

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Find T; see `Calibrator.fit_rows`."""

        def focal(beta: float, dtype: torch.dtype) -> Sloped:
            nll, slope, _ = tempered_rows(logits, labels, beta, dtype)
            miss = -torch.expm1(-nll)
            ratio = torch.where(nll > 0.0, nll / miss, 1.0)
            factor = miss.pow(self.gamma)
            by_nll = factor * (1.0 + self.gamma * (1.0 - miss) * ratio)
            return Sloped(float((factor * nll).mean()), float((by_nll * slope).mean()))

        beta, optimum = lowest(focal, logits, labels)
        self.beta = logits.new_tensor(beta, dtype=torch.float64)
        return optimum


def most_likely(logits: Tensor, labels: Tensor) -> tuple[float, Optimum]:
    """Maximum likelihood inverse temperature, bounded as in `Temperature`; the gradient is by ``log T``."""
    (beta, _, at_bound), slope, passes = search_inverse_temperature(logits, labels)
    gradient = abs(beta * slope)
    if at_bound:
        return _stopped(beta, logits, labels, Optimum(False, passes, gradient, True))
    return beta, Optimum(gradient <= CONVERGED, passes, gradient)


def bounded_temperature(logits: Tensor, labels: Tensor) -> OptimalTemperature:
    """Maximum likelihood inverse temperature, bounded as in `Temperature`, for maps that start from it."""
    found = search_inverse_temperature(logits, labels).optimum
    return found._replace(beta=_stopped(found.beta, logits, labels, Optimum())[0]) if found.at_bound else found


class Sloped(NamedTuple):
    """A loss and its derivative by ``beta = 1 / T``."""

    value: float
    slope: float


def lowest(loss: Callable[[float, torch.dtype], Sloped], logits: Tensor, labels: Tensor) -> tuple[float, Optimum]:
    """Inverse temperature of the lowest loss, which may have several minima, and how the search went.

    The loss, computed in the given dtype, is scanned in float32 over ``log T`` in steps of 1/2 between the bounds of
    `Temperature`. In the three lowest valleys Brent's method finds the root of the slope. The gradient is by ``log T``.
    """
    likely = search_inverse_temperature(logits, labels)
    centre, passes = math.log(likely.optimum.beta), likely.passes

    def at(log_beta: float, dtype: torch.dtype = torch.float64) -> Sloped:
        nonlocal passes
        passes += 1
        value, slope = loss(math.exp(log_beta), dtype)
        return Sloped(value if math.isfinite(value) else math.inf, math.exp(log_beta) * slope)

    reach = math.ceil(2.0 * LOG_BETA_BOUND / _SCAN_STEP)
    inside = [centre + _SCAN_STEP * i for i in range(-reach, reach + 1)]
    points = [-LOG_BETA_BOUND, *(p for p in inside if abs(p) < LOG_BETA_BOUND), LOG_BETA_BOUND]
    values = [at(point, torch.float32).value for point in points]
    if min(values) == max(values):  # constant logits: every temperature gives the same
        return math.exp(centre), Optimum(True, passes, 0.0)
    dips = [i for i in range(1, len(points) - 1) if values[i] <= min(values[i - 1], values[i + 1])]
    found = []
    for i in sorted(dips, key=lambda i: (values[i], abs(points[i] - centre)))[:_VALLEYS]:
        slope = at(points[i]).slope
        side = points[i - 1] if slope > 0.0 else points[i + 1]
        if at(side).slope * slope < 0.0:
            root = brentq(lambda p: at(p).slope, points[i], side, xtol=1e-12, rtol=1e-14)  # type: ignore[no-untyped-call]
            found.append((*at(root), root))
    end, where = min((at(bound).value, bound) for bound in (-LOG_BETA_BOUND, LOG_BETA_BOUND))
    if not found or end <= min(found)[0]:
        return _stopped(math.exp(where), logits, labels, Optimum(False, passes, abs(at(where).slope), True))
    _, slope, log_beta = min(found)
    return math.exp(log_beta), Optimum(abs(slope) <= CONVERGED, passes, abs(slope))


def _stopped(beta: float, logits: Tensor, labels: Tensor, optimum: Optimum) -> tuple[float, Optimum]:
    """Bound an inverse temperature that would run to 0 or infinity, with a note on the bound."""
    wide = logits.double()
    if beta < 1.0:
        # float32 log-probabilities must still differ.
        spread = float((wide.amax(dim=-1) - wide.amin(dim=-1)).mean())
        beta = max(beta, min(_LEAST_RANGE / spread, 1.0)) if spread > 0.0 else beta
        note = f"the labels' logits are not above average, so the uniform distribution is best; T = {1.0 / beta:.3g}"
        return beta, optimum._replace(notes=(*optimum.notes, f"{note}, where float32 can still tell the classes apart"))
    of_label = wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if bool((of_label < wide.amax(dim=-1)).any()):
        return beta, optimum
    rows, classes = wide.shape
    others = (wide.sum(dim=-1) - of_label) / (classes - 1)
    pull = float((of_label - others).mean()) / (rows + 2)

    def slope(log_beta: float) -> float:
        return float(tempered_rows(logits, labels, math.exp(log_beta))[1].mean()) + pull

    if slope(LOG_BETA_BOUND) <= 0.0:
        return beta, optimum
    beta = 1.0  # right predictions are no reason to lower confidence
    if slope(0.0) < 0.0:
        beta = math.exp(brentq(slope, 0.0, LOG_BETA_BOUND, xtol=1e-12, rtol=1e-14))  # type: ignore[no-untyped-call]
    note = f"all {rows} predictions are correct, so the likelihood has no maximum; T = {1.0 / beta:.3g} is used"
    return beta, optimum._replace(notes=(*optimum.notes, f"{note}, a bound from targets of 1 - 1/(N + 2)"))


def _descended(solver: Solver, logits: Tensor, labels: Tensor) -> tuple[float, Optimum]:
    """Inverse temperature of a method of the literature, which minimises over T itself."""

    def by_temperature(point: Tensor) -> tuple[Tensor, Tensor]:
        temperature = float(point)
        beta = 1.0 / temperature if temperature else math.nan
        # A step can lead to T < 0, which reverses the order of the logits.
        sign = math.copysign(1.0, beta)
        value, slope, _ = tempered_rows(sign * logits, labels, abs(beta))
        return value.mean(), (-sign * slope.mean() * beta**2).reshape(1)

    first = 1.5 if isinstance(solver, PlainLBFGS) else 1.0
    start = logits.new_tensor([first], dtype=torch.float64)
    found = solver.minimise(by_temperature, start)
    temperature, gradient = float(found.point), found.gradient_norm * abs(float(found.point))
    highest = float(by_temperature(start)[0])
    raw, raw_slope = (float(part) for part in by_temperature(torch.ones_like(start)))
    passes = found.passes + 2
    if not (0.0 < temperature < math.inf and found.value <= highest):
        note = f"{solver.name} diverged to T = {temperature:.4g}; T = 1 is used. Temperature() finds the optimum"
        return 1.0, Optimum(False, passes, abs(raw_slope), notes=(note,))
    worse = (f"{solver.name} stopped at T = {temperature:.4g}, which is worse than T = 1",)
    return 1.0 / temperature, Optimum(gradient <= CONVERGED, passes, gradient, notes=worse * (found.value > raw))
