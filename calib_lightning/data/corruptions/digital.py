"""What storing and resizing do: JPEG and pixels made larger, by Pillow.

- jpeg_compression: written as JPEG of the given quality, and read
- pixelate: each side shrunk to its share c by box averages, and enlarged
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image

from calib_lightning.data.corruptions.draws import Images, Streams


def jpeg_compression(image: Images, quality: int, rngs: Streams) -> Images:
    """Write and read a JPEG file."""

    def compressed(picture: Image.Image) -> Image.Image:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(image, compressed)


def pixelate(image: Images, share: float, rngs: Streams) -> Images:
    """Make the pixels larger."""
    height, width = image.shape[-2:]
    small = (max(int(width * share), 1), max(int(height * share), 1))
    box = Image.Resampling.BOX
    return _by_pillow(image, lambda picture: picture.resize(small, box).resize((width, height), box))


def _by_pillow(image: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    """What Pillow makes of each image (C, H, W)."""
    changed = np.empty_like(image)
    pixels = np.empty((*image.shape[2:], image.shape[1]), dtype=np.uint8)
    for one, out in zip(image, changed, strict=True):
        for channel, values in enumerate(one):  # three times as fast as a transpose
            pixels[..., channel] = values
        done = np.asarray(change(Image.fromarray(pixels[..., 0] if len(one) == 1 else pixels)))
        for channel in range(len(one)):
            out[channel] = done if len(one) == 1 else done[..., channel]
    return changed
