"""Tiny ImageNet (Stanford CS231n, 2015)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch

from calib_lightning.data.card import Card
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.folders import check_counts, class_files
from calib_lightning.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from calib_lightning.data.sets import ImageFiles
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec
from calib_lightning.data.web_files import Archive
from calib_lightning.utils.images import Frame

_FOLDER, _SUFFIXES = "tiny-imagenet-200", (".jpeg",)


class TinyImageNetDataModule(DownloadedDataModule):
    """Tiny ImageNet: 100,000 training and 10,000 test images (3, 64, 64) in 200 classes (Le and Yang, 2015).

    The test set is the official validation set, because the official test images have no labels. Labels are the ranks
    of the WordNet ids, as in torchvision's ``ImageFolder``. Files are decoded on demand.

    Args:
        split: How the 100,000 training images are divided; by default, 5,000 are for validation and 10,000 for
            calibration.
        root: Folder that holds, or will hold, the folder ``tiny-imagenet-200``.
        download: Whether to download missing files.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> TinyImageNetDataModule(SplitSpec(imbalance=0.1), root="data").num_classes
        200

    Deviations:
        Mukhoti et al. (2020) fit the temperature on the test images; here it is fitted on held-out training images.
    """

    card = Card(200, (100_000, 0, 10_000), (3, 64, 64), 248_100_043, "not stated", "http://cs231n.stanford.edu/")
    num_classes = 200
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    default_split: ClassVar[SplitSpec] = SplitSpec(val=5_000, calibration=10_000)
    archives = (
        Archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "tiny-imagenet-200.zip",
            "90528d7ca1a48142e341f4ef8d21d0de",
            248_100_043,
        ),
    )
    unpacks = True
    train_count: ClassVar[int] = 500  # images per class
    test_count: ClassVar[int] = 50

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        augment: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, augment=augment, **options)
        self.needed = {f"{_FOLDER}/{name}": None for name in ("wnids.txt", "words.txt", "val/val_annotations.txt")}

    def load_train(self) -> Source:
        """List the training images.

        Raises:
            FileNotFoundError: If the files or all images of a class are missing.
            ValueError: If the counts are wrong.
        """
        wnids, folder = self._wnids(), self.root / _FOLDER / "train"
        lines = (self.root / _FOLDER / "words.txt").read_text("utf-8").splitlines()
        words = dict(line.split("\t", 1) for line in lines if "\t" in line)
        self.class_names = tuple(words.get(wnid, wnid) for wnid in wnids)
        names, label = class_files(folder, wnids, _SUFFIXES)
        check_counts(folder, wnids, label, self.train_count)
        return Source(ImageFiles(folder, names, Frame((64, 64))), label)

    def load_test(self) -> Source:
        """List the test images, in the order of the official label file.

        Raises:
            FileNotFoundError: If images are missing.
            ValueError: If the counts are wrong.
        """
        wnids, folder = self._wnids(), self.root / _FOLDER / "val"
        path = folder / "val_annotations.txt"
        rows = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line]
        names, rank = [f"images/{row[0]}" for row in rows], {wnid: label for label, wnid in enumerate(wnids)}
        if faulty := [row for row in rows if len(row) < 2 or row[1] not in rank]:
            raise ValueError(
                f"{path} has the line {faulty[0]}; its second word must be a class of wnids.txt. Unpack it again."
            )
        label = torch.tensor([rank[row[1]] for row in rows], dtype=torch.int64)
        check_counts(path, wnids, label, self.test_count)
        found, _ = class_files(folder, ["images"], _SUFFIXES)
        if missing := sorted((Counter(names) - Counter(found)).elements()):
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of {len(names)} images, such as {missing[0]}. Remove "
                f"{self.root / _FOLDER} to unpack it again."
            )
        return Source(ImageFiles(folder, names, Frame((64, 64))), label)

    def _wnids(self) -> list[str]:
        """Class ids in label order, which is not the order of the file."""
        if self.faults():
            raise self.not_found("prepare_data() has not run on this machine, or its files were moved")
        path = self.root / _FOLDER / "wnids.txt"
        wnids = sorted(set(path.read_text("utf-8").split()))
        if len(wnids) != self.num_classes:
            raise ValueError(f"{path} has {len(wnids)} classes; it must have {self.num_classes}. Unpack it again.")
        return wnids
