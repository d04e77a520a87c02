"""SVHN, Street View House Numbers (Netzer et al., 2011)."""

from __future__ import annotations

import torch
from torchvision.datasets import SVHN

from calib_lightning.data.card import Card
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.source import Source
from calib_lightning.data.split import File
from calib_lightning.data.web_files import Archive


class SVHNDataModule(DownloadedDataModule):
    """SVHN: 73,257 training and 26,032 test images (3, 32, 32) of digits (Netzer et al., 2011).

    The files label the digit 0 as 10; here it is 0. The 531,131 extra images are not used.

    Args:
        split: How the training images are divided; by default all are for training.
        root: Folder that holds, or will hold, ``train_32x32.mat`` and ``test_32x32.mat``.
        download: Whether to download missing files.
        augment: Whether training images are shifted and mirrored at random; mirrored digits are not digits.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Deviations:
        The papers use the set as out-of-distribution images. Mean and standard deviation of each channel are those of
        its training images, rounded; for out-of-distribution use, a network needs the constants of its own training
        data.

    Example:
        >>> SVHNDataModule(root="data").num_classes
        10
    """

    card = Card(
        10,
        (73_257, 0, 26_032),
        (3, 32, 32),
        246_316_178,
        "non-commercial use only",
        "http://ufldl.stanford.edu/housenumbers/",
    )
    num_classes = 10
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)
    class_names = tuple("0123456789")
    archives = tuple(
        Archive(url, name, md5) for url, name, md5 in (SVHN.split_list[part] for part in ("train", "test"))
    )
    training_files = frozenset({archives[0].name})
    needed = {archive.name: archive.md5 for archive in archives}  # noqa: RUF012

    def load_part(self, part: File) -> Source | None:
        """Read images and labels of the training or the test file."""
        if part == "val":
            return None
        try:
            file = SVHN(self.root, split=part)
        except RuntimeError as error:
            raise self.not_found("prepare_data() has not run on this machine") from error
        return Source(torch.from_numpy(file.data).contiguous(), torch.from_numpy(file.labels).long())
