"""Metrics of several terms: decompositions and diagnostics."""

from __future__ import annotations

from typing import Any, ClassVar

from calib_lightning.metrics.functional.checks import InputKind
from calib_lightning.metrics.state import EvaluationState, SingleMetric


class TermsMetric(EvaluationState):
    """A metric whose value is a dictionary of terms.

    Subclasses set ``keys``, keys of `METRICS`.

    Args:
        n_bins: Number of bins of the calibration errors.
        rank_bins: Size of the histogram of log-odds for ranking metrics; ``None`` keeps every row.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    keys: ClassVar[tuple[str, ...]]

    def __init__(
        self, n_bins: int = 15, rank_bins: int | None = None, input: InputKind = "logits", **kwargs: Any
    ) -> None:
        super().__init__(self.keys, n_bins, rank_bins, input=input, **kwargs)


class MurphyDecomposition(TermsMetric):
    """Reliability, resolution and uncertainty of the binned top-label Brier score (Murphy, 1973).

    See `functional.murphy_decomposition`.

    The arguments are those of `TermsMetric`.

    Example:
        >>> metric = MurphyDecomposition(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'murphy_reliability': 0.225, 'murphy_resolution': 0.188, 'murphy_uncertainty': 0.188}
    """

    keys = ("murphy_reliability", "murphy_resolution", "murphy_uncertainty")


class CORPDecomposition(TermsMetric):
    """Miscalibration, discrimination and uncertainty by isotonic regression (Dimitriadis et al., 2021).

    See `functional.corp_decomposition`.

    The arguments are those of `TermsMetric`.

    Example:
        >>> metric = CORPDecomposition(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'corp_miscalibration': 0.058, 'corp_discrimination': 0.021, 'corp_uncertainty': 0.188}
    """

    keys = ("corp_miscalibration", "corp_discrimination", "corp_uncertainty")


class DarkSideTerms(TermsMetric):
    """The terms of eq. 9 of "On the Dark Side of Calibration"; diagnostics, see `functional.dark_side_terms`.

    The arguments are those of `TermsMetric`.

    Example:
        >>> metric = DarkSideTerms(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'dark_side_alpha': 0.75, 'dark_side_beta': 0.125, 'dark_side_gamma': 0.312, 'dark_side_residual': 0.088}
    """

    keys = ("dark_side_alpha", "dark_side_beta", "dark_side_gamma", "dark_side_residual")


class DarkSideAssumption(SingleMetric):
    """Share of 100 bins with accuracy at most confidence; see `functional.dark_side_assumption`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = DarkSideAssumption(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> round(float(metric.compute()), 3)
        0.25
    """

    key = "dark_side_assumption"


class VariationalSplit(TermsMetric):
    """Negative log-likelihood split into calibration and refinement (Berta et al., 2025).

    It keeps all K scores per row; see `functional.variational_split`.

    The arguments are those of `TermsMetric`.

    Example:
        >>> metric = VariationalSplit(input="probs")
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        >>> metric.update(probs, torch.tensor([0, 1, 0, 0]))
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'calibration_nll': 0.021, 'refinement_nll': 0.624}
    """

    keys = ("calibration_nll", "refinement_nll")
