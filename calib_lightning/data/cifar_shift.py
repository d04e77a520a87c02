"""Other images of CIFAR's classes, for evaluation only: CIFAR-10.1, CIFAR-10.2, CIFAR-10-C and CIFAR-100-C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from calib_lightning.data.array_files import load_npy, load_npz, mapped
from calib_lightning.data.card import Card
from calib_lightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from calib_lightning.data.corruptions import CORRUPTIONS, SEVERITIES
from calib_lightning.data.downloads import DownloadedDataModule
from calib_lightning.data.source import Source
from calib_lightning.data.split import SplitSpec
from calib_lightning.data.web_files import Archive

_ROWS = 10_000  # per severity


class _CIFAR10Shift(DownloadedDataModule):
    """The constants of sets with CIFAR-10's classes."""

    num_classes = CIFAR10DataModule.num_classes
    mean: Sequence[float] = CIFAR10DataModule.mean
    std: Sequence[float] = CIFAR10DataModule.std
    class_names: Sequence[str] | None = CIFAR10DataModule.class_names


class CIFAR101DataModule(_CIFAR10Shift):
    """CIFAR-10.1: new test images for CIFAR-10 (Recht, Roelofs, Schmidt and Shankar, 2018), one set for evaluation.

    The set is ``shift/cifar10_1_<version>``.

    Args:
        split: Unused: there is nothing to split.
        root: Folder that holds, or will hold, the folder ``cifar-10.1``.
        download: Whether to download missing files.
        version: "v6" (2,000 images, 200 per class, recommended by its authors) or "v4" (2,021 images).
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> CIFAR101DataModule(version="v6", root="data").num_classes
        10
    """

    card = Card(10, (0, 0, 2_000), (3, 32, 32), 6_152_256, "MIT", "https://github.com/modestyachts/CIFAR-10.1")
    versions: ClassVar[dict[str, tuple[int, str | None, str]]] = {
        "v4": (2021, None, "6b7b8e6d26b5addd368440d9e0a24ead"),
        "v6": (2000, "4fcae82cb1326aec9ed1dc1fc62345b8", "09a97fb7c430502fcbd69d95093a3f85"),
    }
    folder = "cifar-10.1"

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        version: Literal["v4", "v6"] = "v6",
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, **options)
        if version not in self.versions:
            raise ValueError(f"version is {version!r}; it must be one of {', '.join(self.versions)}.")
        self.version = version
        _, data, labels = self.versions[version]
        site = "https://github.com/modestyachts/CIFAR-10.1/raw/master/datasets/"
        names = {f"cifar10.1_{version}_data.npy": data, f"cifar10.1_{version}_labels.npy": labels}
        self.archives = tuple(Archive(site + name, name, md5) for name, md5 in names.items())
        self.needed = {f"{self.folder}/{name}": md5 for name, md5 in names.items()}

    def load_more(self) -> dict[str, Source]:
        """Read the images.

        Raises:
            ValueError: If the files do not have the version's size.
        """
        image, label = (load_npy(self.root / name) for name in self.needed)
        where = f"{self.root / self.folder} ({self.version})"
        return {f"shift/cifar10_1_{self.version}": _source(image, label, self.versions[self.version][0], where)}


class CIFAR102DataModule(_CIFAR10Shift):
    """CIFAR-10.2: a second set of new images for CIFAR-10 (Lu et al., 2020), one set for evaluation.

    The set is ``shift/cifar10_2``, ``shift/cifar10_2_train`` or ``shift/cifar10_2_all``.

    Args:
        split: Unused: there is nothing to split.
        root: Folder that holds, or will hold, the folder ``cifar-10.2``.
        download: Whether to download missing files.
        subset: "test" (2,000 images), "train" (10,000) or "all".
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Deviations:
        There is no published checksum; sizes and types are checked.

    Example:
        >>> CIFAR102DataModule(root="data").num_classes
        10
    """

    card = Card(10, (0, 0, 2_000), (3, 32, 32), None, "not stated", "https://github.com/modestyachts/cifar-10.2")
    sizes: ClassVar[dict[str, int]] = {"train": 10_000, "test": 2_000}
    folder = "cifar-10.2"

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        subset: Literal["test", "train", "all"] = "test",
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, **options)
        if subset not in ("test", "train", "all"):
            raise ValueError(f"subset is {subset!r}; it must be one of test, train, all.")
        self.subset = subset
        self.parts = ("train", "test") if subset == "all" else (subset,)
        names = [f"cifar102_{part}.npz" for part in self.parts]
        site = "https://github.com/modestyachts/cifar-10.2/raw/master/"
        self.archives = tuple(Archive(site + name, name) for name in names)
        self.needed = {f"{self.folder}/{name}": None for name in names}

    def load_more(self) -> dict[str, Source]:
        """Read the images.

        Raises:
            ValueError: If the files do not have the official size.
        """
        sources = []
        for part, name in zip(self.parts, self.needed, strict=True):
            file = load_npz(self.root / name, ("images", "labels"))
            sources.append(_source(file["images"], file["labels"], self.sizes[part], str(self.root / name)))
        image = torch.cat([source.image for source in sources if isinstance(source.image, torch.Tensor)])
        name = "shift/cifar10_2" + ("" if self.subset == "test" else f"_{self.subset}")
        return {name: Source(image, torch.cat([source.label for source in sources]))}


