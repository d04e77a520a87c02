r"""Weather.

- snow: normal noise, zoomed, cut below a threshold and blurred along a line, and its half turn, added to
  :math:`m x + (1 - m) \max(x, 1.5\,\mathrm{grey}(x) + 0.5)`
- frost: :math:`a x + b\,\mathrm{frost}` with a random crop of a photograph
- fog: :math:`(x + w F) \max x / (\max x + w)` with a plasma fractal F in [0, 1]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from calib_lightning.data.corruptions.draws import Floats, Images, Streams, angles, normal, uniform
from calib_lightning.data.corruptions.filters import grey, motion, unit, zoom


def snow(image: Images, constants: tuple[float, float, float, float, int, float, float], rngs: Streams) -> Floats:
    """Let it snow."""
    mean, scale, factor, threshold, radius, sigma, mix = constants
    x = unit(image)
    layer: Floats = zoom(normal(rngs, 1, *image.shape[-2:]) * np.float32(scale) + np.float32(mean), factor)
    layer[layer < threshold] = 0
    layer = np.floor(np.clip(layer, 0, 1) * np.float32(255))
    streaks = unit(np.rint(motion(layer, radius, sigma, angles(rngs, -135, -45))).astype(np.uint8))
    whiter: Floats = np.maximum(x, grey(x) * np.float32(1.5) + np.float32(0.5))
    return np.float32(mix) * x + np.float32(1 - mix) * whiter + streaks + streaks[:, :, ::-1, ::-1]


def frost(image: Images, constants: tuple[float, float], rngs: Streams, photographs: Sequence[Images]) -> Floats:
    """Lay a photograph over it."""
    height, width = image.shape[-2:]
    crops = np.empty_like(image)
    for rng, crop in zip(rngs, crops, strict=True):
        photograph = photographs[int(rng.integers(len(photographs)))]
        top, left = (
            rng.integers(max(have - need, 1)) for have, need in zip(photograph.shape[:2], (height, width), strict=True)
        )
        crop[:] = photograph[top : top + height, left : left + width].transpose(2, 0, 1)
    return np.float32(constants[0]) * unit(image) + np.float32(constants[1]) * unit(crops)


def fitted(photographs: Sequence[Images], step: int, height: int, width: int) -> list[Images]:
    """Photographs of every step-th pixel, enlarged where they are smaller than the image."""
    fits = []
    for photograph in photographs:
        small = photograph[step // 2 :: step, step // 2 :: step]
        ratio = max(height / small.shape[0], width / small.shape[1])
        if ratio > 1:
            size = (max(round(small.shape[1] * ratio), width), max(round(small.shape[0] * ratio), height))
            small = np.asarray(Image.fromarray(np.ascontiguousarray(small)).resize(size, Image.Resampling.BICUBIC))
        fits.append(small)
    return fits


def fog(image: Images, constants: tuple[float, float], rngs: Streams) -> Floats:
    """Lay fog over it."""
    weight, decay = constants
    height, width = image.shape[-2:]
    layer = np.float32(weight) * plasma(rngs, max(height, width), decay)[:, None, :height, :width]
    x = unit(image)
    most: Floats = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + layer) * (most / (most + np.float32(weight)))


def plasma(rngs: Streams, side: int, decay: float) -> Floats:
    """Draw height maps (B, S, S) in [0, 1] by diamonds and squares, S the next power of two.

    Each halving of the grid sets the middle of squares, then of diamonds, to the mean of four neighbours plus a
    uniform number, whose range falls by the factor ``decay`` squared. The map is a torus.
    """
    size = 1 << max(side - 1, 1).bit_length()
    draws = uniform(rngs, size * size - 1) * 2 - 1
    maps = np.zeros((len(rngs), size, size), dtype=np.float32)
    used, step, wibble = 0, size, 1.0

    def middles(total: Floats) -> Floats:
        nonlocal used
        count = total[0].size
        moved = draws[:, used : used + count].reshape(total.shape)
        used += count
        return total / 4 + np.float32(wibble) * moved

    while step >= 2:
        half = step // 2
        corner = maps[:, ::step, ::step]
        total = corner + np.roll(corner, -1, 1)
        maps[:, half::step, half::step] = middles(total + np.roll(total, -1, 2))
        centre = maps[:, half::step, half::step]
        above = centre + np.roll(centre, 1, 1) + corner + np.roll(corner, -1, 2)
        maps[:, ::step, half::step] = middles(above)
        beside = centre + np.roll(centre, 1, 2) + corner + np.roll(corner, -1, 1)
        maps[:, half::step, ::step] = middles(beside)
        step, wibble = half, wibble / decay**2
    maps -= maps.min(axis=(1, 2), keepdims=True)
    most: Floats = maps.max(axis=(1, 2), keepdims=True)
    return maps / most
