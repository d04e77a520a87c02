"""Relief of drops of water: the steps of OpenCV that spatter needs, on integers (B, H, W).

All are exact, whatever the machine; only OpenCV's distances are rounded, in a way that depends on how it was built.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

from calib_lightning.data.corruptions.draws import Floats, Images

Flags: TypeAlias = NDArray[np.bool_]

_WEAK, _STRONG = 50, 150
_STEP, _DIAGONAL, _KNIGHT, _FAR = 10_000, 14_000, 21_969, 200_000  # in 1/10000 pixels, where all are whole
_SLOPE = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
_SHIFT, _TAN_22 = 15, 13573  # tan 22.5 degrees in units of 2**-15; tan 67.5 is 2 more
_TOUCHING = np.stack([np.zeros((3, 3), int), np.ones((3, 3), int), np.zeros((3, 3), int)])  # in the same image


def relief(drops: Images) -> Floats:
    """Light on the slopes of drops: from the distance to their edges, equalised."""
    distance = (around(far_from(canny(drops))) // (9 * _STEP)).astype(np.uint8)
    return np.rint(around(lit(equalized(distance))) / np.float32(9)).astype(np.float32)


def canny(layer: Images) -> Flags:
    """Edges by Canny (1986): sums of absolute Sobel differences above 50 that touch one above 150."""
    near = _neighbours(layer.astype(np.int32), "edge")
    right = sum(weight * (near[i][2] - near[i][0]) for i, weight in enumerate((1, 2, 1)))
    down = sum(weight * (near[2][j] - near[0][j]) for j, weight in enumerate((1, 2, 1)))
    across, along = np.abs(right), np.abs(down)
    size = across + along
    near = _neighbours(size, "constant")
    along <<= _SHIFT
    level = along < across * _TAN_22
    upright = along > across * (_TAN_22 + (2 << _SHIFT))
    falling, rising = _largest(size, near[0][0], near[2][2]), _largest(size, near[0][2], near[2][0])
    largest = np.where((right ^ down) < 0, rising, falling)
    # of two that are equal side by side, the first is an edge; of two on a diagonal, neither
    largest = np.where(upright, _largest(size, near[0][1], near[2][1] - 1), largest)
    largest = np.where(level, _largest(size, near[1][0], near[1][2] - 1), largest)
    groups, number = label(largest & (size > _WEAK), _TOUCHING)
    kept = np.zeros(number + 1, dtype=bool)
    kept[groups[largest & (size > _STRONG)]] = True
    return np.asarray(kept[groups])


def far_from(edges: Flags) -> NDArray[np.int32]:
    """Distance to the nearest edge in 1/10000 pixels, at most 20 pixels.

    Borgefors (1986) with a mask of 5 x 5: steps of 1, 1.4 and 2.1969, within 2 % of the Euclidean distance. Without an
    edge it is 20, as OpenCV's infinite one is cut to that.
    """
    count, height, width = edges.shape
    far = np.full((height + 4, count, width + 4), _FAR, dtype=np.int32)  # a row of all images is contiguous
    far[2:-2, :, 2:-2][edges.swapaxes(0, 1)] = 0
    _spread(far)
    _spread(far[::-1, :, ::-1])
    return far[2:-2, :, 2:-2].swapaxes(0, 1)


def _spread(far: NDArray[np.int32]) -> None:
    """Bring distances to the right and to the rows below, in place; two pixels on each side are not images."""
    ramp = np.arange(far.shape[2] - 4, dtype=np.int32) * _STEP
    for two, one, here in zip(far, far[1:], far[2:-2], strict=False):  # rows two above, one above, here
        row = here[:, 2:-2]
        diagonal = np.minimum(one[:, 1:-3], one[:, 3:-1])
        knight = np.minimum(np.minimum(one[:, :-4], one[:, 4:]), np.minimum(two[:, 1:-3], two[:, 3:-1]))
        for near, step in ((one[:, 2:-2], _STEP), (diagonal, _DIAGONAL), (knight, _KNIGHT)):
            np.minimum(row, near + step, out=row)
        row -= ramp
        np.minimum.accumulate(row, axis=1, out=row)
        row += ramp


def equalized(grey: Images) -> Images:
    """Equalise the histogram of each image: its darkest value becomes 0, its brightest 255."""
    image = np.arange(len(grey))[:, None]
    counts = np.bincount((grey.reshape(len(grey), -1) + 256 * image).ravel(), minlength=256 * len(grey))
    below = counts.reshape(-1, 256).cumsum(axis=1)
    darkest = np.take_along_axis(below, (below > 0).argmax(axis=1)[:, None], axis=1)
    others = below[:, -1:] - darkest
    scale = np.float32(255) / np.maximum(others, 1).astype(np.float32)
    levels = np.rint(np.maximum(below - darkest, 0).astype(np.float32) * scale)
    levels = np.where(others == 0, np.arange(256), levels).astype(np.uint8)  # an image of one value keeps it
    return np.asarray(levels[image[..., None], grey])


def lit(height: Images) -> Images:
    """Light from the upper left on a relief, cut to 0 to 255; the border is mirrored."""
    near = _neighbours(height.astype(np.int16), "reflect")
    light = sum(weight * near[i][j] for i, row in enumerate(_SLOPE) for j, weight in enumerate(row) if weight)
    return np.asarray(np.clip(light, 0, 255), dtype=np.uint8)


def around(x: NDArray[Any]) -> NDArray[np.int32]:
    """Sum of each pixel's 3 x 3 neighbours; the border is mirrored."""
    rows = [row[0] + row[1] + row[2] for row in _neighbours(x.astype(np.int32), "reflect")]
    return np.asarray(rows[0] + rows[1] + rows[2])


def _largest(size: NDArray[Any], before: NDArray[Any], after: NDArray[Any]) -> Flags:
    """Where an integer is above both of its neighbours."""
    return np.asarray((size > before) & (size > after))


def _neighbours(x: NDArray[Any], border: Any) -> list[list[NDArray[Any]]]:
    """The 3 x 3 neighbours of each pixel, by row and column."""
    height, width = x.shape[-2:]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode=border)
    return [[padded[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]