class CIFAR10CDataModule(_CIFAR10Shift):
    """CIFAR-10-C: CIFAR-10's test images in 19 corruptions of 5 severities (Hendrycks and Dietterich, 2019).

    The sets are ``shift/cifar10_c/<corruption>_<severity>``. The files are memory-mapped: 2.9 GB stay on disk.

    Args:
        split: Unused: there is nothing to split.
        root: Folder that holds, or will hold, the unpacked folder ``CIFAR-10-C``.
        download: Whether to download missing files.
        corruptions: Some of `CORRUPTIONS`; ``None`` means all 19.
        severities: Some of 1 to 5; ``None`` means all.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> CIFAR10CDataModule(corruptions=("fog",), severities=(3, 5), root="data").num_classes
        10
    """

    card = Card(10, (0, 0, 950_000), (3, 32, 32), 2_918_471_680, "CC BY 4.0", "https://zenodo.org/records/2535967")
    prefix: ClassVar[str] = "cifar10_c"
    packed: ClassVar[Archive] = Archive(
        "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar", "CIFAR-10-C.tar", "56bf5dcef84df0e2308c6dcbcbbd8499"
    )
    labels_md5: ClassVar[str] = "c439b113295ed5254878798ffe28fd54"
    unpacks = True

    def __init__(
        self,
        split: SplitSpec | None = None,
        *,
        root: str | Path = "data",
        download: bool = True,
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split, root=root, download=download, **options)
        self.corruptions = _some("corruptions", corruptions, CORRUPTIONS)
        self.severities = _some("severities", severities, SEVERITIES)
        self.archives = (self.packed,)
        self.inside = self.packed.name.removesuffix(".tar")
        files: Mapping[str, str | None] = {f"{self.inside}/{name}.npy": None for name in self.corruptions}
        self.needed = {**files, f"{self.inside}/labels.npy": self.labels_md5}

    def load_more(self) -> dict[str, Source]:
        """Map the files; severity v is rows ``10,000 (v - 1)`` to ``10,000 v``.

        Raises:
            ValueError: If a file does not have the official size.
        """
        folder, sets = self.root / self.inside, {}
        rows = _ROWS * len(SEVERITIES)
        labels = load_npy(folder / "labels.npy")
        for corruption in self.corruptions:
            path = folder / f"{corruption}.npy"
            source = _source(load_npy(path, mmap=True), labels, rows, str(path))
            for severity in self.severities:
                start = _ROWS * (severity - 1)
                part = torch.arange(start, start + _ROWS)
                image = source.image[start : start + _ROWS]  # type: ignore[index]  # a tensor: no copy
                sets[f"shift/{self.prefix}/{corruption}_{severity}"] = Source(image, source.label[part], part)
        return sets


class CIFAR100CDataModule(CIFAR10CDataModule):
    """CIFAR-100-C: CIFAR-100's test images in 19 corruptions of 5 severities (Hendrycks and Dietterich, 2019).

    The sets are ``shift/cifar100_c/<corruption>_<severity>``.

    Args:
        split: Unused: there is nothing to split.
        root: Folder that holds, or will hold, the unpacked folder ``CIFAR-100-C``.
        download: Whether to download missing files.
        corruptions: Some of `CORRUPTIONS`; ``None`` means all 19.
        severities: Some of 1 to 5; ``None`` means all.
        **options: ``batch_size``, ``num_workers`` and other sets, as in `BenchmarkDataModule`.

    Example:
        >>> CIFAR100CDataModule(root="data").num_classes
        100
    """

    card = Card(100, (0, 0, 950_000), (3, 32, 32), 2_918_473_216, "CC BY 4.0", "https://zenodo.org/records/3555552")
    num_classes = CIFAR100DataModule.num_classes
    mean = CIFAR100DataModule.mean
    std = CIFAR100DataModule.std
    class_names = None
    prefix: ClassVar[str] = "cifar100_c"
    packed: ClassVar[Archive] = Archive(
        "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar",
        "CIFAR-100-C.tar",
        "11f0ed0f1191edbf9fa23466ae6021d3",
    )
    labels_md5: ClassVar[str] = "bb4026e9ce52996b95f439544568cdb2"


def _some(name: str, values: Sequence[Any] | None, allowed: tuple[Any, ...]) -> tuple[Any, ...]:
    if values is None:
        return allowed
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name} has {value!r}; it must only have values among {', '.join(map(str, allowed))}.")
    if not values:
        raise ValueError(f"{name} is empty; it must have some of {', '.join(map(str, allowed))}, or be null for all.")
    return tuple(values)


def _source(image: NDArray[Any], label: NDArray[Any], rows: int, where: str) -> Source:
    """Images (N, 32, 32, 3) uint8 and labels as a source; a mapped file stays mapped."""
    if image.shape != (rows, 32, 32, 3) or image.dtype != np.uint8 or label.shape != (rows,):
        raise ValueError(
            f"{where} holds images {image.dtype} {image.shape} and labels {label.shape}; it must hold uint8 "
            f"{(rows, 32, 32, 3)} and {(rows,)}. Delete the files to download them again."
        )
    return Source(mapped(image).permute(0, 3, 1, 2), torch.from_numpy(label.astype(np.int64)))
