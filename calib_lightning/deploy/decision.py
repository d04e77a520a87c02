"""Decisions from calibrated log-probabilities: label, confidence, and whether to abstain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional import coverage_at_risk


class Decision(NamedTuple):
    """Answers of a deployed classifier for some images.

    Attributes:
        label: Predicted classes ``(N,)``, int64.
        confidence: Their confidence ``(N,)``, in ``[0, 1]``.
        abstain: Whether the confidence is below the operating threshold, ``(N,)`` bool.
    """

    label: Tensor
    confidence: Tensor
    abstain: Tensor


class OperatingPoint(NamedTuple):
    """A threshold on the confidence, with its risk and coverage on the held-out rows that it was chosen on.

    Attributes:
        threshold: Rows with at least this confidence are accepted; 0 accepts all rows, ``inf`` none.
        wanted_risk: Maximum error rate that was requested for the accepted rows.
        risk: Error rate of the accepted rows; nan without any.
        coverage: Fraction of the rows that are accepted.
        rows: N.
    """

    threshold: float
    wanted_risk: float
    risk: float
    coverage: float
    rows: int

    @property
    def record(self) -> dict[str, Any]:
        """Plain data for JSON: ``"inf"`` for an infinite threshold, ``None`` for an undefined risk."""
        threshold = self.threshold if math.isfinite(self.threshold) else "inf"
        return {**self._asdict(), "threshold": threshold, "risk": None if math.isnan(self.risk) else self.risk}

    @classmethod
    def from_record(cls, record: Any) -> OperatingPoint:
        """Build an operating point from its record.

        Args:
            record: Plain data as in `record`, possibly from an untrusted file.

        Returns:
            The operating point.

        Raises:
            ValueError: It is not a valid record.
        """
        if not isinstance(record, Mapping) or set(record) != set(cls._fields):
            entries = ", ".join(cls._fields)
            raise ValueError(f"the operating point is {record!r:.200}; it must have the entries {entries}.")
        try:
            values = {name: math.nan if value is None else float(value) for name, value in record.items()}
            found = cls(**{**values, "rows": int(values["rows"])})  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"the operating point is {record!r:.200}; its entries must be numbers.") from None
        if math.isnan(found.threshold):
            raise ValueError(f"the operating point is {record!r:.200}; its threshold must be a number.")
        return found


def decide(log_probs: Tensor, confidence: Tensor | None, threshold: float) -> Decision:
    """Accept or reject predictions by their confidence.

    Args:
        log_probs: Calibrated log-probabilities ``(N, K)``.
        confidence: Confidence ``(N,)``, if it is not the largest probability.
        threshold: Rows with a lower confidence abstain.

    Returns:
        The decision.

    Example:
        >>> decide(torch.tensor([[0.9, 0.1], [0.4, 0.6]]).log(), None, threshold=0.8).abstain
        tensor([False,  True])
    """
    top, label = log_probs.max(dim=-1)
    confidence = top.exp().clamp_max(1.0) if confidence is None else confidence
    # In float64: rounding the threshold to the dtype of the confidence could move it past a row.
    return Decision(label, confidence, ~(confidence.double() >= threshold))


def operating_point(
    log_probs: Tensor, labels: Tensor, confidence: Tensor | None = None, *, risk: float = 0.05
) -> OperatingPoint:
    """Choose the lowest threshold whose selective risk is at most ``risk`` (after Geifman and El-Yaniv, 2017).

    The coverage is that of `calib_lightning.metrics.functional.coverage_at_risk`; rows with equal confidence are
    accepted or rejected together. The threshold is halfway between the lowest accepted and the highest rejected
    confidence, so that rounding (in an exported network, for example) does not change which rows are accepted.

    Deviations: The risk is the error rate on the given rows, without the paper's bound for new rows.

    Args:
        log_probs: Calibrated log-probabilities ``(N, K)`` of held-out rows, N >= 1.
        labels: Class labels ``(N,)``, integer, in ``0..K-1``.
        confidence: Confidence ``(N,)``, if it is not the largest probability.
        risk: Maximum error rate of the accepted rows, in ``[0, 1]``.

    Returns:
        The threshold with its risk and coverage; ``inf`` and coverage 0, with a warning, if every threshold exceeds
        the risk.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape is wrong, a value is invalid (the message names the first row), there are no rows, or
            ``risk`` is outside ``[0, 1]``.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        >>> operating_point(probs.log(), torch.tensor([0, 0, 0]), risk=0.1).threshold
        0.75
    """
    if labels.numel() == 0:
        raise ValueError("operating_point: there are no rows; give held-out rows with labels.")
    decision = decide(log_probs, confidence, 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coverage_at_risk")  # replaced by the warning below
        finite = log_probs.clamp_min(torch.finfo(log_probs.dtype).min)  # a class may have probability 0
        share = float(coverage_at_risk(finite, labels, risk=risk, confidence=decision.confidence))
    rows = len(labels)
    if math.isnan(share):
        warnings.warn(
            f"operating_point: no threshold accepts rows with a risk of at most {risk}, so the classifier always "
            "abstains. Allow a larger risk, or pass more rows.",
            stacklevel=2,
        )
        return OperatingPoint(math.inf, risk, math.nan, 0.0, rows)
    accepted = round(share * rows)
    ordered, order = decision.confidence.double().sort(descending=True)
    threshold = 0.0 if accepted == rows else float((ordered[accepted - 1] + ordered[accepted]) / 2)
    wrong = (decision.label != labels)[order[:accepted]].double()
    return OperatingPoint(threshold, risk, float(wrong.mean()), accepted / rows, rows)
