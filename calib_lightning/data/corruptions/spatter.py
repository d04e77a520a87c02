r"""spatter: drops of water or mud, where blurred normal noise L is above a threshold.

- water: :math:`x + s\,L R / \max(L R)\,\mathrm{colour}` with R a relief of the distance to the drops' edges
- mud: :math:`(1 - m)\,x + m\,\mathrm{colour}` with m the drops, blurred, where that is at least 0.8
"""

from __future__ import annotations

import numpy as np

from calib_lightning.data.corruptions.draws import Floats, Images, Streams, normal
from calib_lightning.data.corruptions.filters import gaussian, unit
from calib_lightning.data.corruptions.relief import relief

_WATER = np.array([175, 238, 238], dtype=np.float32)[:, None, None] / np.float32(255)
_MUD = np.array([63, 42, 20], dtype=np.float32)[:, None, None] / np.float32(255)


def spatter(image: Images, constants: tuple[float, float, float, float, float, int], rngs: Streams) -> Floats:
    """Spatter it."""
    mean, scale, sigma, threshold, strength, mud = constants
    x = unit(image)
    layer = gaussian(normal(rngs, *image.shape[-2:]) * np.float32(scale) + np.float32(mean), sigma)
    if mud:
        drops = gaussian((layer > threshold).astype(np.float32), strength)
        drops = np.where(drops < 0.8, np.float32(0), drops)[:, None]
        return x * (1 - drops) + drops * _MUD
    # above 1 it wraps, as in the published code; of floats that is left to the machine, of whole numbers it is not
    water = np.where(layer < threshold, 0, layer * 255).astype(np.int32).astype(np.uint8)
    light: Floats = (water * relief(water))[:, None]
    most: Floats = light.max(axis=(2, 3), keepdims=True)
    light = np.divide(light, most, out=np.zeros_like(light), where=most > 0)
    return x + np.float32(strength) * light * _WATER
