"""The reliability diagram, and the interval of an observed share."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from calib_lightning.metrics.functional.calibration import ece_from_bins
from calib_lightning.metrics.functional.rows import PROBS_TOLERANCE
from calib_lightning.plots.style import (
    DARK,
    GREY,
    LIGHT,
    empty_figure,
    finish_axes,
    finish_figure,
    new_figure,
    percent,
)

_HEIGHT = 4.0
_OVER: dict[str, Any] = {"facecolor": "#fcbba1", "edgecolor": DARK, "hatch": "/////"}
_UNDER: dict[str, Any] = {"facecolor": "white", "edgecolor": "#08519c", "hatch": "....."}
_LOG_FROM_RATIO = 20.0
# Sums of weights may differ in the last digits.
_ROUNDING = 1 + 1e-9


def wilson_interval(hits: Tensor, count: Tensor, level: float = 0.95) -> Tensor:
    """Interval of a share from the number of hits (Wilson, 1927), which stays in [0, 1] also for few rows.

    With ``p = hits / count`` and z the normal quantile of ``(1 + level) / 2``, its ends are
    ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``.

    Args:
        hits: Number of hits ``(...)``, in ``0..count``.
        count: Number of trials ``(...)``.
        level: The share of intervals that hold the true value, in (0, 1).

    Returns:
        ``(..., 2)`` float64: the lower and the upper ends; nan without trials.

    Raises:
        ValueError: ``level`` is not in (0, 1), or there are more hits than trials.

    Example:
        >>> wilson_interval(torch.tensor([5.0]), torch.tensor([10.0]))
        tensor([[0.2366, 0.7634]], dtype=torch.float64)
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: the level of an interval is a fraction in (0, 1), such as 0.95")
    hits, count = hits.double(), count.double()
    impossible = (hits < 0) | (hits > count * _ROUNDING)
    if bool(impossible.any()):
        raise ValueError(f"wilson_interval: hits {hits[impossible].tolist()[:3]} do not lie between 0 and count")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = (hits / count).clamp(max=1.0)
    centre = share + z**2 / (2 * count)
    half = z * torch.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # Rounding must not leave the share outside, nor an end outside [0, 1]: with no hits the lower end is 0.
    lower, upper = torch.minimum((centre - half) / scale, share), torch.maximum((centre + half) / scale, share)
    return torch.stack([lower, upper], dim=-1).clamp(0.0, 1.0)


def reliability_diagram(bins: Tensor, *, intervals: Tensor | None = None, title: str | None = None) -> Figure:
    """Draw the accuracy of each bin of confidence against its mean confidence (Niculescu-Mizil and Caruana, 2005).

    A bar is the accuracy of a bin, a hatched box the gap between it and the mean confidence, a dot stands at (mean
    confidence, accuracy) with the interval of the accuracy: a dot below the line of equality is over-confident. The
    panel below has the share of the rows in each bin, on a logarithmic scale where the shares differ 20-fold. Bins
    without rows are left out.

    Args:
        bins: ``(M, 3)`` float64 of `calib_lightning.metrics.functional.calibration.bin_sums`: count, sum of the
            confidences, sum of correct.
        intervals: ``(M, 2)`` lower and upper ends of each bin's accuracy, fractions, such as those of a bootstrap;
            ``None``: 95 % Wilson intervals.
        title: What stands above the figure.

    Returns:
        A figure of 3.3 x 4 inches; for a set without rows it says so.

    Raises:
        ValueError: A wrong shape, or values that are no sums of bins.

    Example:
        >>> figure = reliability_diagram(torch.tensor([[2.0, 0.5, 1.0], [2.0, 1.5, 1.0]], dtype=torch.float64))
        >>> figure.axes[0].get_title(loc="left")
        'ECE 25.00 % (2 bins)   gap +0.00 %   N 4'
    """
    sums = _checked_bins(bins)
    ends = wilson_interval(sums[:, 2], sums[:, 0]) if intervals is None else intervals.detach().cpu().double()
    if ends.shape != (len(sums), 2):
        raise ValueError(f"intervals must have shape ({len(sums)}, 2) to go with bins, got {tuple(ends.shape)}")
    total = float(sums[:, 0].sum())
    if total == 0:
        return empty_figure(_HEIGHT, title)

    width = 1 / len(sums)
    held = sums[:, 0].numpy() > 0
    centre = ((np.arange(len(sums)) + 0.5) * width)[held]
    count, confidence_sum, correct_sum = sums.numpy()[held].T
    confidence, accuracy = confidence_sum / count, correct_sum / count
    lower, upper = ends.numpy()[held].T

    figure = new_figure(_HEIGHT, title)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1.0])
    line, thick, dot = (0.6, 0.8, 2.0) if len(sums) <= 25 else (0.2, 0.4, 0.8)
    top.bar(centre, accuracy, width, facecolor=LIGHT, edgecolor="white", linewidth=line, label="accuracy")
    for label, style, where in (
        ("over-confident", _OVER, confidence > accuracy),
        ("under-confident", _UNDER, confidence < accuracy),
    ):
        gap, start = np.abs(confidence - accuracy)[where], np.minimum(confidence, accuracy)[where]
        top.bar(centre[where], gap, width, bottom=start, linewidth=line, label=label, **style)
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8, label="identity")
    top.vlines(confidence, lower, upper, color="black", linewidth=thick, clip_on=False, label="interval")
    top.plot(confidence, accuracy, "o", color="black", markersize=dot, clip_on=False, label="dots")
    top.set(xlim=(0, 1), ylim=(0, 1.02))
    finish_axes(top, "", "accuracy")

    share = count / total
    below.bar(centre, share, width, facecolor="#bdbdbd", edgecolor="white", linewidth=line, label="share")
    if share.max() > _LOG_FROM_RATIO * share.min():
        below.set_yscale("log")
        below.set_ylim(share.min() / 3, 2 * share.max())
    finish_axes(below, "confidence", "share of rows")
    figure.align_ylabels()

    gap = float((sums[:, 1] - sums[:, 2]).sum()) / total
    ece = percent(float(ece_from_bins(sums)))
    kind = "95 % interval" if intervals is None else "interval"
    handles = [
        Patch(facecolor=LIGHT, label="accuracy"),
        Patch(**_OVER, linewidth=line, label="over-confident"),
        Patch(**_UNDER, linewidth=line, label="under-confident"),
        Line2D([], [], color="black", marker="o", markersize=2, linewidth=0.8, label=kind),
        Line2D([], [], color=GREY, linestyle="--", linewidth=0.8, label="equality"),
    ]
    bins_text = f"{len(sums)} bin" + ("s" if len(sums) > 1 else "")
    finish_figure(figure, f"ECE {ece} ({bins_text})   gap {percent(gap, signed=True)}   N {total:,.0f}", handles)
    return figure


def _checked_bins(bins: Tensor) -> Tensor:
    if bins.ndim != 2 or bins.shape[1] != 3 or len(bins) < 1:
        raise ValueError(f"bins must have shape (M, 3) with M >= 1, got {tuple(bins.shape)}; make it with `bin_sums`")
    sums = bins.detach().cpu().double()
    # A given probability may exceed 1 by the tolerance of the sums of rows.
    most = sums[:, :1] * sums.new_tensor([1.0, 1 + PROBS_TOLERANCE, _ROUNDING])
    if not bool((sums.isfinite() & (sums >= 0) & (sums <= most)).all()):
        raise ValueError(
            "bins must hold count, sum of confidences and sum of correct of each bin, the sums in 0..count; "
            f"got {sums.tolist()[:3]} at its head"
        )
    return sums
