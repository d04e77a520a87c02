"""How well the confidence ranks correct above wrong predictions, as metrics."""

from __future__ import annotations

from typing import Any

from calib_lightning.metrics.state import SingleMetric
from calib_lightning.metrics.table import MetricRow, coverage_at_risk_of, excess_aurc_of, risk_at_coverage_of


class CorrectnessAUROC(SingleMetric):
    """Area under the ROC curve of "the prediction is correct"; see `functional.correctness_auroc`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = CorrectnessAUROC(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.3333
    """

    key = "correctness_auroc"


class AUPRSuccess(SingleMetric):
    """Average precision with correct predictions as positives; see `functional.aupr_success`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = AUPRSuccess(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.8056
    """

    key = "aupr_success"


class AUPRError(SingleMetric):
    """Average precision with wrong predictions as positives; see `functional.aupr_error`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = AUPRError(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.3333
    """

    key = "aupr_error"


class FPR95(SingleMetric):
    """Share of wrong predictions above the threshold that 95 % of the correct ones pass; see `functional.fpr95`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = FPR95(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        1.0
    """

    key = "fpr95"


class AURC(SingleMetric):
    """Area under the risk-coverage curve (Geifman and El-Yaniv, 2017); see `functional.aurc`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = AURC(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.2708
    """

    key = "aurc"


class AUGRC(SingleMetric):
    """Area under the generalised risk-coverage curve (Traub et al., 2024); see `functional.augrc`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = AUGRC(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.1875
    """

    key = "augrc"


class OvOAUROC(SingleMetric):
    """One-versus-one AUROC of the classes (Hand and Till, 2001).

    It keeps all K scores per row; see `functional.ovo_auroc`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = OvOAUROC(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.3333
    """

    key = "ovo_auroc"


class ExcessAURC(SingleMetric):
    """AURC minus that of a perfect ranking (Geifman et al., 2019); see `functional.e_aurc`.

    Args:
        exact: Whether to subtract the optimum for this number of rows instead of its limit.
        **kwargs: Arguments of `SingleMetric`.

    Example:
        >>> metric = ExcessAURC(exact=False, input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.2366
    """

    key = "e_aurc"

    def __init__(self, exact: bool = False, **kwargs: Any) -> None:
        self.exact = exact
        super().__init__(**kwargs)

    @property
    def row(self) -> MetricRow:
        """The row for this optimum."""
        return excess_aurc_of(self.exact)

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the value must know."""
        return super().settings | {"exact": self.exact}


class CoverageAtRisk(SingleMetric):
    """Largest share of rows that can be accepted at an error rate; see `functional.coverage_at_risk`.

    Args:
        risk: The allowed error rate, a fraction.
        **kwargs: Arguments of `SingleMetric`.

    Raises:
        ValueError: ``risk`` is not in [0, 1].

    Example:
        >>> metric = CoverageAtRisk(risk=0.05, input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.25
    """

    key = "coverage_at_risk_0.05"

    def __init__(self, risk: float = 0.05, **kwargs: Any) -> None:
        if not 0.0 <= risk <= 1.0:
            raise ValueError(f"risk is {risk!r}; it must be in [0, 1].")
        self.risk = risk
        super().__init__(**kwargs)

    @property
    def row(self) -> MetricRow:
        """The row for this risk."""
        return coverage_at_risk_of(self.risk)

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the value must know."""
        return super().settings | {"risk": self.risk}


class RiskAtCoverage(SingleMetric):
    """Error rate of the most confident share of the rows; see `functional.risk_at_coverage`.

    Args:
        coverage: Share of the rows to accept, a fraction.
        **kwargs: Arguments of `SingleMetric`.

    Raises:
        ValueError: ``coverage`` is not in (0, 1].

    Example:
        >>> metric = RiskAtCoverage(coverage=0.8, input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 4)
        0.25
    """

    key = "risk_at_coverage_0.8"

    def __init__(self, coverage: float = 0.8, **kwargs: Any) -> None:
        if not 0.0 < coverage <= 1.0:
            raise ValueError(f"coverage is {coverage!r}; it must be in (0, 1].")
        self.coverage = coverage
        super().__init__(**kwargs)

    @property
    def row(self) -> MetricRow:
        """The row for this coverage."""
        return risk_at_coverage_of(self.coverage)

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the value must know."""
        return super().settings | {"coverage": self.coverage}
