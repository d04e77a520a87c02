"""The base of every benchmark's data module: sets, checks, loaders and the record of rows."""

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
    """Data of one benchmark: subclasses set a few attributes and implement the applicable ``load_...`` methods.

    The sets are "train", "val", "calibration" and "test" (if they have images), then "shift/<name>" (other images of
    the same classes) and "ood/<name>" (images of other classes). Their names are prefixes of metrics and appear in
    tables and names of prediction files. Only training images are ever augmented or subsampled.

    Args:
        split: How the files are divided; ``None`` means `default_split`.
        batch_size: Batch size per process.
        num_workers: Worker processes that prepare batches. Images in memory that are only cropped, mirrored and
            normalised do not use them: transferring a batch would take longer than making it.

    Attributes:
        num_classes: K.
        mean: Mean of each channel, as a fraction of full brightness.
        std: Standard deviation of each channel, in the same units.
        class_names: Names of the classes in label order; ``None`` if unknown.
        augment: Whether training images are cropped and mirrored at random.
        frame: How image files are brought to a common size; known after `setup`.
        crop_scale: Smallest and largest area of a random crop of an image file, as a fraction; ``None`` shifts the
            framed image instead.
        official_val: Whether there is a file of validation images.
        default_split: The split used by default.
        stage_views: How the current training stage prepares its images; ``None`` means `augment`.
        stage_batch_size: Its batch size per process; ``None`` means ``batch_size``.
        stage_features: Features ``(N, V, d)`` that replace the images; ``None`` for images.
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
        """Read the training file; ``None`` if the benchmark is for evaluation only."""
        return None

    def load_val(self) -> Source | None:
        """Read the validation file; ``None`` if there is none, and the split cuts one from the training file."""
        return None

    def load_test(self) -> Source | None:
        """Read the test file; ``None`` if there is none."""
        return None

    def load_more(self) -> dict[str, Source]:
        """Read further sets for evaluation, by name: "shift/<name>" and "ood/<name>"."""
        return {}

    def setup(self, stage: str | None = None) -> None:
        """Read and divide the files; a second call has no effect.

        Args:
            stage: Unused: every stage needs the same sets.

        Raises:
            ValueError: If a file's images or labels do not conform to `Source`, or are too few for the split.
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
            raise ValueError(f"{type(self).__name__} has no images. Check its files.")
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
        """Names of the non-empty sets: "train", "val", "calibration", "test", then shifts and others."""
        return list(self._ready())

    @property
    def splits(self) -> dict[str, Rows]:
        """Rows of every set in its source file, ascending; "val" and "calibration" are included even if empty."""
        held_out = {name: np.empty(0, dtype=np.int64) for name in ("train", "val", "calibration")}
        return held_out | {name: data.rows.numpy() for name, data in self._ready().items()}

    @property
    def source_files(self) -> dict[str, str]:
        """The source file of each set: "train", "val", "test", or the set's own name.

        Two sets share no image if their files differ, or their `source_rows` are disjoint.
        """
        self._ready()
        return dict(self._files)

    @property
    def identity(self) -> str:
        """Name of the data: a run that continues with data of the same name must have the same splits."""
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
        """A network's input: ``shape`` (C, H, W), ``mean``, ``std``, and the framing of files; plain data."""
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
        """Number of images in the training split."""
        return len(self._training())

    @property
    def class_counts(self) -> Tensor:
        """Number of images ``(K,)`` int64 per class in the training split."""
        return torch.bincount(self._training().label, minlength=self.num_classes)

    def source_rows(self, name: str) -> Rows:
        """Rows of a set in its source file, in the order of ``Batch.index``.

        Args:
            name: "train", "val", "calibration" or the name of another set.

        Returns:
            Rows ``(N,)`` int64; empty for a held-out set without images.

        Raises:
            ValueError: If the set does not exist.
        """
        if name not in self.splits:
            raise ValueError(f"name is {name!r}; it must be one of {', '.join(self.splits)}.")
        return self.splits[name]

    def save_splits(self, path: str | Path) -> None:
        """Write the rows of every set, the split's settings and the hash to an ``.npz`` file atomically.

        The keys are the names of the sets, "files" (JSON: the source file of each), "spec" (JSON) and "hash".

        Args:
            path: The file to write or replace; its folder is created if missing.
        """
        content: dict[str, Any] = {"spec": json.dumps(asdict(self.split)), "hash": self.splits_hash}
        content |= {"files": json.dumps(self.source_files), **self.splits}
        write_whole(Path(path), lambda file: np.savez(file, **content))

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training split, shuffled and augmented with the seed of the run.

        If the trainer's module has a ``batch_transform`` with several views, they replace the normalisation: images are
        then ``(N, V, C, H, W)``. A training stage may have its own images (`stage_views`), features instead of images
        (`stage_features`) and batch size.

        Raises:
            ValueError: If there are no training images.
        """
        seed, train = run_seed(), self._training()
        # with overfit_batches, every epoch must have the same batches
        shuffle = not getattr(self.trainer, "overfit_batches", 0)
        size = self.stage_batch_size or self.batch_size
        if self.stage_features is not None:
            return ResumableLoader(FeatureSet(self.stage_features, train.label, seed), size, shuffle=shuffle, seed=seed)
        data, costly = self._with_views(train, seed)
        return ResumableLoader(data, size, shuffle=shuffle, seed=seed, num_workers=self._workers(data, costly=costly))

    def ordered_train_loader(self, *, augmented: bool) -> ResumableLoader:
        """Training images in row order; ``set_epoch`` selects the augmentation.

        Args:
            augmented: Whether to augment them as in training; otherwise they are as in evaluation.

        Returns:
            The loader.
        """
        data, augment = self._augmented(self._training(), run_seed() if augmented else None)
        normalize = Normalize(self.mean, self.std)
        data = replace(data, transform=normalize if augment is None else Compose(augment, normalize))
        return ResumableLoader(data, self.batch_size, shuffle=False, seed=0, num_workers=self._workers(data))

    def training_images_key(self, *, augmented: bool) -> str:
        """Return a key of the images from `ordered_train_loader`: equal keys mean equal images.

        Args:
            augmented: As in `ordered_train_loader`.

        Returns:
            A hexadecimal hash of the images, their standardisation and, if augmented, the seed.
        """
        digest = hashlib.sha256()
        self._training().fingerprint(digest)
        digest.update(f"{self.mean} {self.std} {run_seed() if augmented else None}".encode())
        return digest.hexdigest()

    def val_dataloader(self) -> ResumableLoader | list[ResumableLoader]:
        """Batches of the validation split; an empty list without images, so that Lightning skips it."""
        return self.evaluation_loader("val") if "val" in self._ready() else []

    @property
    def predict_names(self) -> list[str]:
        """Names of the sets that `predict_dataloader` reads: "test", then shifts and others."""
        return [name for name in self._ready() if name not in ("train", "val", "calibration")]

    @property
    def evaluation_names(self) -> list[str]:
        """Names of the sets that `test_dataloader` reads: `predict_names`, then "calibration"."""
        return self.predict_names + [name for name in self._ready() if name == "calibration"]

    def test_dataloader(self) -> list[ResumableLoader]:
        """Batches of every set in `evaluation_names`; tests also save predictions of the calibration split."""
        return [self.evaluation_loader(name) for name in self.evaluation_names]

    def predict_dataloader(self) -> list[ResumableLoader]:
        """Batches of every set in `predict_names`."""
        return [self.evaluation_loader(name) for name in self.predict_names]

    def calibration_dataloader(self) -> ResumableLoader | None:
        """Batches of the calibration split, or ``None`` without images."""
        return self.evaluation_loader("calibration") if "calibration" in self._ready() else None

    def evaluation_loaders(self) -> dict[str, ResumableLoader]:
        """Loaders of the sets in `evaluation_names`, by name."""
        return {name: self.evaluation_loader(name) for name in self.evaluation_names}

    def evaluation_loader(self, name: str) -> ResumableLoader:
        """Batches of one set in row order, never augmented.

        Args:
            name: One of `set_names`; "train" gives unaugmented training images.

        Returns:
            The loader.

        Raises:
            ValueError: If the set does not exist or has no images.
        """
        if name not in self._ready():
            raise ValueError(f"name is {name!r}; it must be one of the sets with images: {', '.join(self._ready())}.")
        data = self._ready()[name]
        return ResumableLoader(data, self.batch_size, shuffle=False, seed=0, num_workers=self._workers(data))

    # --- the training images -----------------------------------------------------------------------------------------

    def _with_views(self, train: InMemorySet | FileSet, seed: int) -> tuple[InMemorySet | FileSet, bool]:
        """The training set prepared for stage and module, and whether its images are costly to make."""
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
        """The training set with randomly cropped files, or an augmentation of its bytes; without a seed neither."""
        if seed is None:
            return train, None
        if isinstance(train, FileSet) and self.crop_scale is not None:
            return replace(train, crop=FileCrop(self.crop_scale, seed)), None
        return train, CropFlip(seed=seed)

    def _workers(self, data: InMemorySet | FileSet, *, costly: bool = False) -> int:
        """Batches of bytes in memory are made faster than a worker could transfer them."""
        return self.num_workers if costly or isinstance(data, FileSet) else 0

    def _training(self) -> InMemorySet | FileSet:
        if "train" not in self._ready():
            raise ValueError(
                f"{type(self).__name__} is for evaluation only and has no training images. Test a trained network on "
                "it with `calib test -c RUN/config.yaml --data ...`, or train on other data."
            )
        return self._ready()["train"]

    def _ready(self) -> dict[str, InMemorySet | FileSet]:
        if not self._sets:
            raise RuntimeError(f"{type(self).__name__} has no data yet. Call prepare_data() and setup() first.")
        return self._sets
