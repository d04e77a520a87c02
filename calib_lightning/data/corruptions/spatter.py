r"""spatter: drops of water or mud, where blurred normal noise L is above a threshold.

- water: :math:`x + s\,L R / \max(L R)\,\mathrm{colour}` with R a relief of the distance to the drops' edges
- mud: :math:`(1 - m)\,x + m\,\mathrm{colour}` with m the drops, blurred, where that is at least 0.8
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from calib_lightning.data.corruptions.draws import Floats, Images, Streams, normal
from calib_lightning.data.corruptions.filters import gaussian, unit

_WATER = np.array([175, 238, 238], dtype=np.float32)[:, None, None] / np.float32(255)
_MUD = np.array([63, 42, 20], dtype=np.float32)[:, None, None] / np.float32(255)
_SLOPE = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


def opencv() -> ModuleType:
    """Import OpenCV, or raise ModuleNotFoundError that says what to install."""
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"spatter needs OpenCV, which cannot be imported ({error}). `pip install 'calib-lightning[corruptions]'`, "
            "or `pip install opencv-python-headless` where there is no display, or leave out the corruption spatter."
        ) from error


def spatter(image: Images, constants: tuple[float, float, float, float, float, int], rngs: Streams) -> Floats:
    """Spatter it."""
    mean, scale, sigma, threshold, strength, mud = constants
    x = unit(image)
    layer = gaussian(normal(rngs, *image.shape[-2:]) * np.float32(scale) + np.float32(mean), sigma)
    if mud:
        drops = gaussian((layer > threshold).astype(np.float32), strength)
        drops = np.where(drops < 0.8, np.float32(0), drops)[:, None]
        return x * (1 - drops) + drops * _MUD
    cv2 = opencv()
    water = np.where(layer < threshold, 0, layer * 255).astype(np.uint8)
    relief: Floats = np.stack([drop * _relief(drop, cv2) for drop in water])[:, None]
    most: Floats = relief.max(axis=(2, 3), keepdims=True)
    relief = np.divide(relief, most, out=np.zeros_like(relief), where=most > 0)
    return x + np.float32(strength) * relief * _WATER


def _relief(drops: NDArray[np.uint8], cv2: ModuleType) -> Floats:
    """Light on the slopes (H, W) of drops (H, W)."""
    distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    light = cv2.filter2D(cv2.equalizeHist(distance), cv2.CV_8U, _SLOPE)
    return np.asarray(cv2.blur(light, (3, 3)), dtype=np.float32)
