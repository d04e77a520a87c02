"""Calibration errors as metrics."""

from __future__ import annotations

from typing import Any

from calib_lightning.metrics.state import SingleMetric
from calib_lightning.metrics.table import METRICS, MetricRow


class ExpectedCalibrationError(SingleMetric):
    """Expected calibration error of the predicted class (Guo et al., 2017); see `functional.ece`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = ExpectedCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.4
    """

    key = "ece"


class MaximumCalibrationError(SingleMetric):
    """Largest gap of a bin (Guo et al., 2017); see `functional.mce`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = MaximumCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.7
    """

    key = "mce"


class RootMeanSquaredCalibrationError(SingleMetric):
    """Root of the mean squared gap over bins; see `functional.rmsce`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = RootMeanSquaredCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.5
    """

    key = "rmsce"


class OverconfidenceError(SingleMetric):
    """Gaps of over-confident bins, weighted by confidence (Thulasidasan et al., 2019).

    See `functional.overconfidence_error`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = OverconfidenceError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.245
    """

    key = "overconfidence_error"


class OverCalibrationError(SingleMetric):
    """The over-confident part of the expected calibration error; see `functional.over_ece`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = OverCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.35
    """

    key = "over_ece"


class UnderCalibrationError(SingleMetric):
    """The under-confident part of the expected calibration error; see `functional.under_ece`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = UnderCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.05
    """

    key = "under_ece"


class SignedGap(SingleMetric):
    """Mean confidence minus accuracy; see `functional.signed_gap`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = SignedGap(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.3
    """

    key = "signed_gap"


class ClasswiseCalibrationError(SingleMetric):
    """Static calibration error: mean over all K classes (Nixon et al., 2019); see `functional.classwise_ece`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = ClasswiseCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.4
    """

    key = "classwise_ece"


class KolmogorovSmirnovError(SingleMetric):
    """Largest gap of the cumulative sums over confidence (Gupta et al., 2021); see `functional.ks`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = KolmogorovSmirnovError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.35
    """

    key = "ks"


class DebiasedL2Error(SingleMetric):
    """Debiased L2 calibration error over equal-mass bins (Kumar et al., 2019); see `functional.debiased_l2`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = DebiasedL2Error(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.0
    """

    key = "debiased_l2"


class SmoothCalibrationError(SingleMetric):
    """Calibration error by kernel smoothing, without bins (Blasiok and Nakkiran, 2023); see `functional.smece`.

    The arguments are those of `SingleMetric`.

    Example:
        >>> metric = SmoothCalibrationError(input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.3
    """

    key = "smece"


class AdaptiveCalibrationError(SingleMetric):
    """Calibration error over bins of equally many rows; see `functional.aece_split` and `functional.aece_official`.

    Args:
        convention: ``"split"`` cuts the sorted rows into M parts that differ by at most one row; ``"official"`` is the
            convention of most published results, which leaves out the least confident row.
        **kwargs: Arguments of `SingleMetric`.

    Raises:
        ValueError: An unknown convention.

    Example:
        >>> metric = AdaptiveCalibrationError(n_bins=2, input="probs")
        >>> metric.update(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 4)
        0.4
    """

    key = "aece_split"

    def __init__(self, convention: str = "split", **kwargs: Any) -> None:
        if convention not in ("split", "official"):
            raise ValueError(f"convention is {convention!r}; it must be 'split' or 'official'.")
        self.convention = convention
        super().__init__(**kwargs)

    @property
    def row(self) -> MetricRow:
        """The row of the chosen convention."""
        return METRICS[f"aece_{self.convention}"]

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the value must know."""
        return super().settings | {"convention": self.convention}
