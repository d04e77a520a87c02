"""The reliability diagram, and the interval of an observed accuracy."""

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
from calib_lightning.metrics.functional.checks import PROBS_TOLERANCE
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
_ACCURACY: dict[str, Any] = {"facecolor": LIGHT, "edgecolor": "#1f78b4"}
_FEW: dict[str, Any] = {"facecolor": "white", "edgecolor": "#1f78b4", "linestyle": "--"}
_FEW_ROWS = 20
"""Below it the 95 % interval of an accuracy of one half is more than 0.4 wide."""
_FEW_LABEL = f"accuracy, < {_FEW_ROWS} rows"
_BAR = 0.58
"""Part of a bin's width that the bar of its accuracy takes; the gap has the rest."""
_LOG_FROM_RATIO = 20.0
# Sums of weights may differ in the last digits.
_ROUNDING = 1 + 1e-9


def wilson_interval(correct: Tensor, count: Tensor, level: float = 0.95) -> Tensor:
    """Interval of an accuracy from the number of correct rows (Wilson, 1927), within [0, 1] even for few rows.

    With ``p = correct / count`` and z the normal quantile of ``(1 + level) / 2``, its ends are
    ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``.

    Args:
        correct: Number of correct rows ``(...)``, in ``0..count``.
        count: Number of rows ``(...)``.
        level: The share of intervals that contain the true value, in (0, 1).

    Returns:
        ``(..., 2)`` float64: the lower and the upper ends; nan without rows.

    Raises:
        ValueError: ``level`` is not in (0, 1), or ``correct`` is not in ``0..count``.

    Example:
        >>> wilson_interval(torch.tensor([5.0]), torch.tensor([10.0]))
        tensor([[0.2366, 0.7634]], dtype=torch.float64)
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; it must be a fraction in (0, 1), such as 0.95.")
    correct, count = correct.double(), count.double()
    impossible = (correct < 0) | (correct > count * _ROUNDING)
    if bool(impossible.any()):
        raise ValueError(f"correct is {correct[impossible].tolist()[:3]}; it must be in 0..count.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = (correct / count).clamp(max=1.0)
    centre = share + z**2 / (2 * count)
    half = z * torch.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    # Rounding must not move the share out of the interval, nor an end out of [0, 1].
    lower, upper = torch.minimum((centre - half) / scale, share), torch.maximum((centre + half) / scale, share)
    return torch.stack([lower, upper], dim=-1).clamp(0.0, 1.0)


def reliability_diagram(bins: Tensor, *, intervals: Tensor | None = None, title: str | None = None) -> Figure:
    """Draw the accuracy of each bin of confidence against its mean confidence (Niculescu-Mizil and Caruana, 2005).

    In each bin the bar on the left is the accuracy, and the hatched box on the right the gap from it to the mean
    confidence. A dot marks (mean confidence, accuracy) with the interval of the accuracy: a dot below the diagonal is
    over-confident. The panel below shows the share of the rows in each bin, on a logarithmic scale if the shares differ
    20-fold. Empty bins are left out. A bin of fewer than 20 rows has a hollow bar and dot; a set with fewer than 20
    rows for each bin is said to be small, as its ECE tends to be too high.

    Args:
        bins: ``(M, 3)`` float64 from `calib_lightning.metrics.functional.calibration.bin_sums`: count, sum of the
            confidences, number of correct rows.
        intervals: ``(M, 2)`` lower and upper ends of the accuracy of each bin, fractions, for example of a bootstrap;
            ``None``: 95 % Wilson intervals.
        title: Title of the figure, such as method and data; the number of rows follows.

    Returns:
        A figure of 3.3 x 4 inches; without rows it says so.

    Raises:
        ValueError: A wrong shape, or values that are not sums of bins.

    Example:
        >>> figure = reliability_diagram(torch.tensor([[20, 5.0, 10.0], [20, 15.0, 10.0]], dtype=torch.float64))
        >>> figure.axes[0].get_title(loc="left")
        'ECE 25.00 % (2 bins)   gap +0.00 %'
    """
    sums = _checked_bins(bins)
    ends = wilson_interval(sums[:, 2], sums[:, 0]) if intervals is None else intervals.detach().cpu().double()
    if ends.shape != (len(sums), 2):
        raise ValueError(f"intervals has shape {tuple(ends.shape)}; it must have shape ({len(sums)}, 2) to match bins.")
    total = float(sums[:, 0].sum())
    if total == 0:
        return empty_figure(_HEIGHT, title)

    width = 1 / len(sums)
    held = sums[:, 0].numpy() > 0
    centre = ((np.arange(len(sums)) + 0.5) * width)[held]
    count, confidence_sum, correct_sum = sums.numpy()[held].T
    confidence, accuracy = confidence_sum / count, correct_sum / count
    lower, upper = ends.numpy()[held].T

    figure = new_figure(_HEIGHT, title, total)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1.0])
    line, thick, dot = (0.6, 0.8, 2.2) if len(sums) <= 25 else (0.2, 0.4, 0.8)
    left, few = centre - width / 2, count < _FEW_ROWS
    for label, style, where in (("accuracy", _ACCURACY, ~few), (_FEW_LABEL, _FEW, few)):
        top.bar(left[where], accuracy[where], _BAR * width, align="edge", linewidth=line, label=label, **style)
    for label, style, where in (
        ("over-confident", _OVER, confidence > accuracy),
        ("under-confident", _UNDER, confidence < accuracy),
    ):
        gap, start = np.abs(confidence - accuracy)[where], np.minimum(confidence, accuracy)[where]
        beside, rest = left[where] + _BAR * width, (1 - _BAR) * width
        top.bar(beside, gap, rest, bottom=start, align="edge", linewidth=line, label=label, **style)
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8, label="identity")
    top.vlines(confidence, lower, upper, color="black", linewidth=thick, clip_on=False, label="interval")
    for label, inside, where in (("dots", "black", ~few), ("hollow dots", "white", few)):
        if where.any():  # a line without points would disturb the layout
            top.plot(
                confidence[where], accuracy[where], "o", color="black", markerfacecolor=inside, markeredgewidth=0.6,
                markersize=dot, clip_on=False, label=label,
            )  # fmt: skip
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
        Patch(**_ACCURACY, linewidth=line, label="accuracy"),
        *([Patch(**_FEW, linewidth=line, label=_FEW_LABEL)] if few.any() else []),
        Patch(**_OVER, linewidth=line, label="gap: over-confident"),
        Patch(**_UNDER, linewidth=line, label="gap: under-confident"),
        Line2D([], [], color="black", marker="o", markersize=2, linewidth=0.8, label=kind),
        Line2D([], [], color=GREY, linestyle="--", linewidth=0.8, label="equality"),
    ]
    bins_text = f"{len(sums)} bin" + ("s" if len(sums) > 1 else "")
    small = "\nfew rows: the ECE tends to be too high" if total < _FEW_ROWS * len(sums) else ""
    finish_figure(figure, f"ECE {ece} ({bins_text})   gap {percent(gap, signed=True)}{small}", handles)
    return figure


def _checked_bins(bins: Tensor) -> Tensor:
    """The bins as float64 on the CPU, if they are sums of bins."""
    if bins.ndim != 2 or bins.shape[1] != 3 or len(bins) < 1:
        raise ValueError(f"bins has shape {tuple(bins.shape)}; it must have shape (M, 3) with M >= 1. Use `bin_sums`.")
    sums = bins.detach().cpu().double()
    # A given probability may exceed 1 by the tolerance for sums of rows.
    most = sums[:, :1] * sums.new_tensor([1.0, 1 + PROBS_TOLERANCE, _ROUNDING])
    if not bool((sums.isfinite() & (sums >= 0) & (sums <= most)).all()):
        raise ValueError(
            f"bins begins with {sums.tolist()[:3]}; it must hold count, sum of the confidences and number of correct "
            "rows of each bin, both in 0..count. Use `bin_sums`."
        )
    return sums
