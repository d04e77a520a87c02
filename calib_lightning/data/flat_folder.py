"""Images in one folder, without classes: of other classes than a network knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calib_lightning.data.divided import DividedData
from calib_lightning.data.image_checks import SUFFIXES, looked_at
from calib_lightning.data.sets import ImageFiles
from calib_lightning.data.source import Source
from calib_lightning.utils.images import Frame


class FlatFolder(DividedData):
    """All image files in a folder and its subfolders, as images of other classes; a network's data says their frame.

    Args:
        root: The folder.
        **settings: Those of `FolderDataModule`, which mean nothing without labels.

    Raises:
        FileNotFoundError: If the folder has no images.
    """

    num_classes = 0

    def __init__(self, root: str | Path = "data", **settings: Any) -> None:
        super().__init__()
        self.root = Path(root).expanduser().resolve()
        paths = (path for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        inside = (path.relative_to(self.root) for path in paths)
        self.names = sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))
        if not self.names:
            raise FileNotFoundError(f"{self.root} has no images ({', '.join(SUFFIXES)}). Set root to a folder of some.")

    def prepare_data(self) -> None:
        """Check every image file, or an even sample of 100,000.

        Raises:
            ValueError: If some cannot be read; the message names them.
        """
        looked_at(self.root, [self.root / name for name in self.names])

    def load_test(self) -> Source:
        """List the images."""
        frame = Frame((1, 1))  # replaced by that of the network
        return Source(ImageFiles(self.root, self.names, frame), torch.zeros(len(self.names), dtype=torch.int64))
