"""Photographs of frost: from a folder, or those that an installed package ships."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np

from calib_lightning.data.corruptions.draws import Images
from calib_lightning.utils.images import in_colours, read_image

_PACKAGE, _NAMES = "imagecorruptions", ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_LEAST = 5
_WAYS = (
    "Give a folder of frost photographs, or `pip install 'calib-lightning[corruptions]'`, or leave out the corruption "
    "frost."
)


def frost_photographs(folder: str | Path | None = None) -> list[Images]:
    """Read photographs of frost, for the corruption "frost".

    Args:
        folder: Folder of at least five image files; all are used. ``None`` means the photographs of the package
            ``imagecorruptions-imaug`` (extra ``corruptions``), which is looked for and not imported. It ships six, of
            which the authors of the benchmark drew the first five: the sixth is not used.

    Returns:
        Images (H, W, 3) of type uint8, in the order of their names.

    Raises:
        ValueError: If the folder does not have five images, or one cannot be read.
        FileNotFoundError: If there is no such folder, or no folder is given and the package is not installed.

    Example:
        >>> frost_photographs("no-such-folder")
        Traceback (most recent call last):
        FileNotFoundError: frost folder is no-such-folder; it must be a folder of photographs. Give a folder of frost \
photographs, or `pip install 'calib-lightning[corruptions]'`, or leave out the corruption frost.
    """
    if folder is None:
        return list(_of_package())
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"frost folder is {folder}; it must be a folder of photographs. {_WAYS}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if len(paths) < _LEAST:
        raise ValueError(f"{folder} has {len(paths)} images; it must have at least {_LEAST} photographs of frost.")
    return [_read(path) for path in paths]


@functools.cache
def _of_package() -> tuple[Images, ...]:
    spec = importlib.util.find_spec(_PACKAGE)
    places = [] if spec is None else [Path(place) / "frost" for place in spec.submodule_search_locations or ()]
    for place in places:
        if all((place / name).is_file() for name in _NAMES):
            return tuple(_read(place / name) for name in _NAMES)
    raise FileNotFoundError(f"There are no photographs of frost here. {_WAYS}")


def _read(path: Path) -> Images:
    return np.asarray(in_colours(read_image(path), 3))
