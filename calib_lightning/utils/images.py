"""Image files as the bytes that a network is given: safe to open, upright, of one size and one kind of colour."""

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
"""``"center"`` keeps the aspect ratio and cuts off what is outside the centre, ``"squash"`` does not keep it."""
CROP_MODES: tuple[CropMode, ...] = ("center", "squash")
FILTERS = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}
"""Interpolations by name."""
SAFE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""Formats of files that may come from anybody."""
OWN_FORMATS = (*SAFE_FORMATS, "TIFF", "PPM", "GIF")
"""Formats of files that somebody trains on."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa")
_GREY = ("1", "L", "LA", "La")
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Frame:
    """How an image of any size becomes ``(C, H, W)`` bytes: resize, then a central crop.

    Args:
        size: Height and width in pixels.
        channels: 1 for grey, 3 for RGB; transparency is dropped.
        crop_pct: Size over the size that the image is resized to before the crop, in ``(0, 1]``.
        crop_mode: ``"center"`` keeps the aspect ratio, ``"squash"`` does not.
        interpolation: One of `FILTERS`.

    Example:
        >>> Frame((8, 8), channels=1)(Image.new("RGB", (20, 10), "white")).shape
        torch.Size([1, 8, 8])
    """

    size: tuple[int, int]
    channels: int = 3
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize and crop.

        Args:
            image: Of any size; 8 bits a channel.

        Returns:
            ``(C, H, W)`` uint8.

        Raises:
            ValueError: The image has more than 8 bits a channel, or is too long and narrow.
        """
        image = self._resized(in_colours(image, self.channels))
        height, width = self.size
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return pixels_of(image.crop((left, top, left + width, top + height)))

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        if self.crop_mode == "center":
            if height == width:  # the two cases round as torchvision and timm do
                short, long = sorted(image.size)
                long = int(height * long / short)
                width, height = (height, long) if image.width <= image.height else (long, height)
            else:
                ratio = min(image.height / height, image.width / width)
                height, width = round(image.height / ratio), round(image.width / ratio)
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"the image is {image.width} x {image.height}, too long and narrow to be resized; crop it")
        return image.resize((width, height), FILTERS[self.interpolation])


def in_colours(image: Image.Image, channels: int) -> Image.Image:
    """Convert to grey or RGB.

    Args:
        image: 8 bits a channel.
        channels: 1 or 3.

    Returns:
        The image; transparency is dropped.

    Raises:
        ValueError: The image has more than 8 bits a channel, which would be cut off.
    """
    if image.mode not in _EIGHT_BITS:
        raise ValueError(f"the image is of mode {image.mode}, allowed: 8 bits a channel; convert it to RGB or grey")
    return image.convert(MODES[channels])


def pixels_of(image: Image.Image) -> Tensor:
    """Pixels ``(C, H, W)`` uint8 of a grey or RGB image."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).view(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).contiguous()


def upright(image: Image.Image) -> Image.Image:
    """Turn an image upright, as the camera has noted.

    Args:
        image: Any image.

    Returns:
        The turned image; the same object where it is upright, as most are.
    """
    # `exif_transpose` would copy an upright image
    return image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def load_upright(path: Path, formats: tuple[str, ...] = OWN_FORMATS) -> Image.Image:
    """Read an image file whole and turn it upright; what the decoder raises is left as it is.

    Args:
        path: The file.
        formats: Formats that are decoded.

    Returns:
        The image.
    """
    with Image.open(path, formats=formats) as image:
        image.load()
        return upright(image)


def read_image(path: Path, formats: tuple[str, ...] = OWN_FORMATS) -> Image.Image:
    """Read an image file whole and turn it upright, as the camera has noted.

    Args:
        path: The file.
        formats: Formats that are decoded.

    Returns:
        The image.

    Raises:
        ValueError: It cannot be read; the message names the file and the reason.
    """
    try:
        return load_upright(path, formats)
    except Exception as error:  # what a decoder raises depends on where the file is damaged
        raise ValueError(f"{path} cannot be read: {why_unreadable(error, formats)}") from error


def why_unreadable(error: Exception, formats: tuple[str, ...]) -> str:
    """Say in a line why an image could not be read.

    Args:
        error: What reading it raised.
        formats: Formats that were tried.

    Returns:
        The reason, and where there is one the remedy.
    """
    if isinstance(error, UnidentifiedImageError):
        return f"it is no image of the formats {', '.join(formats)}"
    if isinstance(error, Image.DecompressionBombError):
        return f"{' '.join(str(error).split())} Make the image smaller"
    return " ".join(str(error).split()) or type(error).__name__


class Header(NamedTuple):
    """Height, width and channels (1 or 3) of an image file, as a person sees it."""

    height: int
    width: int
    channels: int


def read_header(path: Path, formats: tuple[str, ...] = OWN_FORMATS, *, upright: bool = True) -> Header:
    """Read what an image file says about itself, without its pixels.

    Args:
        path: The file.
        formats: Formats that are decoded.
        upright: Whether height and width are those after the turn that the camera has noted. In a PNG file the note may
            stand at the end, so that the whole file is read for it.

    Returns:
        Height, width and channels.

    Raises:
        ValueError: It is no image that can be used; the message names the reason, not the file.
    """
    try:
        with Image.open(path, formats=formats) as image:
            if image.mode not in _EIGHT_BITS:
                raise ValueError(f"it is of mode {image.mode}, allowed: 8 bits a channel; convert it to RGB or grey")
            turned = upright and image.getexif().get(_ORIENTATION, 1) >= 5  # a quarter turn, with or without a mirror
            height, width = (image.width, image.height) if turned else (image.height, image.width)
            grey = image.mode in _GREY or (image.mode == "P" and _has_grey_palette(image))
            return Header(height, width, 1 if grey else 3)
    except Exception as error:
        raise ValueError(why_unreadable(error, formats)) from error


def _has_grey_palette(image: Image.Image) -> bool:
    colours = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())
