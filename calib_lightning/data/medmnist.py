"""MedMNIST v2 (Yang et al., 2023): medical images in the format of MNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from calib_lightning.data.array_files import load_npz
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.source import Source
from calib_lightning.data.split import File, SplitSpec
from calib_lightning.data.web_files import Archive


class MedMNISTDataModule(DownloadedDataModule):
    """A 2-D set of MedMNIST v2 with one label per image (Yang et al., Scientific Data 2023).

    Every set has official training, validation and test images. Its description comes from the package ``medmnist``.
    All images are held in memory.

    Args:
        split: How the files are divided; by default the official validation images are also the calibration images, as
            in the papers.
        name: "bloodmnist", "pathmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist",
            "tissuemnist", "organamnist", "organcmnist" or "organsmnist".
        size: Height and width in pixels: 28, 64, 128 or 224.
        root: Folder that holds, or will hold, ``<name>.npz`` (28 pixels) or ``<name>_<size>.npz``.
        download: Whether to download the file if it is missing.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Raises:
        ValueError: If the set does not exist, has several labels per image, or is 3-D.

    Example:
        >>> data = MedMNISTDataModule(name="breastmnist")
        >>> data.num_classes, data.class_names
        (2, ('malignant', 'normal, benign'))

    Deviations:
        The checksum is only verified after a download. Another file with the right counts is accepted, as in
        ``medmnist``. The grades of RetinaMNIST are treated as unordered classes.
    """

    downloads: ClassVar[dict[str, int]] = {
        "bloodmnist": 35_461_855,
        "breastmnist": 559_580,
        "dermamnist": 19_700_000,
        "octmnist": 54_900_000,
        "organamnist": 38_200_000,
        "organcmnist": 15_500_000,
        "organsmnist": 16_500_000,
        "pathmnist": 205_615_438,
        "pneumoniamnist": 4_170_000,
        "retinamnist": 3_290_000,
        "tissuemnist": 125_000_000,
    }
    """Bytes of each file of 28 pixels, some rounded; the other facts of a `Card` are in ``medmnist.INFO``."""
    official_val = True
    default_split: ClassVar[SplitSpec] = SplitSpec(share=True)

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        name: str = "bloodmnist",
        size: int = 28,
        root: str | Path = "data",
        download: bool = True,
        augment: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, augment=augment, **options)
        self.name, self.size, self._info = name, size, _info(name)
        suffix = "" if size == 28 else f"_{size}"
        if f"MD5{suffix}" not in self._info:
            raise ValueError(f"size is {size}; it must be one of 28, 64, 128, 224.")
        self.archives = (Archive(self._info[f"url{suffix}"], f"{name}{suffix}.npz", self._info[f"MD5{suffix}"]),)
        self.needed = {self.archives[0].name: None}
        self.class_names = tuple(self._info["label"][label] for label in sorted(self._info["label"], key=int))
        self.num_classes = len(self.class_names)
        self.mean = self.std = (0.5,) * self._info["n_channels"]

    @property
    def identity(self) -> str:
        """Name of the data, including set and size."""
        return f"{super().identity} {self.name} {self.size}"

    def load_part(self, part: File) -> Source:
        """Read images and labels of one of the three parts."""
        if self.faults():
            raise self.not_found("prepare_data() has not run on this machine")
        path = self.root / self.archives[0].name
        arrays = load_npz(path, [f"{part}_images", f"{part}_labels"])
        count, colours = self._info["n_samples"][part], (3,) if self._info["n_channels"] == 3 else ()
        shapes = ((count, self.size, self.size, *colours), (count, 1))
        for (name, array), shape in zip(arrays.items(), shapes, strict=True):
            if array.shape != shape or array.dtype.kind not in "iu":
                raise ValueError(
                    f"{path}: {name} is {array.dtype} of shape {array.shape}; it must hold integers of shape {shape}. "
                    "Delete the file to download it again."
                )
        pixels, labels = arrays.values()
        image = torch.from_numpy(pixels.reshape(count, self.size, self.size, -1)).permute(0, 3, 1, 2).contiguous()
        return Source(image, torch.from_numpy(labels[:, 0].astype(np.int64)))


def _info(name: str) -> dict[str, Any]:
    """``medmnist``'s description of a supported set."""
    from medmnist.info import INFO  # takes seconds

    known: dict[str, Any] = INFO
    ours = {key: info for key, info in known.items() if not key.endswith("3d") and "multi-label" not in info["task"]}
    if name in ours:
        return dict(ours[name])
    reason = ""
    if name in known:
        reason = " That set is 3-D." if name.endswith("3d") else " That set has several labels per image."
    raise ValueError(f"name is {name!r}; it must be one of {', '.join(ours)}.{reason}")
