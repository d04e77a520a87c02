"""What storing and resizing do: JPEG and pixels made larger, by Pillow.

- jpeg_compression: written as JPEG of the given quality, and read
- pixelate: each side shrunk to its share c by box averages, and enlarged
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

from calib_lightning.data.corruptions.draws import Floats, Images, Streams
from calib_lightning.data.corruptions.filters import unit


def jpeg_compression(image: Images, quality: int, rngs: Streams) -> Floats:
    """Write and read a JPEG file."""

    def compressed(picture: Image.Image) -> Image.Image:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(image, compressed)


def pixelate(image: Images, share: float, rngs: Streams) -> Floats:
    """Make the pixels larger."""
    height, width = image.shape[-2:]
    small = (max(int(width * share), 1), max(int(height * share), 1))
    box = Image.Resampling.BOX
    return _by_pillow(image, lambda picture: picture.resize(small, box).resize((width, height), box))


def _by_pillow(image: Images, change: Callable[[Image.Image], Image.Image]) -> Floats:
    """What Pillow makes of each image (C, H, W)."""
    changed = np.empty_like(image)
    for one, out in zip(image, changed, strict=True):
        if len(one) == 1:
            out[0] = np.asarray(change(Image.fromarray(one[0])))
        else:
            out[:] = np.asarray(change(Image.fromarray(np.ascontiguousarray(one.transpose(1, 2, 0))))).transpose(
                2, 0, 1
            )
    return unit(changed)
