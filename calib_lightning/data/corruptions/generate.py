"""Corrupt images: which function, which constants, which random numbers, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib_lightning.data.corruptions import blur, colour, digital, elastic, noise, spatter, weather
from calib_lightning.data.corruptions.constants import (
    CORRUPTIONS,
    ELASTIC_SIDE,
    FROST_STEP,
    SEVERITIES,
    TABLES,
    Table,
)
from calib_lightning.data.corruptions.draws import Floats, Images, Streams, streams
from calib_lightning.data.corruptions.filters import grey, levels
from calib_lightning.data.corruptions.photographs import frost_photographs
from calib_lightning.utils.names import did_you_mean

_MADE: dict[str, Callable[..., Floats | Images]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": colour.brightness,
    "contrast": colour.contrast,
    "elastic_transform": elastic.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "gaussian_blur": blur.gaussian_blur,
    "saturate": colour.saturate,
    "spatter": spatter.spatter,
    "speckle_noise": noise.speckle_noise,
}
_COLOURED = ("frost", "saturate", "spatter")  # grey images take the luminance of what happens to their colour
_LEAST_SIDE = 3  # elastic_transform needs three points
_BLOCK = 2**20  # values of a block: a few megabytes for each array, which a cache can hold
_MOST_THREADS = 8


def check_corruption(corruption: str, severity: int | None = None, table: str | None = None) -> None:
    """Raise if there is no such corruption, severity or table.

    Args:
        corruption: Name of the corruption.
        severity: Its severity; ``None`` leaves it out.
        table: Name of the table of constants; ``None`` leaves it out.

    Raises:
        ValueError: If one of them is unknown.

    Example:
        >>> check_corruption("fogg", 3)
        Traceback (most recent call last):
        ValueError: corruption is 'fogg'; it must be one of gaussian_noise, shot_noise, impulse_noise, defocus_blur, \
