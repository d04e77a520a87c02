"""What is to be known of a benchmark before it is downloaded."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """The facts of a benchmark, beside its data module.

    ``calib data list`` reads them from the source, without an import, so they are literals in the order
    of the fields.

    Attributes:
        classes: K; ``None`` if it depends on the files.
        images: Number of training, validation and test images in the official files, 0 where there are none; ``None``
            if it depends on the files.
        shape: Channels, height and width of a network's input; ``None`` if it depends on the files.
        download: Bytes to download, or to get by hand; 0 if there are none, ``None`` if nobody states them.
        licence: As the authors state it; "not stated" if they do not.
        home: Home page, or where the files are.
    """

    classes: int | None
    images: tuple[int, int, int] | None
    shape: tuple[int, int, int] | None
    download: int | None
    licence: str
    home: str
