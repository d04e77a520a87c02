"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec


class CIFAR10DataModule(BenchmarkDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images (3, 32, 32) in 10 classes.

    Args:
        split: How the 50,000 training images are divided; by default all are for training.
        batch_size: Rows of one batch of one process.
        num_workers: Processes that prepare batches.
        root: Folder that holds, or will hold, the folder of the unpacked archive.
        download: Whether to download what is missing.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.

    Example:
        >>> CIFAR10DataModule(SplitSpec(val=5000, imbalance=0.1), root="data").num_classes
        10
    """

    num_classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)
    source: ClassVar[type[CIFAR10]] = CIFAR10

    def __init__(
        self,
        split: SplitSpec | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        root: str | Path = "data",
        download: bool = True,
        augment: bool = True,
    ) -> None:
        super().__init__(split, batch_size, num_workers)
        self.root = Path(root).expanduser().resolve()
        self.download, self.augment = download, augment

    def prepare_data(self) -> None:
        """Check the files and download the archive where they are not whole; processes take turns.

        Raises:
            FileNotFoundError: If files are missing or damaged and were not or could not be downloaded.
        """
        if not self._faults():
            return
        if not self.download:
            raise self._not_found("download=False")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with _locked(self.root / f".{self.source.filename}.lock"):
                self.source(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise self._not_found(f"the download failed: {error}") from error

    def load_train(self) -> Source:
        """Read the training images."""
        return self._load(train=True)

    def load_test(self) -> Source:
        """Read the test images."""
        return self._load(train=False)

    def _load(self, *, train: bool) -> Source:
        try:
            file: Any = self.source(self.root, train=train, download=False)
        except RuntimeError as error:
            raise self._not_found("prepare_data() has not run on this machine") from error
        return Source(torch.from_numpy(file.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(file.targets))

    def _faults(self) -> list[str]:
        """What is wrong with each expected file; nothing if all are whole."""
        faults = []
        meta = (self.source.meta["filename"], self.source.meta["md5"])
        for name, expected in (*self.source.train_list, *self.source.test_list, meta):
            path = self.root / self.source.base_folder / name
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else None
            if found != expected:
                state = "missing" if found is None else f"damaged, its md5 is {found}"
                faults.append(f"  {self.source.base_folder}/{name}: {state}, expected md5 {expected}")
        return faults

    def _not_found(self, reason: str) -> FileNotFoundError:
        lines = "\n".join(self._faults())
        return FileNotFoundError(
            f"{type(self).__name__} cannot use the files under root={str(self.root)!r} ({reason}):\n{lines}\n"
            f"Set download=True, or unpack {self.source.filename} (md5 {self.source.tgz_md5}, from {self.source.url})"
            f" in that folder, or set root to the folder that holds {self.source.base_folder}."
        )


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images (3, 32, 32) in 100 classes (the fine labels).

    Args:
        split: How the 50,000 training images are divided; by default all are for training.
        batch_size: Rows of one batch of one process.
        num_workers: Processes that prepare batches.
        root: Folder that holds, or will hold, the folder of the unpacked archive.
        download: Whether to download what is missing.
        augment: Whether training images are cropped (4 pixels of padding) and mirrored at random.

    Example:
        >>> CIFAR100DataModule(SplitSpec(imbalance=0.1), root="data").num_classes
        100
    """

    num_classes = 100
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
    source: ClassVar[type[CIFAR10]] = CIFAR100


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock; the system frees it when its holder dies."""
    import fcntl  # exists on POSIX systems only, and only a download needs it

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
