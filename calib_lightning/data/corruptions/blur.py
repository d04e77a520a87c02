r"""Blurs.

- gaussian_blur: a Gaussian kernel of standard deviation c, the edge repeated
- glass_blur (sigma, delta, rounds): blurred, each pixel replaced by one at most delta away, blurred again
- defocus_blur (radius, sigma): a disk, itself blurred by a small Gaussian kernel
- motion_blur (radius, sigma): along a line at an angle :math:`\theta \sim U(-45°, 45°)`
- zoom_blur: the mean of the image and its zooms by the factors 1, 1 + step, ...
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import correlate1d

from calib_lightning.data.corruptions.draws import Floats, Images, Streams, angles
from calib_lightning.data.corruptions.filters import gaussian, motion, unit, zoom


def gaussian_blur(image: Images, sigma: float, rngs: Streams) -> Floats:
    """Blur by a Gaussian kernel."""
    return gaussian(unit(image), sigma)


def glass_blur(image: Images, constants: tuple[float, int, int], rngs: Streams) -> Floats:
    """Blur, replace pixels by near ones, blur."""
    sigma, delta, rounds = constants
    blurred = (gaussian(unit(image), sigma) * np.float32(255) + np.float32(1e-3)).astype(np.uint8)
    batch, channels, height, width = image.shape
    source = np.broadcast_to(np.arange(height * width), (batch, height * width))
    for _ in range(rounds):
        moves = np.stack([rng.integers(-delta, delta, (2, height, width), dtype=np.int8) for rng in rngs])
        source = np.take_along_axis(source, _replaced(moves, delta), axis=1)
    shuffled = np.take_along_axis(blurred.reshape(batch, channels, -1), source[:, None], axis=2)
    return gaussian(unit(shuffled.reshape(image.shape)), sigma)


def _replaced(moves: NDArray[np.int8], delta: int) -> NDArray[np.int64]:
    """Where each pixel (B, H W) comes from after one round of replacements, from the last pixel to the first.

    The benchmark's code means to swap two pixels; as numpy's rows are views, the first becomes the second and the
    second stays. A pixel that takes the place of one already replaced takes what that one took: a chain, whose end is
    found by doubling.
    """
    batch, _, height, width = moves.shape
    row, column = np.mgrid[:height, :width]
    inside = (row > delta) & (row <= height - delta) & (column > delta) & (column <= width - delta)
    place = (row * width + column).ravel()
    target = place + np.where(inside, moves[:, 0].astype(np.int64) * width + moves[:, 1], 0).reshape(batch, -1)
    count = height * width
    # places count .. 2 count - 1 are the pixels before this round, where a chain ends
    before = (target <= place) | ~inside.ravel()[target]
    link = np.concatenate([target + count * before, np.broadcast_to(place + count, target.shape)], axis=1)
    while (link[:, :count] < count).any():
        link = np.take_along_axis(link, link, axis=1)
    found: NDArray[np.int64] = link[:, :count] - count
    return found


def defocus_blur(image: Images, constants: tuple[float, float], rngs: Streams) -> Floats:
    """Blur by a disk; the image is mirrored at its edge."""
    kernel = disk(*constants)
    half = len(kernel) // 2
    padded = np.pad(unit(image), ((0, 0), (0, 0), (half, half), (half, half)), mode="reflect")
    size = [fft.next_fast_len(side, True) for side in padded.shape[-2:]]
    transform = fft.rfft2(kernel.astype(np.float32), size)  # symmetric: convolution and correlation agree
    blurred = fft.irfft2(fft.rfft2(padded, size) * transform, size)
    height, width = image.shape[-2:]
    inside = blurred[..., 2 * half : 2 * half + height, 2 * half : 2 * half + width]
    return np.asarray(inside, dtype=np.float32)


def disk(radius: float, sigma: float) -> NDArray[np.float64]:
    """The kernel of defocus_blur: a disk on a grid of 17 pixels, or of 2 r + 1, smoothed over 3 or 5."""
    half, reach = (8, 1) if radius <= 8 else (int(radius), 2)
    line = np.arange(-half, half + 1)
    inside = (line[:, None] ** 2 + line**2 <= radius**2).astype(np.float64)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel: NDArray[np.float64] = inside / inside.sum()
    for axis in (0, 1):
        kernel = correlate1d(kernel, weights / weights.sum(), axis, mode="mirror")
    rim = int(np.flatnonzero(kernel.any(axis=0))[0])
    return kernel[rim : len(kernel) - rim, rim : len(kernel) - rim]


def motion_blur(image: Images, constants: tuple[int, float], rngs: Streams) -> Floats:
    """Blur along a line; the result is rounded to grey levels, as ImageMagick's is."""
    blurred = motion(unit(image), *constants, angles(rngs, -45, 45))
    rounded: Floats = np.rint(blurred * np.float32(255))
    return rounded / np.float32(255)


def zoom_blur(image: Images, constants: tuple[float, float], rngs: Streams) -> Floats:
    """Average zooms."""
    end, step = constants
    x = unit(image)
    total = x.copy()
    factors = np.arange(1, end, step)  # by numpy's rounding some tables reach their end: so do the benchmarks
    for factor in factors:
        total += x if factor == 1 else zoom(x, float(factor))
    return total / np.float32(len(factors) + 1)
