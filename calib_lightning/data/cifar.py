"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), and CIFAR-10 with people's votes (Peterson et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from calib_lightning.data.array_files import load_npy
from calib_lightning.data.card import Card
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.source import Source
from calib_lightning.data.split import File, SplitSpec
from calib_lightning.data.web_files import Archive, fetch


class CIFAR10DataModule(DownloadedDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images (3, 32, 32) in 10 classes.

    Args:
        split: How the 50,000 training images are divided; by default all are for training.
        root: Folder that holds, or will hold, the folder of the unpacked archive.
        download: Whether to download missing files.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.
        mean: Mean of each channel, as a fraction; ``None`` uses the most common constants; other code differs.
        std: Standard deviation of each channel, as a fraction; ``None`` uses the most common constants.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> CIFAR10DataModule(SplitSpec(val=5000, imbalance=0.1), root="data").num_classes
        10
    """

    card = Card(
        10, (50_000, 0, 10_000), (3, 32, 32), 170_498_071, "not stated", "https://www.cs.toronto.edu/~kriz/cifar.html"
    )
    num_classes = 10
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465)
    std: Sequence[float] = (0.2023, 0.1994, 0.2010)
    class_names: Sequence[str] | None = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    source: ClassVar[type[CIFAR10]] = CIFAR10
    unpacks = True

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        augment: bool = True,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, augment=augment, **options)
        self.mean, self.std = mean or self.mean, std or self.std
        source = self.source  # torchvision lists the files and their checksums
        files = (*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"]))
        self.needed = {f"{source.base_folder}/{name}": md5 for name, md5 in files}
        self.archives = (Archive(source.url, source.filename, source.tgz_md5),)

    def load_part(self, part: File) -> Source | None:
        """Read images and labels of the training or the test file."""
        if part == "val":
            return None
        try:
            file: Any = self.source(self.root, train=part == "train", download=False)
        except RuntimeError as error:
            raise self.not_found("prepare_data() has not run on this machine") from error
        self.class_names = tuple(file.classes)
        return Source(torch.from_numpy(file.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(file.targets))


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images (3, 32, 32) in 100 classes (the fine labels).

    Args:
        split: How the 50,000 training images are divided; by default all are for training.
        root: Folder that holds, or will hold, the folder of the unpacked archive.
        download: Whether to download missing files.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.
        mean: Mean of each channel, as a fraction; ``None`` uses that of the set; other code differs.
        std: Standard deviation of each channel, as a fraction; ``None`` uses that of the set.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> CIFAR100DataModule(SplitSpec(imbalance=0.1), root="data").num_classes
        100
    """

    card = Card(
        100, (50_000, 0, 10_000), (3, 32, 32), 169_001_437, "not stated", "https://www.cs.toronto.edu/~kriz/cifar.html"
    )
    num_classes = 100
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
    class_names = None
    source: ClassVar[type[CIFAR10]] = CIFAR100


class CIFAR10HDataModule(CIFAR10DataModule):
    """CIFAR-10 with about 51 people's answers to each of the 10,000 test images (Peterson et al., ICCV 2019).

    Training, splits and test labels are those of CIFAR-10. A test also reports ``test/soft_nll``, ``test/soft_brier``
    and ``test/label_entropy``: scores against the distribution of answers instead of a single label.

    Args:
        split: How the 50,000 training images are divided; by default all are for training.
        root: Folder that holds, or will hold, the folders ``cifar-10-batches-py`` and ``cifar-10h``.
        download: Whether to download missing files.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.
        mean: As in `CIFAR10DataModule`.
        std: As in `CIFAR10DataModule`.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> CIFAR10HDataModule(root="data").num_classes
        10
    """

    card = Card(
        10,
        (50_000, 0, 10_000),
        (3, 32, 32),
        171_298_199,
        "votes CC BY-NC-SA 4.0; images not stated",
        "https://github.com/jcpeterson/cifar-10h",
    )
    votes: ClassVar[Archive] = Archive(
        "https://raw.githubusercontent.com/jcpeterson/cifar-10h/master/data/cifar10h-counts.npy", "cifar10h-counts.npy"
    )

    def prepare_data(self) -> None:
        """Check the files of CIFAR-10 and of the votes, and download what is missing.

        Raises:
            FileNotFoundError: If files are missing or damaged and were not, or could not be, downloaded.
        """
        super().prepare_data()
        path = self._path
        if path.is_file():
            return
        advice = f"Set download=True, or put the file from {self.votes.url} there."
        if not self.download:
            raise FileNotFoundError(f"{path} does not exist (download=False). {advice}")
        try:
            fetch(self.votes, path.parent)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{path} does not exist (the download failed: {error}). {advice}") from error

    def load_test(self) -> Source:
        """Read the test images and the votes.

        Raises:
            ValueError: If the votes do not match the test images in their order.
        """
        source, counts = super().load_test(), load_npy(self._path)
        assert source is not None
        shape = (len(source.label), self.num_classes)
        if counts.shape != shape or counts.dtype.kind not in "iu" or counts.min() < 0 or counts.sum(1).min() == 0:
            raise ValueError(
                f"{self._path} holds {counts.dtype} of shape {counts.shape}; it must hold integers of shape {shape}, "
                "the votes per class. Delete it to download it again."
            )
        votes = torch.from_numpy(counts).double()
        agree = float((votes.argmax(dim=1) == source.label).double().mean())
        if agree < 0.9:  # 0.9921 in the official order
            raise ValueError(
                f"The most common vote in {self._path} matches the label for {agree:.1%} of the test images; it should "
                "for 99 %, so the rows are in another order. Delete it to download it again."
            )
        self._distributions = votes / votes.sum(dim=1, keepdim=True)
        return source

    @property
    def identity(self) -> str:
        """That of CIFAR-10: a network trained on CIFAR-10 must not be calibrated on its training images here."""
        return CIFAR10DataModule.__qualname__

    def label_distributions(self, name: str) -> Tensor | None:
        """Fraction of people who chose each class.

        Args:
            name: Name of a set.

        Returns:
            ``(N, K)`` float64 in the order of ``Batch.index``; ``None`` for sets without votes.
        """
        if name not in self.splits or self.source_files.get(name) != "test":
            return None
        return self._distributions[torch.from_numpy(self.source_rows(name))]

    @property
    def _path(self) -> Path:
        return self.root / "cifar-10h" / self.votes.name
