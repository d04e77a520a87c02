"""What every benchmark's data module has in common: splits, checks, loaders and the record of rows."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from calib_lightning.data.loader import FeatureSet, InMemorySet, ResumableLoader
from calib_lightning.data.split import Rows, SplitSpec
from calib_lightning.data.transforms import Compose, CropFlip, Normalize, Transform
from calib_lightning.files import write_whole
from calib_lightning.seeding import run_seed
from calib_lightning.types import Views


class Source(NamedTuple):
    """Labelled images as a benchmark's files hold them.

    Attributes:
        image: ``(N, C, H, W)`` uint8.
        label: ``(N,)`` int64 in ``0..K-1``.
        rows: Row ``(N,)`` int64 of each image in its file; ``None`` means ``0..N-1``.
    """

    image: Tensor
    label: Tensor
    rows: Tensor | None = None


class BenchmarkDataModule(LightningDataModule, ABC):
    """Data of one benchmark. A subclass states three facts and implements `load_train` and `load_test`.

    The sets are "train", "val" and "calibration" (those that have images) and one set for each name in `test_names`.
    Only training images are ever augmented or thinned out.

    Args:
        split: How the training file is divided; ``None`` means the benchmark's `default_split`.
        batch_size: Rows of one batch of one process.
        num_workers: Processes that prepare batches.

    Attributes:
        num_classes: K.
        mean: Mean of each channel, as a fraction of full brightness.
        std: Standard deviation of each channel, in the same unit.
        augment: Whether training images are cropped and mirrored at random.
        test_names: Names of the test sets.
        default_split: Used where no split is given.
        stage_views: What the present stage of a training does with its images; ``None`` means `augment`.
        stage_batch_size: Its rows of one batch of one process; ``None`` means ``batch_size``.
        stage_features: Features ``(N, V, d)`` that it is trained on in place of images, ``None`` for images.
    """

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    augment: bool = False
    default_split: ClassVar[SplitSpec] = SplitSpec()
    stage_views: Views | None = None
    stage_batch_size: int | None = None
    stage_features: Tensor | None = None

    def __init__(self, split: SplitSpec | None = None, batch_size: int = 128, num_workers: int = 0) -> None:
        super().__init__()
        self.split = self.default_split if split is None else split
        self.batch_size, self.num_workers = batch_size, num_workers
        self.test_names = ["iid"]
        self._sets: dict[str, InMemorySet] = {}

    @abstractmethod
    def load_train(self) -> Source:
        """Read the training file, the one that the split divides."""

    @abstractmethod
    def load_test(self) -> Source:
        """Read the test file."""

    def setup(self, stage: str | None = None) -> None:
        """Read the files and divide them; a second call does nothing.

        Args:
            stage: Not used: every stage needs the same sets.

        Raises:
            ValueError: If a file's images or labels are not what `Source` says, or too few for the split.
        """
        if self._sets:
            return
        train, test = self.load_train(), self.load_test()
        for name, source in (("train", train), ("test", test)):
            self._check(name, source)
        drawn = self.split.draw(train.label.numpy(), self.num_classes)
        normalize = Normalize(self.mean, self.std)
        sets = {name: _take(train, torch.from_numpy(rows), normalize) for name, rows in drawn.items() if len(rows)}
        sets["iid"] = _take(test, torch.arange(len(test.label)), normalize)
        self._sets = sets

    @property
    def set_names(self) -> list[str]:
        """Names of the sets: "train", "val" and "calibration" where they have images, then the test sets."""
        return list(self._ready())

    @property
    def splits(self) -> dict[str, Rows]:
        """Rows of every set in its source file, ascending; "val" and "calibration" are there even if empty."""
        held_out = {name: np.empty(0, dtype=np.int64) for name in ("train", "val", "calibration")}
        return held_out | {name: data.rows.numpy() for name, data in self._ready().items()}

    @property
    def splits_hash(self) -> str:
        """SHA-256 over the names and rows of every set, in hexadecimal: equal hashes mean equal splits."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            digest.update(f"{name}:{len(rows)}:".encode())
            digest.update(rows.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def train_size(self) -> int:
        """Images in the training split."""
        return len(self._ready()["train"])

    @property
    def class_counts(self) -> Tensor:
        """Images ``(K,)`` int64 of each class in the training split."""
        return torch.bincount(self._ready()["train"].label, minlength=self.num_classes)

    def source_rows(self, name: str) -> Rows:
        """Rows of a set in its source file, in the order of ``Batch.index``.

        Args:
            name: "train", "val", "calibration" or the name of a test set.

        Returns:
            Rows ``(N,)`` int64, ascending; empty for a held-out set without images.

        Raises:
            ValueError: If there is no set of that name.
        """
        if name not in self.splits:
            raise ValueError(f"no set is called {name!r}: use one of {', '.join(self.splits)}.")
        return self.splits[name]

    def save_splits(self, path: str | Path) -> None:
        """Write the rows of every set, the split's settings and the hash to an ``.npz`` file, whole or not at all.

        The keys are "train", "val", "calibration", "test/<name>" for each test set, "spec" (JSON) and "hash".

        Args:
            path: The file to write or replace; its folder is made where it is missing.
        """
        content: dict[str, Any] = {"spec": json.dumps(asdict(self.split)), "hash": self.splits_hash}
        for name, rows in self.splits.items():
            content[f"test/{name}" if name in self.test_names else name] = rows
        write_whole(Path(path), lambda file: np.savez(file, **content))

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training split, shuffled and augmented with the seed of the run.

        Where the trainer's module has a ``batch_transform`` that asks for several views, they take the place of the
        normalisation: images are then ``(N, V, C, H, W)``. A stage of the training may have its own images
        (`stage_views`), features in their place (`stage_features`) and batch size.
        """
        seed, train = run_seed(), self._ready()["train"]
        # a trainer that overfits some batches on purpose must see the same ones in every epoch
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        size = self.stage_batch_size or self.batch_size
        if self.stage_features is not None:
            return ResumableLoader(FeatureSet(self.stage_features, train.label, seed), size, shuffle=shuffle, seed=seed)
        data = replace(train, transform=self._training_transform(seed))
        return ResumableLoader(data, size, shuffle=shuffle, seed=seed, num_workers=self.num_workers)

    def ordered_train_loader(self, *, augmented: bool) -> ResumableLoader:
        """Training images in the order of their rows; ``set_epoch`` chooses the augmentation.

        Args:
            augmented: Whether they are augmented as in training; otherwise they are as in an evaluation.

        Returns:
            The loader.
        """
        normalize = Normalize(self.mean, self.std)
        transform = Compose(CropFlip(seed=run_seed()), normalize) if augmented else normalize
        data = replace(self._ready()["train"], transform=transform)
        return ResumableLoader(data, self.batch_size, shuffle=False, seed=0, num_workers=self.num_workers)

    def training_images_key(self, *, augmented: bool) -> str:
        """Name what `ordered_train_loader` gives: equal names mean equal images.

        Args:
            augmented: As there.

        Returns:
            A hash of the images, their standardisation and, where they are augmented, the seed; in hexadecimal.
        """
        digest = hashlib.sha256(self._ready()["train"].image.contiguous().numpy().tobytes())
        digest.update(f"{self.mean} {self.std} {run_seed() if augmented else None}".encode())
        return digest.hexdigest()

    def _training_transform(self, seed: int) -> nn.Module:
        normalize = Normalize(self.mean, self.std)
        augment = CropFlip(seed=seed) if self.augment else None
        if self.stage_views is not None:
            return self.stage_views.transform(normalize, augment, seed)
        module = getattr(self.trainer, "lightning_module", None)
        ask = getattr(getattr(module, "batch_transform", None), "views", None)
        views = None if ask is None else ask(normalize, seed)
        transform: nn.Module = normalize if views is None else views
        return transform if augment is None else Compose(augment, transform)

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Batches of the validation split; an empty list where it has no images, so that Lightning skips it."""
        return self.evaluation_loader("val") if "val" in self._ready() else []

    @property
    def evaluation_names(self) -> list[str]:
        """Names of the sets that `test_dataloader` reads: every test set, then "calibration" where it has images."""
        return [name for name in (*self.test_names, "calibration") if name in self._ready()]

    def test_dataloader(self) -> list[ResumableLoader]:
        """Batches of every set of `evaluation_names`; a test saves predictions of the calibration split too."""
        return [self.evaluation_loader(name) for name in self.evaluation_names]

    def predict_dataloader(self) -> list[ResumableLoader]:
        """Batches of every test set, in the order of `test_names`."""
        return [self.evaluation_loader(name) for name in self.test_names]

    def calibration_dataloader(self) -> ResumableLoader | None:
        """Batches of the calibration split, ``None`` where it has no images."""
        return self.evaluation_loader("calibration") if "calibration" in self._ready() else None

    def evaluation_loaders(self) -> dict[str, ResumableLoader]:
        """Loaders of the sets of `evaluation_names`, by name."""
        return {name: self.evaluation_loader(name) for name in self.evaluation_names}

    def evaluation_loader(self, name: str) -> ResumableLoader:
        """Batches of one set in the order of its rows, never augmented.

        Args:
            name: One of `set_names`; "train" gives the clean training images.

        Returns:
            The loader.

        Raises:
            ValueError: If there is no set of that name or it has no images.
        """
        if name not in self._ready():
            raise ValueError(f"no set called {name!r} has images: use one of {', '.join(self._ready())}.")
        return ResumableLoader(
            self._ready()[name], self.batch_size, shuffle=False, seed=0, num_workers=self.num_workers
        )

    def _ready(self) -> dict[str, InMemorySet]:
        if not self._sets:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call prepare_data() and setup() first.")
        return self._sets

    def _check(self, name: str, source: Source) -> None:
        image, label = source.image, source.label
        if image.dtype != torch.uint8 or image.ndim != 4:
            raise ValueError(
                f"the {name} images are {image.dtype} of shape {tuple(image.shape)}; they must be torch.uint8 of shape"
                " (N, C, H, W): convert them where they are loaded."
            )
        if label.dtype != torch.int64 or label.shape != image.shape[:1]:
            raise ValueError(
                f"the {name} labels are {label.dtype} of shape {tuple(label.shape)}; {len(image)} images need"
                f" torch.int64 of shape ({len(image)},): convert them where they are loaded."
            )
        wrong = ((label < 0) | (label >= self.num_classes)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"label {int(label[row])} in row {row} of the {name} file is outside 0..{self.num_classes - 1}: set"
                " num_classes to the number of classes, or map the labels where they are loaded."
            )


def _take(source: Source, index: Tensor, transform: Transform) -> InMemorySet:
    rows = index if source.rows is None else source.rows[index]
    return InMemorySet(source.image[index], source.label[index], rows, transform)
