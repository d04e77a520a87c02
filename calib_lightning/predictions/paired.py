"""How far a change of accuracy or correctness AUROC on the same rows may be chance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.predictions.reading import Predictions

_Z = 1.959963984540054


class Change(NamedTuple):
    """The 95 % interval of a change."""

    low: float
    high: float


def changes(before: Predictions, after: Predictions) -> dict[str, Change]:
    """95 % intervals of the changes of accuracy and correctness AUROC, paired over rows.

    ``d ± 1.96 s / sqrt(N)``, with s the standard deviation over rows of the difference of their influences. For the
    AUROC that is the test of DeLong et al. (1988), here also where a calibrator changes which rows are right. nan
    where all rows are right or all wrong.
    """
    old, new = (Rows(found.scores, found.labels, found.confidence, found.input) for found in (before, after))
    accuracy = [rows.correct.double() for rows in (old, new)]
    auroc = [auroc_influence(rows.log_odds, rows.correct) for rows in (old, new)]
    return {key: _change(*pair) for key, pair in {"accuracy": accuracy, "correctness_auroc": auroc}.items()}


def auroc_influence(confidence: Tensor, correct: Tensor) -> Tensor:
    """Influences of rows on the correctness AUROC, ``(N,)`` float64, shifted so that their mean is the AUROC.

    ``A + (F_0(c) - A) / P(right)`` of a right row and ``A + (1 - F_1(c) - A) / P(wrong)`` of a wrong one, where F_0 and
    F_1 are the distributions of the confidence of wrong and right rows, with half of the ties.
    """
    right = correct.bool()
    placed = torch.empty(len(confidence), dtype=torch.float64)
    for own, sign in ((right, 1.0), (~right, -1.0)):
        others, c = confidence[~own].sort().values, confidence[own].contiguous()
        below = torch.searchsorted(others, c) + torch.searchsorted(others, c, right=True)
        share = below.double() / (2.0 * max(len(others), 1))
        placed[own] = share if sign > 0 else 1.0 - share
    area = placed[right].mean()
    rate = torch.where(right, right.double().mean(), (~right).double().mean())
    return area + (placed - area) / rate if bool(right.any() and (~right).any()) else placed * torch.nan


def _change(old: Tensor, new: Tensor) -> Change:
    difference = new - old
    middle, reach = difference.mean(), _Z * difference.std() / len(difference) ** 0.5
    return Change(float(middle - reach), float(middle + reach))
