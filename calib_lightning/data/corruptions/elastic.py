r"""elastic_transform (alpha, sigma, shift), in pixels: an affine map, then a smooth displacement.

The map takes three points around the middle to themselves plus :math:`U(-\mathrm{shift}, \mathrm{shift})`; then each
pixel is read at :math:`p + \alpha\,(G_\sigma * U(-1, 1))(p)`, by linear interpolation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import affine_transform, map_coordinates

from calib_lightning.data.corruptions.draws import Floats, Images, Streams, uniform
from calib_lightning.data.corruptions.filters import unit


def elastic_transform(image: Images, constants: tuple[float, float, float], rngs: Streams) -> Floats:
    """Stretch it."""
    alpha, sigma, shift = constants
    height, width = image.shape[-2:]
    bent = np.empty(image.shape, dtype=np.float32)
    moves = (uniform(rngs, 3, 2) * 2 - 1) * np.float32(shift)
    for x, move, out in zip(unit(image), moves, bent, strict=True):
        matrix, offset = _inverse(move, height, width)
        for channel, straight in zip(out, x, strict=True):
            affine_transform(straight, matrix, offset, output=channel, order=1, mode="mirror")
    if alpha == 0:
        return bent
    field = _smooth(uniform(rngs, 2, height, width) * 2 - 1, sigma)
    places = np.mgrid[:height, :width] + np.float32(alpha) * field
    stretched = np.empty_like(bent)
    for x, place, out in zip(bent, places, stretched, strict=True):
        for channel, straight in zip(out, x, strict=True):
            map_coordinates(straight, place, output=channel, order=1, mode="reflect")
    return stretched


def _smooth(field: Floats, sigma: float) -> Floats:
    """A Gaussian filter of 3 sigma, mirrored at the edge, by cosine transforms: it may be wider than the image."""
    steps = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    kernel = np.exp(-(steps**2) / (2 * sigma**2))
    waves = fft.dctn(field, axes=(-2, -1))
    for size, shape in ((field.shape[-2], (-1, 1)), (field.shape[-1], (1, -1))):
        response = np.cos(np.outer(np.arange(size), steps) * (np.pi / size)) @ kernel / kernel.sum()
        waves *= response.astype(np.float32).reshape(shape)
    return np.asarray(fft.idctn(waves, axes=(-2, -1)), dtype=np.float32)


def _inverse(move: Floats, height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The map (row, column) of the result -> matrix (row, column) + offset of the image, for three moved points."""
    middle, side = np.array([height // 2, width // 2]), min(height, width) // 3
    points = middle + side * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = np.column_stack([points + move.astype(np.float64), np.ones(3)])
    solution = np.linalg.solve(moved, points.astype(np.float64))
    return solution[:2].T, solution[2]
