"""What every benchmark's data module has in common: sets, checks, loaders and the record of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from calib_lightning.data.loader import ResumableLoader
from calib_lightning.data.sets import FeatureSet, FileCrop, FileSet, InMemorySet
from calib_lightning.data.source import Source, check_source, take
from calib_lightning.data.split import File, Rows, SplitSpec
from calib_lightning.data.transforms import Compose, CropFlip, Normalize
from calib_lightning.types import Views
from calib_lightning.utils.files import write_whole
from calib_lightning.utils.images import Frame
from calib_lightning.utils.seeding import run_seed


class BenchmarkDataModule(LightningDataModule):
    """Data of one benchmark: a subclass states a few facts and implements `load_train` and its kin as far as it can.

    The sets are "train", "val", "calibration" and "test" (those that have images), then "shift/<name>" (other images
    of the same classes) and "ood/<name>" (images of none of them). The names begin the keys of metrics, stand in tables
    and name files of predictions. Only training images are ever augmented or thinned out.

    Args:
        split: How the files are divided; ``None`` means the benchmark's `default_split`.
        batch_size: Rows of one batch of one process.
        num_workers: Processes that prepare batches. Images in memory that are only cropped, mirrored and normalised do
            not use them: handing a batch over would take longer than making it.

    Attributes:
        num_classes: K.
        mean: Mean of each channel, as a fraction of full brightness.
        std: Standard deviation of each channel, in the same unit.
        class_names: Names of the classes in the order of the labels; ``None`` where they are not known.
        augment: Whether training images are cropped and mirrored at random.
        frame: How image files are brought to one size, where images are files; known after `setup`.
        crop_scale: Smallest and largest area of a random crop of an image file, as a fraction; ``None`` shifts the
            framed image instead, as that of other sets.
        official_val: Whether there is a file of validation images.
        default_split: Used where no split is given.
        stage_views: What the present stage of a training does with its images; ``None`` means `augment`.
        stage_batch_size: Its rows of one batch of one process; ``None`` means ``batch_size``.
        stage_features: Features ``(N, V, d)`` that it is trained on in place of images, ``None`` for images.
    """

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    class_names: Sequence[str] | None = None
    augment: bool = False
    frame: Frame | None = None
    crop_scale: tuple[float, float] | None = None
    official_val: bool = False
    default_split: ClassVar[SplitSpec] = SplitSpec()
    stage_views: Views | None = None
    stage_batch_size: int | None = None
    stage_features: Tensor | None = None

    def __init__(self, split: SplitSpec | None = None, batch_size: int = 128, num_workers: int = 0) -> None:
        super().__init__()
        self.split = self.default_split if split is None else split
        self.batch_size, self.num_workers = batch_size, num_workers
        self._sets: dict[str, InMemorySet | FileSet] = {}
        self._files: dict[str, str] = {}

    def load_train(self) -> Source | None:
        """Read the training file; ``None`` where a benchmark is for evaluation only."""
        return None

    def load_val(self) -> Source | None:
        """Read the validation file; ``None`` where there is none, and the split cuts one from the training file."""
        return None

    def load_test(self) -> Source | None:
        """Read the test file; ``None`` where there is none."""
        return None

    def load_more(self) -> dict[str, Source]:
        """Read further sets for evaluation, by name: "shift/<name>" and "ood/<name>"."""
        return {}

    def setup(self, stage: str | None = None) -> None:
        """Read the files and divide them; a second call does nothing.

        Args:
            stage: Not used: every stage needs the same sets.

        Raises:
            ValueError: If a file's images or labels are not what `Source` says, or too few for the split.
        """
        if self._sets:
            return
        found: dict[File, Source | None]
        found = {"train": self.load_train(), "val": self.load_val(), "test": self.load_test()}
        files = {name: source for name, source in found.items() if source is not None}
        more = self.load_more()
        for name, source in (*files.items(), *more.items()):
            check_source(name, source, self.num_classes)
        parts = self.split.divide({name: source.label.numpy() for name, source in files.items()}, self.num_classes)
        normalize = Normalize(self.mean, self.std)
        sets = {name: take(files[part.file], torch.from_numpy(part.rows), normalize) for name, part in parts.items()}
        sets |= {name: take(source, None, normalize) for name, source in more.items()}
        if not sets:
            raise ValueError(f"{type(self).__name__} has no images at all: check its files.")
        frames = (data.image.frame for data in sets.values() if isinstance(data, FileSet))
        self.frame = next(frames, None)
        self._files = {name: part.file for name, part in parts.items()} | {name: name for name in more}
        self._sets = sets

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation set; known before `setup`."""
        return self.official_val or self.split.val > 0

    @property
    def set_names(self) -> list[str]:
        """Names of the sets that have images: "train", "val", "calibration", "test", then shifts and others."""
        return list(self._ready())

    @property
    def splits(self) -> dict[str, Rows]:
        """Rows of every set in its source file, ascending; "val" and "calibration" are there even if empty."""
        held_out = {name: np.empty(0, dtype=np.int64) for name in ("train", "val", "calibration")}
        return held_out | {name: data.rows.numpy() for name, data in self._ready().items()}

    @property
    def source_files(self) -> dict[str, str]:
        """The file that each set was taken from: "train", "val", "test", or the set's own name.

        Two sets share no image if their files differ, or their `source_rows` have no row in common.
        """
        self._ready()
        return dict(self._files)

    @property
    def identity(self) -> str:
        """Names the data: a run that goes on with data of the same name must have the same splits."""
        return type(self).__qualname__

    @property
    def splits_hash(self) -> str:
        """SHA-256 over the names, rows, labels and image files of all sets: equal hashes mean equal splits."""
        digest = hashlib.sha256()
        for name, rows in self.splits.items():
            digest.update(f"{name}:{self._files.get(name)}:{len(rows)}:".encode())
            digest.update(rows.astype("<i8").tobytes())
        for data in self._ready().values():
            digest.update(data.label.numpy().astype("<i8").tobytes())
            if isinstance(data, FileSet):
                digest.update(b"\n".join(data.image.names.tolist()))
        return digest.hexdigest()

    @property
    def image_facts(self) -> dict[str, Any]:
        """What a network is given: ``shape`` (C, H, W), ``mean``, ``std``, and how files are framed; plain data."""
        data = next(iter(self._ready().values()))
        shape = (self.frame.channels, *self.frame.size) if self.frame else data.image.shape[1:]  # type: ignore[union-attr]
        framed = {} if self.frame is None else asdict(self.frame)
        return {
            "shape": list(shape),
            "mean": list(self.mean),
            "std": list(self.std),
            **{name: framed[name] for name in ("crop_pct", "crop_mode", "interpolation") if name in framed},
        }

    @property
    def train_size(self) -> int:
        """Images in the training split."""
        return len(self._training())

    @property
    def class_counts(self) -> Tensor:
        """Images ``(K,)`` int64 of each class in the training split."""
        return torch.bincount(self._training().label, minlength=self.num_classes)

    def source_rows(self, name: str) -> Rows:
        """Rows of a set in its source file, in the order of ``Batch.index``.

        Args:
            name: "train", "val", "calibration" or the name of another set.

        Returns:
            Rows ``(N,)`` int64; empty for a held-out set without images.

        Raises:
            ValueError: If there is no set of that name.
        """
        if name not in self.splits:
            raise ValueError(f"no set is called {name!r}: use one of {', '.join(self.splits)}.")
        return self.splits[name]

    def save_splits(self, path: str | Path) -> None:
        """Write the rows of every set, the split's settings and the hash to an ``.npz`` file, whole or not at all.

        The keys are the names of the sets, "files" (JSON: the file that each was taken from), "spec" (JSON) and "hash".

        Args:
            path: The file to write or replace; its folder is made where it is missing.
        """
        content: dict[str, Any] = {"spec": json.dumps(asdict(self.split)), "hash": self.splits_hash}
        content |= {"files": json.dumps(self.source_files), **self.splits}
        write_whole(Path(path), lambda file: np.savez(file, **content))

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training split, shuffled and augmented with the seed of the run.

        Where the trainer's module has a ``batch_transform`` that asks for several views, they take the place of the
        normalisation: images are then ``(N, V, C, H, W)``. A stage of the training may have its own images
        (`stage_views`), features in their place (`stage_features`) and batch size.

        Raises:
            ValueError: If there are no training images.
        """
        seed, train = run_seed(), self._training()
        # a trainer that overfits some batches on purpose must see the same ones in every epoch
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        size = self.stage_batch_size or self.batch_size
        if self.stage_features is not None:
            return ResumableLoader(FeatureSet(self.stage_features, train.label, seed), size, shuffle=shuffle, seed=seed)
        data, costly = self._with_views(train, seed)
        return ResumableLoader(data, size, shuffle=shuffle, seed=seed, num_workers=self._workers(data, costly=costly))

    def ordered_train_loader(self, *, augmented: bool) -> ResumableLoader:
        """Training images in the order of their rows; ``set_epoch`` chooses the augmentation.

        Args:
            augmented: Whether they are augmented as in training; otherwise they are as in an evaluation.

        Returns:
            The loader.
        """
        data, augment = self._augmented(self._training(), run_seed() if augmented else None)
        normalize = Normalize(self.mean, self.std)
        data = replace(data, transform=normalize if augment is None else Compose(augment, normalize))
        return ResumableLoader(data, self.batch_size, shuffle=False, seed=0, num_workers=self._workers(data))

    def training_images_key(self, *, augmented: bool) -> str:
        """Name what `ordered_train_loader` gives: equal names mean equal images.

        Args:
            augmented: As there.

        Returns:
            A hash of the images, their standardisation and, where they are augmented, the seed; in hexadecimal.
        """
        digest = hashlib.sha256()
        self._training().fingerprint(digest)
        digest.update(f"{self.mean} {self.std} {run_seed() if augmented else None}".encode())
        return digest.hexdigest()

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Batches of the validation split; an empty list where it has no images, so that Lightning skips it."""
        return self.evaluation_loader("val") if "val" in self._ready() else []

    @property
    def predict_names(self) -> list[str]:
        """Names of the sets that `predict_dataloader` reads: "test", then shifts and others."""
        return [name for name in self._ready() if name not in ("train", "val", "calibration")]

    @property
    def evaluation_names(self) -> list[str]:
        """Names of the sets that `test_dataloader` reads: those of `predict_names`, then "calibration"."""
        return self.predict_names + [name for name in self._ready() if name == "calibration"]

    def test_dataloader(self) -> list[ResumableLoader]:
        """Batches of every set of `evaluation_names`; a test saves predictions of the calibration split too."""
        return [self.evaluation_loader(name) for name in self.evaluation_names]

    def predict_dataloader(self) -> list[ResumableLoader]:
        """Batches of every set of `predict_names`."""
        return [self.evaluation_loader(name) for name in self.predict_names]

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
        data = self._ready()[name]
        return ResumableLoader(data, self.batch_size, shuffle=False, seed=0, num_workers=self._workers(data))

    # --- the training images -----------------------------------------------------------------------------------------

    def _with_views(self, train: InMemorySet | FileSet, seed: int) -> tuple[InMemorySet | FileSet, bool]:
        """The training set as the stage and the module want it, and whether its images cost much to make."""
        normalize = Normalize(self.mean, self.std)
        if self.stage_views is not None:
            augment = CropFlip(seed=seed) if self.augment else None
            return replace(train, transform=self.stage_views.transform(normalize, augment, seed)), True
        module = getattr(self.trainer, "lightning_module", None)
        ask = getattr(getattr(module, "batch_transform", None), "views", None)
        views: nn.Module | None = None if ask is None else ask(normalize, seed)
        data, augment = self._augmented(train, seed if self.augment else None)
        transform = normalize if views is None else views
        return replace(data, transform=transform if augment is None else Compose(augment, transform)), views is not None

    def _augmented(
        self, train: InMemorySet | FileSet, seed: int | None
    ) -> tuple[InMemorySet | FileSet, CropFlip | None]:
        """The training set, its files cropped at random, or the augmentation of its bytes; without a seed neither."""
        if seed is None:
            return train, None
        if isinstance(train, FileSet) and self.crop_scale is not None:
            return replace(train, crop=FileCrop(self.crop_scale, seed)), None
        return train, CropFlip(seed=seed)

    def _workers(self, data: InMemorySet | FileSet, *, costly: bool = False) -> int:
        """Bytes in memory become a batch faster than a worker could hand it over."""
        return self.num_workers if costly or isinstance(data, FileSet) else 0

    def _training(self) -> InMemorySet | FileSet:
        if "train" not in self._ready():
            raise ValueError(
                f"{type(self).__name__} has no training images, it is for evaluation only: test a trained network on"
                " it, `calib test -c RUN/config.yaml --data ...`, or train on other data."
            )
        return self._ready()["train"]

    def _ready(self) -> dict[str, InMemorySet | FileSet]:
        if not self._sets:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call prepare_data() and setup() first.")
        return self._sets
