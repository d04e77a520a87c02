"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST

from calib_lightning.data.card import Card
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.source import Source
from calib_lightning.data.split import File
from calib_lightning.data.web_files import Archive

_UNSIGNED_BYTES = 8


class MNISTDataModule(DownloadedDataModule):
    """MNIST: 60,000 training and 10,000 test images (1, 28, 28) of handwritten digits (LeCun et al., 1998).

    Files may be compressed (``.gz``) or not; the images are checked rather than the bytes, since files may have been
    recompressed.

    Args:
        split: How the 60,000 training images are divided; by default all are for training.
        root: Folder that holds, or will hold, ``MNIST/raw`` with the four files.
        download: Whether to download missing files.
        augment: Whether training images are shifted and mirrored at random; mirrored digits are not digits.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> MNISTDataModule(root="data").class_names[3]
        '3'
    """

    card = Card(10, (60_000, 0, 10_000), (1, 28, 28), 11_594_722, "not stated", "http://yann.lecun.com/exdb/mnist/")
    num_classes = 10
    mean = (0.1307,)
    std = (0.3081,)
    class_names = tuple("0123456789")
    source: ClassVar[type[MNIST]] = MNIST
    training_files = frozenset({"train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"})
    sizes: ClassVar[dict[str, int]] = {"train": 60_000, "t10k": 10_000}

    @property
    def folder(self) -> str:  # type: ignore[override]
        """Folder in which torchvision keeps the files."""
        return f"{self.source.__name__}/raw"

    @property
    def archives(self) -> tuple[Archive, ...]:  # type: ignore[override]
        """The missing files, compressed or not."""
        resources = ((Path(name).name, md5) for name, md5 in self.source.resources)
        return tuple(
            Archive(self.source.mirrors[0] + name, name, md5) for name, md5 in resources if self._found(name) is None
        )

    def bad_files(self) -> dict[str, str]:
        """Files that exist neither compressed nor uncompressed."""
        return {f"{self.folder}/{file.name}": f"missing, expected md5 {file.md5}" for file in self._wanted_archives()}

    def _found(self, name: str) -> Path | None:
        path = self.root / self.folder / name
        return next((file for file in (path, path.with_suffix("")) if file.is_file()), None)

    def load_part(self, part: File) -> Source | None:
        """Read images and labels of the training or the test file."""
        if part == "val":
            return None
        name = "train" if part == "train" else "t10k"
        files = [self._found(f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")]
        if files[0] is None or files[1] is None:
            raise self.not_found("prepare_data() has not run on this machine")
        rows = self.sizes[name]
        return Source(read_idx(files[0], (rows, 28, 28)).unsqueeze(1), read_idx(files[1], (rows,)).long())


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images (1, 28, 28) of clothes (Xiao, Rasul and Vollgraf, 2017).

    Args:
        split: How the 60,000 training images are divided; by default all are for training.
        root: Folder that holds, or will hold, ``FashionMNIST/raw`` with the four files.
        download: Whether to download missing files.
        augment: Whether training images are shifted by up to 4 pixels and mirrored at random.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> FashionMNISTDataModule(root="data").class_names[9]
        'Ankle boot'
    """

    card = Card(
        10, (60_000, 0, 10_000), (1, 28, 28), 30_878_645, "MIT", "https://github.com/zalandoresearch/fashion-mnist"
    )
    mean = (0.2860,)
    std = (0.3530,)
    class_names = tuple(FashionMNIST.classes)
    source: ClassVar[type[MNIST]] = FashionMNIST


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Read unsigned bytes of the given shape from a file in IDX format, gzipped if its name ends in ``.gz``."""
    remedy = "Delete it to download it again."
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}). {remedy}") from error
    start = 4 + 4 * len(shape)
    sizes = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist()) if len(content) >= start else ()
    if content[:4] != bytes((0, 0, _UNSIGNED_BYTES, len(shape))) or sizes != shape:
        raise ValueError(f"{path} must hold unsigned bytes of shape {shape}; found {sizes or 'no IDX file'}. {remedy}")
    if len(content) != start + int(np.prod(shape)):
        raise ValueError(f"{path} has {len(content)} bytes; it must have {start + int(np.prod(shape))}. {remedy}")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy())
