"""What several corruptions share: units, grey values, Gaussian and motion blur, zoom."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from calib_lightning.data.corruptions.draws import Floats, Images

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None, None]  # ITU-R 601


def unit(image: Images) -> Floats:
    """Scale grey levels to [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def levels(x: Floats | Images) -> Images:
    """Cut values in [0, 1] to grey levels, as a cast does; what misses a level by a rounding error reaches it."""
    if x.dtype == np.uint8:
        return np.asarray(x, dtype=np.uint8)
    scaled = np.clip(np.asarray(x, dtype=np.float32), 0, 1) * np.float32(255)
    return (scaled + np.float32(1e-3)).astype(np.uint8)


def grey(x: Floats) -> Floats:
    """Luminance (B, 1, H, W) of images of one or three channels."""
    if x.shape[1] == 1:
        return x
    return np.asarray((x * _LUMINANCE).sum(axis=1, keepdims=True), dtype=np.float32)


def gaussian(x: Floats, sigma: float) -> Floats:
    """Blur the last two dimensions by a Gaussian kernel of 4 sigma; the edge is repeated."""
    sigmas = (0,) * (x.ndim - 2) + (sigma, sigma)
    return np.asarray(gaussian_filter(x, sigmas, mode="nearest"), dtype=np.float32)


def motion(x: Floats, radius: int, sigma: float, angles: NDArray[np.float64]) -> Floats:
    r"""Blur each image along its angle, as ImageMagick does; the edge is repeated.

    :math:`\sum_i k_i\,x(h + \lceil i \sin\theta - 1/2 \rceil, w + \lceil i \cos\theta - 1/2 \rceil)` with half a
    Gaussian kernel k of :math:`2 r + 1` steps.
    """
    steps = np.arange(2 * radius + 1)
    kernel = np.exp(-(steps**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).astype(np.float32)
    height, width = x.shape[-2:]
    blurred = np.zeros_like(x)
    part = np.empty_like(x[0])
    for image, angle, out in zip(x, angles, blurred, strict=True):
        down = [math.ceil(step * math.sin(math.radians(angle)) - 0.5) for step in steps]
        right = [math.ceil(step * math.cos(math.radians(angle)) - 0.5) for step in steps]
        top, left = -min(*down, 0), -min(*right, 0)
        rows, columns = (top, max(*down, 0)), (left, max(*right, 0))
        padded = np.pad(image, ((0, 0), rows, columns), mode="edge")
        for weight, dy, dx in zip(kernel, down, right, strict=True):
            shifted = padded[:, top + dy : top + dy + height, left + dx : left + dx + width]
            np.multiply(shifted, weight, out=part)
            out += part
    return blurred


def zoom(x: Floats, factor: float) -> Floats:
    """Enlarge the middle of images by linear interpolation, to the same size."""
    for axis in (-2, -1):
        x = _zoom_axis(x, factor, axis)
    return x


def _zoom_axis(x: Floats, factor: float, axis: int) -> Floats:
    """Corners stay where they are (scipy's ``zoom`` of order 1): output i is at ``i (cut - 1) / (size - 1)``."""
    size = x.shape[axis]
    cut = math.ceil(size / factor)
    zoomed = max(round(cut * factor), size)
    place = np.arange(zoomed) * ((cut - 1) / max(zoomed - 1, 1))
    place = place[(zoomed - size) // 2 :][:size] + (size - cut) // 2
    low = np.minimum(place.astype(np.int64), size - 2)
    weight = (place - low).astype(np.float32)
    if axis == -2:
        weight = weight[:, None]
    first = np.take(x, low, axis=axis)
    step: Floats = np.take(x, low + 1, axis=axis)
    step -= first
    step *= weight
    step += first
    return step
