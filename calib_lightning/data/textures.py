"""Describable textures (Cimpoi et al., CVPR 2014)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision.datasets import DTD

from calib_lightning.data.card import Card
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.folders import check_counts
from calib_lightning.data.imagenet import IMAGENET_MEAN, IMAGENET_STD, imagenet_frame
from calib_lightning.data.sets import ImageFiles
from calib_lightning.data.source import Source
from calib_lightning.data.split import File, SplitSpec
from calib_lightning.data.web_files import Archive


class TexturesDataModule(DownloadedDataModule):
    """Describable Textures Dataset: 47 classes, 1,880 images each for training, validation and test (Cimpoi, 2014).

    Images of any size are prepared like those of ImageNet. Labels are the ranks of the class names.

    Args:
        split: How the files are divided; by default, half of the official validation images, 20 per class, are for
            calibration.
        root: Folder that holds, or will hold, the folder ``dtd``.
        download: Whether to download missing files.
        augment: Whether training images are cropped (8 % to all of the area) and mirrored at random.
        size: Height and width of the network's input in pixels.
        partition: Number of the official division, 1 to 10.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Raises:
        ValueError: If a value is invalid.

    Example:
        >>> TexturesDataModule(root="data", partition=1).num_classes
        47

    Deviations:
        The authors report the mean over ten partitions; a run here uses one.
    """

    card = Card(
        47,
        (1_880, 1_880, 1_880),
        (3, 224, 224),
        625_239_812,
        "for research purposes",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    )
    num_classes = 47
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    crop_scale = (0.08, 1.0)
    official_val = True
    default_split: ClassVar[SplitSpec] = SplitSpec(calibration=0.5, calibration_from="val", choose="proportional")
    archives = (Archive(DTD._URL, "dtd-r1.0.1.tar.gz", DTD._MD5),)
    unpacks = True
    class_count: ClassVar[int] = 40  # images per class and file

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        augment: bool = True,
        size: int = 224,
        partition: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, augment=augment, **options)
        if partition not in range(1, 11):
            raise ValueError(f"partition is {partition}; it must be in 1..10. The usual choice is 1.")
        self.partition, self._frame = partition, imagenet_frame(size, "center")
        self.needed = {f"dtd/labels/{part}{partition}.txt": None for part in ("train", "val", "test")}

    def load_part(self, part: File) -> Source:
        """List the images of one of the three parts."""
        if self.faults():
            raise self.not_found("prepare_data() has not run on this machine")
        path, images = self.root / f"dtd/labels/{part}{self.partition}.txt", self.root / "dtd/images"
        names = path.read_text("utf-8").split()
        classes = sorted({name.split("/")[0] for name in names})
        if len(classes) != self.num_classes:
            raise ValueError(f"{path} has {len(classes)} classes; it must have {self.num_classes}. Unpack it again.")
        label = torch.tensor([classes.index(name.split("/")[0]) for name in names])
        check_counts(path, classes, label, self.class_count)
        if missing := [name for name in names if not (images / name).is_file()]:
            raise FileNotFoundError(
                f"{images} lacks {len(missing)} of {len(names)} {part} images, such as {missing[0]}. Remove "
                f"{self.root / 'dtd'} to unpack it again."
            )
        self.class_names = tuple(classes)
        return Source(ImageFiles(images, names, self._frame), label)
