"""Look at the headers of image files before a run reads them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from calib_lightning.utils.images import read_header

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
"""Suffixes of image files."""
_CHECKED, _NAMED = 100_000, 10
_NARROW = 100  # maximum aspect ratio


def looked_at(root: Path, paths: Sequence[Path]) -> dict[Path, int]:
    """Channels of image files, or of an even sample of 100,000; those that cannot be read are a ``ValueError``."""
    chosen = [paths[row] for row in spread(len(paths), _CHECKED)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_look, chosen))
    faults = [fault for fault in found if isinstance(fault, str)]
    if faults:
        more = f"\n  and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        lines = "\n".join(f"  {fault}" for fault in faults[:_NAMED])
        raise ValueError(
            f"{len(faults)} of {len(chosen)} image files under {root} cannot be used:\n{lines}{more}\nRepair "
            "them, or remove them from the folder."
        )
    return {path: channels for path, channels in zip(chosen, found, strict=True) if isinstance(channels, int)}


def spread(size: int, most: int) -> Sequence[int]:
    """Positions spread evenly over a list; all of them up to ``most``."""
    return range(size) if size <= most else [int(row) for row in np.linspace(0, size - 1, most)]


def _look(path: Path) -> str | int:
    """Number of channels of a file, or what is wrong with it."""
    try:
        header = read_header(path, upright=False)
    except ValueError as error:
        return f"{path}: {error}"
    longer, shorter = max(header.height, header.width), min(header.height, header.width)
    return (
        f"{path}: it is {header.width} x {header.height}, too elongated; crop it"
        if longer > _NARROW * shorter
        else header.channels
    )
