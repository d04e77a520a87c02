"""A sheet of images, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from calib_lightning.plots.style import SMALL, TEXT, drawable

_DOTS = 300  # per inch, as files are saved
_CELL, _GAP, _LABELS, _TOP, _EDGE = 210, 15, 450, 150, 30  # in dots
_LONGEST = 22


def image_sheet(rows: Sequence[tuple[str, Tensor]], columns: Sequence[str], *, title: str | None = None) -> Figure:
    """Draw images in rows, each pixel as a square of whole dots at 300 dots per inch, so that its value stays.

    Args:
        rows: A label and images ``(N, C, H, W)`` uint8 for each row, grey (C = 1) or RGB (C = 3), all of one size; N is
            at most the number of columns.
        columns: Names of the columns.
        title: Title of the figure.

    Returns:
        A figure as large as its images need.

    Raises:
        ValueError: There are no images, or they are not of one size with 1 or 3 channels.

    Example:
        >>> import torch
        >>> figure = image_sheet([("noise", torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8))], ["one", "two"])
        >>> len(figure.axes)
        2
    """
    shapes = {tuple(images.shape[1:]) for _, images in rows}
    if len(shapes) != 1:
        raise ValueError(f"rows has images of {len(shapes)} sizes; it must have images, all of one size.")
    channels, height, width = shapes.pop()
    if channels not in (1, 3):
        raise ValueError(f"The images have {channels} channels; they must have 1 (grey) or 3 (RGB) to be drawn.")
    scale = max(1, round(_CELL / max(height, width)))
    tall, wide = scale * height, scale * width
    step_down, step_right = tall + _GAP, max(wide, _CELL) + _GAP
    size = _LABELS + len(columns) * step_right + _EDGE, _TOP + len(rows) * step_down + _EDGE
    figure = Figure(figsize=(size[0] / _DOTS, size[1] / _DOTS), dpi=_DOTS)
    if title:
        figure.text(_EDGE / size[0], 1 - _EDGE / size[1], drawable(title), fontsize=TEXT, va="top", parse_math=False)
    for column, name in enumerate(columns):
        across = (_LABELS + column * step_right + wide / 2) / size[0]
        figure.text(across, 1 - (_TOP - 15) / size[1], drawable(name), fontsize=SMALL, ha="center", parse_math=False)
    for row, (label, images) in enumerate(rows):
        bottom = size[1] - _TOP - row * step_down - tall
        where = (_LABELS - _EDGE) / size[0], (bottom + tall / 2) / size[1]
        figure.text(*where, _short(drawable(label)), fontsize=SMALL, ha="right", va="center", parse_math=False)
        for column, image in enumerate(images):
            left = _LABELS + column * step_right
            axes = figure.add_axes((left / size[0], bottom / size[1], wide / size[0], tall / size[1]))
            axes.set_axis_off()
            axes.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    return figure


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…"