glass_blur, motion_blur, zoom_blur, snow, frost, fog, brightness, contrast, elastic_transform, pixelate, \
jpeg_compression, gaussian_blur, saturate, spatter, speckle_noise. Did you mean fog?
    """
    if corruption not in CORRUPTIONS:
        near = did_you_mean(str(corruption), CORRUPTIONS)
        raise ValueError(f"corruption is {corruption!r}; it must be one of {', '.join(CORRUPTIONS)}.{near}")
    if severity is not None and (type(severity) is not int or severity not in SEVERITIES):
        raise ValueError(f"severity is {severity!r}; it must be one of {', '.join(map(str, SEVERITIES))}.")
    if table is not None and table not in TABLES:
        near = did_you_mean(str(table), TABLES)
        raise ValueError(f"table is {table!r}; it must be one of {', '.join(TABLES)}.{near}")


def corrupt(
    image: Tensor,
    corruption: str,
    severity: int,
    rows: Tensor,
    *,
    table: Table,
    seed: int = 0,
    frost: Sequence[Images] | None = None,
) -> Tensor:
    r"""Corrupt images as Hendrycks and Dietterich (2019) do for CIFAR-C and ImageNet-C.

    .. math:: \tilde x_i = \lfloor 255\,\mathrm{clip}(f_c(x_i / 255;\ \mathrm{seed}, c, \mathrm{severity}, i))\rfloor

    with the corruption f and its constants c at that severity: its module has the formula. An image's random numbers
    come from (seed, corruption, severity, row) alone, so a row is the same in any batch, order, process and number of
    threads. Grey images are corrupted in their one channel; frost, saturate and spatter colour them and the luminance
    (ITU-R 601) comes back.

    Args:
        image: Images ``(N, C, H, W)`` of type uint8, of one or three channels and at least 3 pixels a side.
        corruption: One of `CORRUPTIONS`.
        severity: 1 to 5.
        rows: Row numbers ``(N,)`` of type int64, not negative.
        table: "cifar" or "imagenet", see `table_for`. Radii are in pixels of 32 and 224, whatever the size;
            elastic_transform's distances are shares of the smaller side.
        seed: Seed of the random numbers.
        frost: Photographs (H, W, 3) for "frost", each drawn with equal chances; ``None`` means those of
            `frost_photographs`. Photographs smaller than the image are enlarged.

    Returns:
        Corrupted images ``(N, C, H, W)`` of type uint8, on the CPU.

    Raises:
        ValueError: If an argument is not as described.
        FileNotFoundError: If frost is asked for and there are no photographs.

    Deviations:
        The random numbers are not those of the published files, so a score on these images is not a CIFAR-C score.
        Motion blur repeats the edge also where it reaches across the whole image. A spatter image without a drop,
        whose relief would be divided by zero, is left as it is.

    Example:
        >>> image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> corrupt(image, "brightness", 3, torch.arange(2), table="cifar")[0, 0, 0, 0]
        tensor(38, dtype=torch.uint8)
    """
    check_corruption(corruption, severity, table)
    _check_images(image, rows, seed)
    constants = _constants(corruption, severity, table, image.shape[-2:])
    function = _function(corruption, table, image.shape[-2:], frost)
    pixels, numbers = image.detach().cpu().numpy(), rows.tolist()
    corrupted = np.empty(pixels.shape, dtype=np.uint8)
    code = CORRUPTIONS.index(corruption)
    several = corruption in _COLOURED and image.shape[1] == 1

    def fill(start: int) -> None:
        block = slice(start, start + size)
        part = np.ascontiguousarray(pixels[block])
        if several:
            part = np.repeat(part, 3, axis=1)
        x = function(part, constants, streams(seed, code, severity, numbers[block]))
        corrupted[block] = levels(grey(np.clip(x, 0, 1).astype(np.float32, copy=False)) if several else x)

    threads = min(torch.get_num_threads(), _MOST_THREADS)
    size = max(min(_BLOCK // math.prod(image.shape[1:]), math.ceil(len(image) / threads)), 1)
    starts = range(0, len(image), size)
    if threads == 1 or len(starts) == 1:
        for start in starts:
            fill(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, starts))
    return torch.from_numpy(corrupted)


def unavailable(corruptions: Sequence[str], frost_folder: str | Path | None = None) -> dict[str, str]:
    """Say which corruptions cannot be generated here, before a run begins.

    Args:
        corruptions: Some of `CORRUPTIONS`.
        frost_folder: Folder of frost photographs; ``None`` means those of the extra ``corruptions``.

    Returns:
        The reason by corruption, for those that cannot be.

    Raises:
        ValueError: If a corruption is unknown.

    Example:
        >>> unavailable(["fog", "gaussian_noise"])
        {}
    """
    reasons = {}
    for corruption in corruptions:
        check_corruption(corruption)
        try:
            if corruption == "frost":
                frost_photographs(frost_folder)
        except (OSError, ValueError) as error:
            reasons[corruption] = str(error)
    return reasons


def _function(
    corruption: str, table: Table, size: tuple[int, ...], frost: Sequence[Images] | None
) -> Callable[[Images, Any, Streams], Floats | Images]:
    """The function of a corruption, with the photographs if it needs some."""
    if corruption != "frost":
        return _MADE[corruption]
    photographs = frost_photographs() if frost is None else frost
    if not photographs or any(one.dtype != np.uint8 or one.ndim != 3 or one.shape[2] != 3 for one in photographs):
        raise ValueError("frost must be one or more uint8 photographs (H, W, 3), as `frost_photographs` gives them.")
    return partial(weather.frost, photographs=weather.fitted(photographs, FROST_STEP[table], *size))


def _constants(corruption: str, severity: int, table: Table, size: tuple[int, ...]) -> Any:
    """The constants of a corruption, in pixels."""
    constants = TABLES[table][corruption][severity - 1]
    if corruption == "elastic_transform":
        return tuple(value * min(size) * ELASTIC_SIDE[table] for value in constants)
    return constants


def _check_images(image: Tensor, rows: Tensor, seed: int) -> None:
    if image.dtype != torch.uint8 or image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ValueError(
            f"image is {image.dtype} {tuple(image.shape)}; it must be uint8 (N, C, H, W) of 1 or 3 channels. Give the "
            "images before they are normalised."
        )
    if min(image.shape[-2:]) < _LEAST_SIDE:
        raise ValueError(
            f"image has {image.shape[-2]} x {image.shape[-1]} pixels; it must have at least {_LEAST_SIDE} on each side."
        )
    if rows.dtype != torch.int64 or rows.shape != image.shape[:1]:
        raise ValueError(f"rows is {rows.dtype} {tuple(rows.shape)}; it must be int64 {tuple(image.shape[:1])}.")
    if len(rows) and int(rows.min()) < 0:
        raise ValueError(f"rows has {int(rows.min())}; it must have no negative number.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
