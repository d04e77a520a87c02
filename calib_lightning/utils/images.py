"""Image files as a network's input: safe to open, upright, of common size and channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

CropMode = Literal["center", "squash"]
"""``"center"`` keeps the aspect ratio and crops the centre; ``"squash"`` distorts the image."""
CROP_MODES: tuple[CropMode, ...] = ("center", "squash")
FILTERS = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}
"""Interpolation filters by name."""
SAFE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Formats that are accepted from untrusted sources."""
OWN_FORMATS = (*SAFE_FORMATS, "TIFF", "PPM", "GIF")
"""Formats that are accepted as training data."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa")
_GREY = ("1", "L", "LA", "La")
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Frame:
    """How an image of any size becomes ``(C, H, W)`` bytes: convert to 1 or 3 channels, resize, then crop the centre.

    ``crop_pct`` in ``(0, 1]`` is ``size`` over the size before the crop; ``crop_mode`` "center" keeps the aspect ratio,
    "squash" does not; ``interpolation`` is one of `FILTERS`.
    """

    size: tuple[int, int]
    channels: int = 3
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert, resize and crop an image with 8 bits per channel to ``(C, H, W)`` uint8."""
        image = self._resized(in_colours(image, self.channels))
        height, width = self.size
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return pixels_of(image.crop((left, top, left + width, top + height)))

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "center":
            if height == width:  # the two cases round like torchvision and timm
                short, long = sorted(image.size)
                long = int(height * long / short)
                width, height = (height, long) if image.width <= image.height else (long, height)
            else:
                ratio = min(image.height / height, image.width / width)
                height, width = round(image.height / ratio), round(image.width / ratio)
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"the image is {image.width} x {image.height}, too elongated to be resized; crop it")
        return image.resize((width, height), FILTERS[self.interpolation])


def in_colours(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image with 8 bits per channel to grey (1) or RGB (3); transparency is dropped."""
    if image.mode not in _EIGHT_BITS:
        raise ValueError(f"the image has mode {image.mode}; it must have 8 bits per channel: convert it to RGB or grey")
    return image.convert(MODES[channels])


def pixels_of(image: Image.Image) -> Tensor:
    """Pixels ``(C, H, W)`` uint8 of a grey or RGB image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).view(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).contiguous()


def upright(image: Image.Image) -> Image.Image:
    """Rotate an image as recorded by the camera; upright images are returned unchanged."""
    # `exif_transpose` would copy an upright image
    return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def load_upright(path: Path, formats: tuple[str, ...] = OWN_FORMATS) -> Image.Image:
    """Read an image file completely and rotate it upright, with the decoder's own errors."""
    with Image.open(path, formats=formats) as image:
        image.load()
        return upright(image)


def read_image(path: Path, formats: tuple[str, ...] = OWN_FORMATS) -> Image.Image:
    """Read an image file completely and rotate it upright; errors name the file and the reason."""
    try:
        return load_upright(path, formats)
    except Exception as error:  # the decoder's error depends on where the file is damaged
        raise ValueError(f"{path} cannot be read: {why_unreadable(error, formats)}") from error


def why_unreadable(error: Exception, formats: tuple[str, ...]) -> str:
    """Return a one-line reason, with a remedy if there is one, why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is not an image in one of the formats {', '.join(formats)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"{' '.join(str(error).split())} Reduce the image size"
    return " ".join(str(error).split()) or type(error).__name__


class Header(NamedTuple):
    """Height, width and channels (1 or 3) of an image file."""

    height: int
    width: int
    channels: int


def read_header(path: Path, formats: tuple[str, ...] = OWN_FORMATS, *, upright: bool = True) -> Header:
    """Read the header of an image file without its pixels; errors give the reason, not the file.

    With ``upright``, height and width are those after rotation; a PNG file may store it at the end, so that the whole
    file is read.
    """
    try:
        with Image.open(path, formats=formats) as image:
            if image.mode not in _EIGHT_BITS:
                raise ValueError(
                    f"it has mode {image.mode}; it must have 8 bits per channel: convert it to RGB or grey"
                )
            turned = upright and image.getexif().get(_ORIENTATION, 1) >= 5  # a quarter turn, possibly mirrored
            height, width = (image.width, image.height) if turned else (image.height, image.width)
            grey = image.mode in _GREY or (image.mode == "P" and _has_grey_palette(image))
            return Header(height, width, 1 if grey else 3)
    except Exception as error:
        raise ValueError(why_unreadable(error, formats)) from error


def _has_grey_palette(image: Image.Image) -> bool:
    colours = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())
