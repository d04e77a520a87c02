"""Figures for files and loggers."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from calib_lightning.utils.files import write_whole
from calib_lightning.utils.once import warn_once

_SUFFIXES = (".png", ".svg")
_DPI = 300
_svg_lock = threading.Lock()


def save_figure(figure: Figure, path: str | PathLike[str]) -> Path:
    """Write a figure as PNG (300 dots per inch) or SVG; a failed write leaves an existing file unchanged.

    The same figure gives the same bytes with the same version of matplotlib: an SVG holds no date and no random names.

    Args:
        figure: The figure.
        path: The file; its suffix, ``.png`` or ``.svg``, sets the format. Missing folders are created.

    Returns:
        The path.

    Raises:
        ValueError: Another suffix.
        OSError: The file cannot be written.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"The file name is {target.name!r}; it must end in {' or '.join(_SUFFIXES)}.")
    buffer = io.BytesIO()
    if suffix == ".svg":
        with _fixed_svg_names():
            figure.savefig(buffer, format="svg", metadata={"Date": None})
    else:
        figure.savefig(buffer, format="png", dpi=_DPI)
    write_whole(target, lambda file: file.write(buffer.getvalue()))
    return target


@contextmanager
def _fixed_svg_names() -> Iterator[None]:
    # Only this setting controls the names inside an SVG. It is restored by itself: `rc_context` would also undo what
    # another thread sets meanwhile.
    with _svg_lock:
        before = matplotlib.rcParams["svg.hashsalt"]
        matplotlib.rcParams["svg.hashsalt"] = "calib_lightning"
        try:
            yield
        finally:
            matplotlib.rcParams["svg.hashsalt"] = before


def takes_figures(loggers: object) -> bool:
    """Whether `log_figure` would give one of these loggers a figure, so that it is worth drawing."""
    return any(map(_may_take, _listed(loggers)))


def _may_take(logger: object) -> bool:
    try:
        return _taker(logger) is not None
    except Exception:  # it may take the next one, and `log_figure` names it
        return True


def log_figure(loggers: object, name: str, figure: Figure, step: int, epoch: int | None = None) -> None:
    """Give a figure to a Lightning logger, or to each of several.

    A logger with ``log_image`` (Weights & Biases) and one whose ``experiment`` has ``add_image`` (TensorBoard) get the
    image under ``name`` at ``step``. For any other with a folder (``log_dir``, else ``save_dir``; CSV) it becomes a
    file, ``<folder>/figures/<name>.png``, with ``_`` for characters that do not belong in a file name. A figure during
    training becomes ``<name>_epoch<epoch>.png``, with four digits, so that the files sort. Only rank 0 logs.

    A figure must never stop a run: an error of a logger, or a logger of another kind, gives a warning, one
    for each logger.

    Args:
        loggers: A logger, or a list or tuple of them such as ``trainer.loggers``; nothing happens if it is ``None`` or
            empty.
        name: Key of the image, such as ``val/reliability``.
        figure: The figure.
        step: The step of the figure, usually ``trainer.global_step``.
        epoch: The epoch of a figure that others of the same name follow; ``None`` for a final one.

    Example:
        >>> from calib_lightning.plots import reliability_diagram
        >>> log_figure([], "val/reliability", reliability_diagram(torch.zeros(15, 3)), step=0)
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    for logger in _listed(loggers):
        try:
            give = _taker(logger)
            if give is not None:
                give(name, figure, step, epoch)
        except Exception as error:
            warn_once(logger, f"{type(logger).__name__} rejected figure {name!r}: {error!r}", kind="figures")
            continue
        if give is None:
            warn_once(
                logger,
                f"{type(logger).__name__} has neither log_image, nor experiment.add_image, nor a folder (log_dir, "
                f"save_dir), so figures such as {name!r} are lost. Add a CSVLogger to keep them.",
                kind="figures",
            )


def _listed(loggers: object) -> Sequence[object]:
    if loggers is None:
        return ()
    return loggers if isinstance(loggers, Sequence) else [loggers]


def _taker(logger: object) -> Callable[[str, Figure, int, int | None], object] | None:
    """How a logger takes name, figure, step and epoch; ``None`` if it cannot."""
    log_image = getattr(logger, "log_image", None)
    if callable(log_image):
        return lambda name, figure, step, _: log_image(key=name, images=[_image_of(figure)], step=step)
    add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
    if callable(add_image):
        return lambda name, figure, step, _: add_image(name, np.asarray(_image_of(figure)), step, dataformats="HWC")
    folder = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    if isinstance(folder, str | PathLike):
        return lambda name, figure, _, epoch: save_figure(figure, Path(folder) / "figures" / _file_name(name, epoch))
    return None


def _file_name(name: str, epoch: int | None) -> str:
    return re.sub(r"[^\w.-]", "_", name) + ("" if epoch is None else f"_epoch{epoch:04d}") + ".png"


def _image_of(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
