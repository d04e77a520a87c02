"""What all figures share: size, fonts, colours that differ even in grey, and the figure of an empty set."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from calib_lightning.metrics.functional.ordered import Ordered

FloatArray = NDArray[np.float64]

WIDTH = 3.3
"""Width of a figure in inches: one column of a two-column page."""

TEXT, SMALL = 8.0, 7.0
"""Font sizes in points. Every text gets one, as the settings of matplotlib belong to the user."""

LIGHT, DARK, GREY = "#a6cee3", "#99000d", "#555555"
"""A light fill, a dark line and the grey of reference lines."""

_TITLE_LETTERS = 50


def new_figure(height: float, title: str | None, rows: float | None = None) -> Figure:
    """An empty figure outside of any global list, with a layout that makes room for all labels.

    The title ends in the number of rows, if it is given, and goes on in a second line where it is long.
    """
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    whole = ", ".join([*([title] if title else []), *([] if rows is None else [f"N {rows:,.0f}"])])
    if whole:
        figure.suptitle(textwrap.fill(drawable(whole), _TITLE_LETTERS), fontsize=TEXT, parse_math=False)
    return figure


def drawable(text: str) -> str:
    """The text with a question mark for each byte of a file's name that is not UTF-8, which fonts refuse."""
    return text.encode(errors="replace").decode()


def empty_figure(height: float, title: str | None) -> Figure:
    """The figure of a set without rows, which says so."""
    figure = new_figure(height, title, 0)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no rows", ha="center", va="center", fontsize=TEXT, transform=axes.transAxes)
    return figure


def finish_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Label axes in the font size of the figures and remove the frame above and on the right."""
    axes.set_xlabel(xlabel, fontsize=TEXT)
    axes.set_ylabel(ylabel, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_linewidth(0.6)


def finish_figure(figure: Figure, numbers: str, handles: Sequence[Artist]) -> None:
    """Write the numbers above the first axes and the legend below the last, and fix the layout."""
    figure.axes[0].set_title(numbers, fontsize=SMALL, loc="left")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=SMALL, frameon=False)
    # The layout shifts slightly with every drawing. It is computed once, so all files of a figure are the same.
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.execute(figure)
    figure.set_layout_engine("none")


def percent(value: float, signed: bool = False) -> str:
    """A fraction in percent, such as ``3.90 %``."""
    return f"{100 * value:+.2f} %" if signed else f"{100 * value:.2f} %"


def groups_with_rows(ordered: Ordered, who: str) -> Ordered:
    """The groups ``(G,)`` of one set that hold rows, float64 on the CPU."""
    shapes = [tuple(field.shape) for field in ordered]
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(f"{who}: the fields of ordered have shapes {shapes}; they must be those of one set, (G,).")
    fields = torch.stack([field.detach().cpu().double() for field in ordered])
    if not bool((fields.isfinite() & (fields >= 0)).all()):
        raise ValueError(f"{who}: a field of ordered holds negative or infinite numbers or NaN. Use `order_rows`.")
    return Ordered(*fields[:, fields[0] > 0])
