"""Curves of metrics over the severity of corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from calib_lightning.metrics import METRICS
from calib_lightning.plots.style import LIGHT, finish_axes, finish_figure, new_figure

SHOWN = ("accuracy", "ece", "nll", "correctness_auroc")
"""The metrics of `robustness_curves`, if nothing else is asked for."""
_HEIGHT = 4.0


def robustness_curves(
    values: Mapping[int, Sequence[Mapping[str, float]]],
    *,
    metrics: Sequence[str] = SHOWN,
    title: str | None = None,
    rows: int | None = None,
) -> Figure:
    """Draw metrics over the severity of corruptions (Hendrycks and Dietterich, ICLR 2019), a panel for each.

    The line is the mean over the corruptions of a severity, with equal weights; half of the corruptions lie between
    the quartiles, and all in the range. Severity 0 is the test set without corruption.

    Args:
        values: By severity, the values of each corruption by key; fractions.
        metrics: Keys of `calib_lightning.metrics.METRICS`, at most four.
        title: Title of the figure, such as method and data.
        rows: Number of rows of a set, for the title.

    Returns:
        A figure of 3.3 inches width, with two panels in a row.

    Raises:
        ValueError: ``values`` is empty, or a metric is unknown or missing.

    Example:
        >>> clean, corrupted = [{"ece": 0.02}], [{"ece": 0.05}, {"ece": 0.1}]
        >>> figure = robustness_curves({0: clean, 1: corrupted}, metrics=("ece",))
        >>> figure.axes[0].get_ylabel()
        'ECE %'
    """
    severities = sorted(values)
    if not severities or not all(values.values()):
        raise ValueError("values is empty, or a severity has no sets; each severity must have at least one.")
    for key in metrics:
        missing = [severity for severity in severities if any(key not in found for found in values[severity])]
        if key not in METRICS or missing:
            where = f", missing at severity {missing[0]}" if missing else ""
            raise ValueError(f"metrics has {key!r}{where}; it must be a metric that every set has.")
    lines = (len(metrics) + 1) // 2
    figure = new_figure(_HEIGHT * lines / 2, title, rows)
    panels = iter(figure.subplots(lines, min(2, len(metrics)), squeeze=False).flat)
    handles: list[Artist] = []
    for key, axes in zip(metrics, panels, strict=False):
        row = METRICS[key]
        scale = 100 if row.percent else 1
        found = [scale * np.array([own[key] for own in values[severity]]) for severity in severities]
        handles = axes.plot(
            severities, [each.mean() for each in found], "ko-", linewidth=1.2, markersize=2.5, label="mean"
        )
        for label, low, high, colour in (("quartiles", 25, 75, LIGHT), ("range", 0, 100, "#e0e0e0")):
            bands = np.array([np.percentile(each, (low, high)) for each in found]).T
            order = 1.0 - high / 1000  # the wider band below
            handles.append(axes.fill_between(severities, *bands, color=colour, linewidth=0, label=label, zorder=order))
        finish_axes(axes, "severity", row.title)
        axes.set_xticks(severities)
    for axes in panels:
        axes.set_axis_off()  # the place of a fourth panel
    count = max(len(each) for each in values.values())
    finish_figure(
        figure, f"{count} corruption{'s'[: count > 1]}" + (", 0: whole test set" if 0 in values else ""), handles
    )
    return figure
