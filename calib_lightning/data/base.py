"""The base of every benchmark's data module: the loaders of its sets. The sets themselves are in `divided`."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from calib_lightning.data.divided import DividedData
from calib_lightning.data.loader import ResumableLoader
from calib_lightning.data.options import OtherSet
from calib_lightning.data.other_sets import OtherSets
from calib_lightning.data.sets import FeatureSet, FileCrop, FileSet, InMemorySet
from calib_lightning.data.source import Source, first_rows
from calib_lightning.data.split import SplitSpec
from calib_lightning.data.transforms import Compose, CropFlip, Normalize
from calib_lightning.types import Views
from calib_lightning.utils.seeding import run_seed


class BenchmarkDataModule(DividedData, LightningDataModule):
    """Data of one benchmark: subclasses set a few attributes and implement the applicable ``load_...`` methods.

    The sets are "train", "val", "calibration" and "test" (if they have images), then "shift/<name>" (other images of
    the same classes) and "ood/<name>" (images of other classes). Their names are prefixes of metrics and appear in
    tables and names of prediction files. Only training images are ever augmented or subsampled.

    Args:
        split: How the files are divided; ``None`` means `default_split`.
        batch_size: Batch size per process.
        num_workers: Worker processes that prepare batches. Images in memory that are only cropped, mirrored and
            normalised do not use them: transferring a batch would take longer than making it.
        shift: Sets of the same classes that are evaluated with the test set: names of ``calib data list``, or dicts of
            such a ``name`` and its settings. "generated" corrupts the test images, see `GeneratedShift`.
        ood: Sets of other classes, named likewise; their test images are evaluated.
        shift_rows: How many images of each shifted set are evaluated, from its first on; ``None`` for all.

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
        card: What `calib data list` says of it.
        stage_views: How the current training stage prepares its images; ``None`` means `augment`.
        stage_batch_size: Its batch size per process; ``None`` means ``batch_size``.
        stage_features: Features ``(N, V, d)`` that replace the images; ``None`` for images.
    """

    augment: bool = False
    crop_scale: tuple[float, float] | None = None
    stage_views: Views | None = None
    stage_batch_size: int | None = None
    stage_features: Tensor | None = None

    def __init__(
        self,
        split: SplitSpec | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        shift: list[OtherSet] | OtherSet | None = None,
        ood: list[OtherSet] | OtherSet | None = None,
        shift_rows: int | None = None,
    ) -> None:
        super().__init__(split)
        self.batch_size, self.num_workers = batch_size, num_workers
        self._asked = _listed(shift), _listed(ood), shift_rows
        self._others: OtherSets | None = None

    def prepare_data(self) -> None:
        """Fetch or check the files of the sets that ``shift`` and ``ood`` name; overriding methods call it.

        Raises:
            ValueError: If a name is unknown or its settings are wrong.
            FileNotFoundError: If files are missing or damaged and were not, or could not be, downloaded.
        """
        self._other_sets().prepare(self)

    @property
    def image_channels(self) -> int:
        """C of the images, known before `setup`."""
        return len(self.mean)

    @property
    def asked_others(self) -> dict[str, Any]:
        """What ``shift``, ``ood`` and ``shift_rows`` were; empty if neither names a set."""
        shift, ood, rows = self._asked
        return {"shift": shift, "ood": ood, "shift_rows": rows} if shift or ood else {}

    @property
    def other_notes(self) -> list[str]:
        """What is to be known of the sets that ``shift`` and ``ood`` name, one remark each; known after `setup`."""
        self._ready()
        return list(self._other_sets().notes)

    @property
    def file_options(self) -> dict[str, Any]:
        """Where sets of other data look for files, if nothing else is said."""
        return {}

    def _other_sets(self) -> OtherSets:
        if self._others is None:
            self._others = OtherSets(*self._asked, self.file_options)
        return self._others

    def _load_more(self) -> dict[str, Source]:
        rows = self._other_sets().rows
        return {name: first_rows(source, rows) for name, source in super()._load_more().items()}

    def _load_others(self) -> dict[str, InMemorySet | FileSet]:
        return self._other_sets().load(self, self.image_facts)

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
        data = self.set_of(name)
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


def _listed(value: list[OtherSet] | OtherSet | None) -> list[OtherSet]:
    """The entries of an option; one name stands for itself."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
