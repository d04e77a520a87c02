"""Calibrators applied one after the other."""

from __future__ import annotations

import math
import re
import warnings
from itertools import pairwise

import torch
from torch import Tensor, nn

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.posthoc.evidence import Evidence, Need
from calib_lightning.posthoc.fit_report import FitReport, Optimum
from calib_lightning.types import Prediction

_BLOCK = 2**22


class Sequential(Calibrator):
    """Fits calibrators one after the other, each to the output of those before it for the same rows.

    ``q = g_n(... g_2(g_1(z)))``. It preserves the predicted class if all members do, calibrates the full distribution
    if all members do, and so on.

    Args:
        calibrators: At least one. One that needs the network must come first, and no member that calibrates the full
            distribution may follow one that calibrates only the predicted class (`TopLabel`).

    Raises:
        TypeError: An argument that is not a `Calibrator`.
        ValueError: No calibrator, the same object twice, or an order that makes no sense.

    Example:
        >>> from calib_lightning.posthoc import FixedTemperature
        >>> twice = Sequential(FixedTemperature(2.0), FixedTemperature(1.5))
        >>> twice.name, twice.preserves_argmax
        ('Sequential(FixedTemperature(temperature=2.0), FixedTemperature(temperature=1.5))', True)
    """

    def __init__(self, *calibrators: Calibrator) -> None:
        super().__init__()
        if not calibrators:
            raise ValueError("Sequential() has no calibrators; it must have at least one. Pass Temperature(), say.")
        for calibrator in calibrators:
            if not isinstance(calibrator, Calibrator):
                raise TypeError(
                    f"Sequential: an argument is {calibrator!r:.100}; it must be a Calibrator. Wrap calibrators of one "
                    "probability in OneVsRest or TopLabel."
                )
        for calibrator in calibrators[1:]:
            if "network" in calibrator.needs:
                raise ValueError(
                    f"Sequential: {calibrator.name} changes the images that the network sees; it must come before all "
                    "others, so put it first."
                )
        if len({id(calibrator) for calibrator in calibrators}) < len(calibrators):
            raise ValueError("Sequential: the same object is given twice; it holds one fit. Create two of them.")
        for before, after in pairwise(calibrators):
            if after.full_distribution and not before.full_distribution:
                raise ValueError(
                    f"Sequential: {after.name} after {before.name} would use uncalibrated probabilities and undo the "
                    "confidence of the predicted class; put it first."
                )
        self.calibrators = nn.ModuleList(calibrators)

    @property
    def members(self) -> list[Calibrator]:
        """The calibrators, in order."""
        return [member for member in self.calibrators if isinstance(member, Calibrator)]

    @property
    def preserves_argmax(self) -> bool:  # type: ignore[override]
        """Whether all members preserve the predicted class."""
        return all(member.preserves_argmax for member in self.members)

    @property
    def full_distribution(self) -> bool:  # type: ignore[override]
        """Whether all members calibrate all probabilities."""
        return all(member.full_distribution for member in self.members)

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        """What the first member needs, and the features if any other member needs them."""
        first, *others = self.members
        more: tuple[Need, ...] = ("features",) if any("features" in member.needs for member in others) else ()
        return tuple(dict.fromkeys((*first.needs, *more)))

    @property
    def temperature(self) -> float | None:
        """Product of the members' temperatures; ``None`` if a member has none."""
        found = [getattr(member, "temperature", None) for member in self.members]
        known = [value for value in found if isinstance(value, float)]
        return math.prod(known) if len(known) == len(found) else None

    @property
    def per_class(self) -> bool:  # type: ignore[override]
        """Whether any member has parameters for every class."""
        return any(member.per_class for member in self.members)

    def fit_rows(self, logits: Tensor, labels: Tensor, features: Tensor | None) -> Optimum:
        """Fit the members in order; see `Calibrator.fit_rows`."""
        return self.fit_evidence(Evidence(logits, features), labels)

    def fit_evidence(self, evidence: Evidence, labels: Tensor) -> Optimum:
        """Fit the members in order, each to the output of those before it."""
        reports: list[FitReport] = []
        for member in self.members:
            with warnings.catch_warnings():
                # A member's problems are in its report and are reported once, with its name.
                warnings.filterwarnings("ignore", re.escape(f"{type(member).__name__}.fit: "))
                member.fit(labels=labels, **evidence._asdict())
            if member.report is not None:
                reports.append(member.report)
            if member is not self.members[-1]:
                logits, features = self._after(member, evidence), evidence.features
                # The network may be on another device than the rows.
                evidence = Evidence(logits, None if features is None else features.to(logits.device))
                labels = labels.to(logits.device)
        norms = [report.gradient_norm for report in reports if not math.isnan(report.gradient_norm)]
        return Optimum(
            converged=all(report.converged for report in reports),
            passes=sum(report.passes for report in reports),
            gradient_norm=max(norms, default=math.nan),
            at_bound=any(report.at_bound for report in reports),
            notes=tuple(f"{report.calibrator}: {note}" for report in reports for note in report.notes),
        )

    def logits_of(self, evidence: Evidence) -> Tensor:
        """Return the logits for the first member; see `Calibrator.logits_of`."""
        return self.members[0].logits_of(evidence)

    def transform(self, logits: Tensor, features: Tensor | None) -> Tensor:
        """Apply the members in order; see `Calibrator.transform`."""
        for member in self.members:
            logits = member.transform(logits, features)
        return logits

    def with_confidence(self, logits: Tensor, features: Tensor | None) -> Prediction:
        """Apply the members in order; the confidence is that of the last one, if it has one."""
        *before, last = self.members
        for member in before:
            logits = member.transform(logits, features)
        return last.with_confidence(logits, features)

    def of_fitted_rows(self, logits: Tensor, features: Tensor | None, place: Tensor) -> Prediction:
        """Apply the members in order to rows of the fit; see `Calibrator.of_fitted_rows`."""
        *before, last = self.members
        for member in before:
            logits = member.of_fitted_rows(logits, features, place).logits
        return last.of_fitted_rows(logits, features, place)

    @staticmethod
    def _after(member: Calibrator, evidence: Evidence) -> Tensor:
        """Apply a fitted member to the rows of the fit."""
        logits, features = member.logits_of(evidence), evidence.features if "features" in member.needs else None
        features = None if features is None else features.to(logits.device)
        rows = torch.arange(len(logits), device=logits.device)
        parts = [
            member.of_fitted_rows(logits[some], None if features is None else features[some], some).logits
            for some in torch.split(rows, max(1, _BLOCK // logits.shape[1]))
        ]
        return torch.cat(parts)
