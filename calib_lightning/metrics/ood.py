"""How well a score tells in-distribution rows, the positive side, from others, as metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib_lightning.metrics import devices
from calib_lightning.metrics.functional.checks import FAULTS
from calib_lightning.metrics.functional.ood import check_ood_shapes, check_ood_values, why_one_sided
from calib_lightning.metrics.functional.undefined import warn_undefined
from calib_lightning.metrics.row_metric import RowMetric
from calib_lightning.metrics.table import OOD
from calib_lightning.metrics.view import StateView


class OODMetric(RowMetric):
    """Base of the metrics of a score that is higher for in-distribution rows; it keeps 5 bytes per row (9 for float64).

    Args:
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    key: ClassVar[str]
    rank_scores: list[Tensor]
    rank_correct: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("ranks",), **kwargs)

    def update(self, scores: Tensor, is_id: Tensor) -> None:  # type: ignore[override]
        """Add a batch; a batch of no rows is fine.

        Args:
            scores: ``(N,)``, floating point, higher for in-distribution rows; infinite scores are allowed.
            is_id: ``(N,)`` bool, true for in-distribution rows.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, or (on the CPU) a score that is NaN.
        """
        batch = self._update_count + (self._count_before_forward or 0)
        where = f"{type(self).__name__}, batch {batch}"
        check_ood_shapes(scores, is_id, where)
        if not devices.has_float64(scores.device):
            scores, is_id = scores.cpu(), is_id.cpu()
        if devices.checks_at_once(scores.device):
            check_ood_values(scores, where)
        else:
            wrong = scores.isnan()
            self._count_faults(torch.stack([wrong, torch.zeros_like(wrong), torch.zeros_like(wrong)]), batch)
        self.count = self.count + len(scores)
        wide = scores.detach().to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
        self.append_rows("rank_scores", wide)
        self.append_rows("rank_correct", is_id)

    def forward(self, scores: Tensor, is_id: Tensor) -> Any:  # type: ignore[override]
        """Add a batch and return the metric of that batch alone.

        Args:
            scores: As in `update`.
            is_id: As in `update`.

        Returns:
            What `compute` would return if this were the only batch.

        Raises:
            TypeError: As in `update`.
            ValueError: As in `update`.
        """
        return self._forward_once(scores, is_id)

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the value must know."""
        return {"rows": int(self.count), "ranking": "exact", "positive": "in-distribution"}

    def extra_repr(self) -> str:
        """Empty: nothing can be set."""
        return ""

    @property
    def _validity(self) -> tuple[tuple[str, ...], str]:
        """The kind of faults, and what is allowed."""
        return ("scores", *FAULTS[1:]), "scores must not be NaN (inf is allowed)"

    def compute(self) -> Tensor:
        """Compute the metric.

        Returns:
            0-d float64; nan, with a warning, unless there are rows of both kinds.

        Raises:
            ValueError: Batches on a device held scores that are NaN.
        """
        return self._values([self.key])[self.key]

    def _values(self, keys: Iterable[str]) -> dict[str, Tensor]:
        self.check_faults()
        rows, inside = int(self.count), int(self.rows_of("rank_correct").sum())
        if inside not in (0, rows):
            view = StateView(self)
            return {key: OOD[key].value(view) for key in keys}
        if self.update_called:
            warn_undefined(type(self).__name__, (), why_one_sided(rows, inside), stacklevel=4)
        return {key: torch.full((), torch.nan, dtype=torch.float64) for key in keys}


class OODAUROC(OODMetric):
    """Area under the ROC curve of "the row is in-distribution"; see `functional.ood_auroc`.

    Example:
        >>> metric = OODAUROC()
        >>> metric.update(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        >>> round(float(metric.compute()), 4)
        0.5
    """

    key = "ood_auroc"
    higher_is_better = True


class OODAUPR(OODMetric):
    """Average precision with in-distribution rows as positives; see `functional.ood_aupr`.

    Example:
        >>> metric = OODAUPR()
        >>> metric.update(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        >>> round(float(metric.compute()), 4)
        0.8333
    """

    key = "ood_aupr"
    higher_is_better = True


class OODAUPROut(OODMetric):
    """Average precision with out-of-distribution rows as positives; see `functional.ood_aupr_out`.

    Example:
        >>> metric = OODAUPROut()
        >>> metric.update(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        >>> round(float(metric.compute()), 4)
        0.5
    """

    key = "ood_aupr_out"
    higher_is_better = True


class OODFPR95(OODMetric):
    """Share of other rows above the threshold that 95 % of the in-distribution rows pass; see `functional.ood_fpr95`.

    Example:
        >>> metric = OODFPR95()
        >>> metric.update(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        >>> round(float(metric.compute()), 4)
        1.0
    """

    key = "ood_fpr95"
    higher_is_better = False


class OODDetection(OODMetric):
    """All values of `OOD` of one pair of sets: AUROC, AUPR in both directions and FPR95.

    Example:
        >>> metric = OODDetection()
        >>> metric.update(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        >>> {key: round(float(value), 2) for key, value in metric.compute().items()}
        {'ood_auroc': 0.5, 'ood_aupr': 0.83, 'ood_aupr_out': 0.5, 'ood_fpr95': 1.0}
    """

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the metrics.

        Returns:
            0-d float64 by key; nan, with one warning, unless there are rows of both kinds.

        Raises:
            ValueError: Batches on a device held scores that are NaN.
        """
        return self._values(OOD)
