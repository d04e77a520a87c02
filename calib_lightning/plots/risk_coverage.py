"""The risk-coverage curve of selective prediction."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from calib_lightning.metrics.functional.ordered import Ordered
from calib_lightning.metrics.functional.selective import aurc_from_ordered, e_aurc_from_ordered
from calib_lightning.plots.style import (
    GREY,
    FloatArray,
    empty_figure,
    finish_axes,
    finish_figure,
    groups_with_rows,
    new_figure,
    percent,
)

_HEIGHT = 3.0
_CELLS = 499
_SETTLED = 0.02


def risk_coverage_curve(ordered: Ordered, *, title: str | None = None) -> Figure:
    """Draw the error rate of the most confident rows over their share (Geifman and El-Yaniv, 2017).

    At coverage x the share x of the rows with the highest scores is accepted, and the risk is the share of wrong
    predictions among them, at the ends of groups of equal scores. Below it is the optimum, ``max(0, 1 - a / x)`` with
    accuracy a, of a score that ranks all wrong predictions last; the grey area between them is the cost of the ranking.
    The two areas under the curves are the AURC of these rows and of the optimum, expected over the orders of tied rows.

    Curves of more than 2000 groups are thinned without a visible change: in each of 499 equal parts of the coverage the
    first, the lowest, the highest and the last point are kept. The risk axis ends slightly above the highest risk at a
    coverage of 2 % or more, so that the jumps of the first few rows do not set the scale.

    Args:
        ordered: Groups ``(G,)`` of rows in ascending order of the score, from
            `calib_lightning.metrics.functional.ordered.order_rows`.
        title: Title of the figure, such as method and data; the number of rows follows.

    Returns:
        A figure of 3.3 x 3 inches; without rows it says so.

    Raises:
        ValueError: ``ordered`` is not one set.

    Example:
        >>> import torch
        >>> from calib_lightning.metrics.functional.ordered import order_rows
        >>> figure = risk_coverage_curve(order_rows(torch.tensor([0.0, 2.0]), torch.tensor([False, True])))
        >>> figure.axes[0].get_title(loc="left")
        'AURC 25.00 % (optimum 25.00 %)'
    """
    held = groups_with_rows(ordered, "risk_coverage_curve")
    if len(held.count) == 0:
        return empty_figure(_HEIGHT, title)
    answered, errors = (field.flip(0).cumsum(0).numpy() for field in (held.count, held.wrong))
    total, accuracy = answered[-1], 1 - errors[-1] / answered[-1]
    # The expected risk is constant within the first group, so the curve starts at its risk.
    coverage = np.concatenate([[0.0], answered / total])
    risk = np.concatenate([[errors[0] / answered[0]], errors / answered])
    kept = _thinned(coverage, risk)
    coverage, risk = coverage[kept], risk[kept]

    figure = new_figure(_HEIGHT, title, total)
    axes = figure.subplots()
    grid = np.linspace(0, 1, 501)
    axes.fill_between(coverage, _optimum(coverage, accuracy), risk, color="#e0e0e0", linewidth=0)
    handles = [
        *axes.plot(coverage, risk, color="black", linewidth=1.2, label="by confidence"),
        *axes.plot(grid, _optimum(grid, accuracy), color="#1f78b4", linestyle=":", linewidth=1.4, label="optimum"),
        axes.axhline(
            1 - accuracy, color=GREY, linestyle="--", linewidth=0.8, label=f"all rows: {percent(1 - accuracy)}"
        ),
    ]
    highest = risk[coverage >= _SETTLED].max()
    axes.set(xlim=(0, 1), ylim=(-0.02 * highest, 1.15 * highest) if highest > 0 else (-0.02, 1))
    finish_axes(axes, "coverage (share of rows answered)", "risk (error rate)")

    area = float(aurc_from_ordered(held))
    best = area - float(e_aurc_from_ordered(held, exact=True))
    finish_figure(figure, f"AURC {percent(area)} (optimum {percent(best)})", handles)
    return figure


def _optimum(coverage: FloatArray, accuracy: float) -> FloatArray:
    kept = np.maximum(coverage, 1e-300)
    return np.maximum(0.0, 1 - accuracy / kept)


def _thinned(coverage: FloatArray, risk: FloatArray) -> NDArray[np.int64]:
    if len(coverage) <= 4 * _CELLS:
        return np.arange(len(coverage))
    cell = np.minimum((coverage * _CELLS).astype(int), _CELLS - 1)
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    kept: set[int] = set()
    for start, end in zip(starts, [*starts[1:], len(cell)], strict=True):
        part = risk[start:end]
        kept.update((int(start), int(start + part.argmin()), int(start + part.argmax()), int(end) - 1))
    return np.array(sorted(kept))
