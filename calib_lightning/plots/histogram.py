"""The distribution of the confidence of correct and of wrong predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from calib_lightning.metrics.functional.bins import check_n_bins
from calib_lightning.metrics.functional.ordered import Ordered
from calib_lightning.plots.style import (
    DARK,
    LIGHT,
    FloatArray,
    empty_figure,
    finish_axes,
    finish_figure,
    groups_with_rows,
    new_figure,
    percent,
)

_HEIGHT = 3.6
_LOWEST, _HIGHEST = -10.0, 20.0
_FILLS: dict[str, dict[str, Any]] = {
    "correct": {"facecolor": LIGHT, "edgecolor": "#1f78b4"},
    "wrong": {"facecolor": "none", "edgecolor": DARK, "hatch": "/////"},
}
_LINES: dict[str, dict[str, Any]] = {
    "correct": {"color": "#1f78b4", "linestyle": "-", "linewidth": 1.0},
    "wrong": {"color": DARK, "linestyle": "--", "linewidth": 1.0},
}


def confidence_histogram(ordered: Ordered, *, n_bins: int = 20, title: str | None = None) -> Figure:
    """Draw the distribution of the confidence of correct and of wrong predictions, each as shares of its group.

    Two panels show the same rows: bins of equal width in the confidence, with the means of both groups, and bins of
    equal width in its log-odds, ``log c - log(1 - c)``, which separate the values near 1 of an over-confident network.
    A group of ``ordered`` is drawn at its mean confidence, so exact rows and histograms both work. Bins are
    ``(lo, hi]``; log-odds below -10 or above 20 count in the outermost bins.

    Args:
        ordered: Groups ``(G,)`` of rows in ascending order of the score, from
            `calib_lightning.metrics.functional.ordered.order_rows`.
        n_bins: Number of bins of each panel.
        title: Title of the figure, such as method and data; the number of rows follows.

    Returns:
        A figure of 3.3 x 3.6 inches; without rows it says so.

    Raises:
        ValueError: ``n_bins`` < 1, or ``ordered`` is not one set.

    Example:
        >>> import torch
        >>> from calib_lightning.metrics.functional.ordered import order_rows
        >>> figure = confidence_histogram(order_rows(torch.tensor([0.0, 2.0]), torch.tensor([False, True])))
        >>> figure.axes[0].get_title(loc="left")
        'accuracy 50.00 %'
    """
    check_n_bins(n_bins)
    count, correct, confidence = (field.numpy() for field in groups_with_rows(ordered, "confidence_histogram"))
    if len(count) == 0:
        return empty_figure(_HEIGHT, title)
    mean = np.minimum(confidence / count, 1.0)
    with np.errstate(divide="ignore"):
        log_odds = np.log(mean) - np.log1p(-mean)
    weights = {"correct": correct, "wrong": count - correct}

    figure = new_figure(_HEIGHT, title, count.sum())
    plain, logarithmic = figure.subplots(2, 1)
    _draw_groups(plain, mean, np.arange(n_bins + 1) / n_bins, weights)
    handles = _draw_means(plain, mean, weights)
    plain.set_xlim(0, 1)
    finish_axes(plain, "confidence", "share of group")

    low, high = _range_of_log_odds(log_odds)
    _draw_groups(logarithmic, log_odds, np.linspace(low, high, n_bins + 1), weights)
    ticks = _confidence_ticks(low, high)
    logarithmic.set_xlim(low, high)
    logarithmic.set_xticks(list(ticks), list(ticks.values()))
    finish_axes(logarithmic, "confidence, log-odds scale", "share of group")

    finish_figure(figure, f"accuracy {percent(correct.sum() / count.sum())}", handles)
    return figure


def _draw_groups(axes: Axes, values: FloatArray, edges: FloatArray, weights: dict[str, FloatArray]) -> None:
    index = np.searchsorted(edges[1:-1], values, side="left")
    for label, weight in weights.items():
        if weight.sum() > 0:
            share = np.bincount(index, weights=weight, minlength=len(edges) - 1) / weight.sum()
            axes.stairs(share, edges, fill=True, linewidth=0.8, label=label, **_FILLS[label])


def _draw_means(axes: Axes, mean: FloatArray, weights: dict[str, FloatArray]) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = []
    for label, weight in weights.items():
        handles.append(Patch(**_FILLS[label], linewidth=0.8, label=f"{label}: {weight.sum():,.0f} rows"))
        if weight.sum() > 0:
            at = float(weight @ mean / weight.sum())
            axes.axvline(at, **_LINES[label], label=f"mean of {label}")
            handles.append(Line2D([], [], **_LINES[label], label=f"mean {at:.3f}"))
    return handles


def _range_of_log_odds(log_odds: FloatArray) -> tuple[float, float]:
    inside = np.clip(log_odds, _LOWEST, _HIGHEST)
    low, high = float(np.floor(inside.min())), float(np.ceil(inside.max()))
    return low, max(high, low + 1)


def _confidence_ticks(low: float, high: float) -> dict[float, str]:
    # Only a few fit on the axis: for a wide range every second power of ten.
    step = 1 if high - low <= 12 else 2
    ticks = {0.0: "0.5"}
    for power in range(1, 10, step):
        at = float(np.log(10.0**power - 1))
        ticks[at] = f"{1 - 10.0**-power:.{power}f}" if power <= 3 else f"$1-10^{{-{power}}}$"
        ticks[-at] = f"{10.0**-power:.{power}f}" if power <= 3 else f"$10^{{-{power}}}$"
    return {at: text for at, text in sorted(ticks.items()) if low <= at <= high}
