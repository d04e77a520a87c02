r"""Changes of brightness, contrast and saturation, of one pixel at a time: x in [0, 1], V the largest channel.

- brightness: V of HSV becomes :math:`\min(V + c, 1)`: every channel is scaled by the ratio
- contrast: :math:`(x - \bar{x})\,c + \bar{x}` with the mean of each channel
- saturate: S of HSV becomes :math:`\mathrm{clip}(S\,\mathrm{scale} + \mathrm{shift})`; a grey pixel has the hue of red
"""

from __future__ import annotations

import numpy as np

from calib_lightning.data.corruptions.draws import Floats, Images, Streams
from calib_lightning.data.corruptions.filters import unit


def brightness(image: Images, more: float, rngs: Streams) -> Floats:
    """Brighten; black becomes grey."""
    x = unit(image)
    value: Floats = x.max(axis=1, keepdims=True)
    brighter: Floats = np.minimum(value + np.float32(more), 1)
    ratio: Floats = np.divide(brighter, value, out=np.zeros_like(value), where=value > 0)
    bright: Floats = np.where(value > 0, x * ratio, brighter)
    return bright


def contrast(image: Images, factor: float, rngs: Streams) -> Floats:
    """Draw the values to their mean."""
    x = unit(image)
    mean: Floats = x.mean(axis=(2, 3), keepdims=True, dtype=np.float64).astype(np.float32)
    return (x - mean) * np.float32(factor) + mean


def saturate(image: Images, constants: tuple[float, float], rngs: Streams) -> Floats:
    """Change the saturation."""
    scale, shift = constants
    x = unit(image)
    value: Floats = x.max(axis=1, keepdims=True)
    chroma: Floats = value - x.min(axis=1, keepdims=True)
    saturation = np.divide(chroma, value, out=np.zeros_like(value), where=value > 0)
    changed = np.clip(saturation * np.float32(scale) + np.float32(shift), 0, 1)
    ratio = np.divide(changed, saturation, out=np.zeros_like(value), where=saturation > 0)
    coloured = value - (value - x) * ratio
    reddish = value * (1 - changed)
    red = np.concatenate([value, reddish, reddish], axis=1)
    return np.where(chroma > 0, coloured, red)
