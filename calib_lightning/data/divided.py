"""The sets of a benchmark: its files, read, checked and divided, and the record of their rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calib_lightning.data.card import Card
from calib_lightning.data.sets import FileSet, InMemorySet
from calib_lightning.data.source import Source, check_source, take
from calib_lightning.data.split import File, Rows, SplitSpec
from calib_lightning.data.transforms import Normalize
from calib_lightning.utils.files import write_whole
from calib_lightning.utils.images import Frame


class DividedData:
    """The sets of one benchmark, without loaders; the base of `BenchmarkDataModule`, which documents its attributes.

    Args:
        split: How the files are divided; ``None`` means `default_split`.
    """

    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    class_names: Sequence[str] | None = None
    frame: Frame | None = None
    official_val: bool = False
    default_split: ClassVar[SplitSpec] = SplitSpec()
    card: ClassVar[Card | None] = None

    def __init__(self, split: SplitSpec | None = None) -> None:
        super().__init__()
        self.split = self.default_split if split is None else split
        self._sets: dict[str, InMemorySet | FileSet] = {}
        self._files: dict[str, str] = {}
        self._own: tuple[str, ...] = ()

    def load_part(self, part: File) -> Source | None:
        """Read one of the three files, or ``None`` if there is none; override it where all are read in the same way."""
        return None

    def load_train(self) -> Source | None:
        """Read the training file; ``None`` if the benchmark is for evaluation only."""
        return self.load_part("train")

    def load_val(self) -> Source | None:
        """Read the validation file; ``None`` if there is none, and the split cuts one from the training file."""
        return self.load_part("val")

    def load_test(self) -> Source | None:
        """Read the test file; ``None`` if there is none."""
        return self.load_part("test")

    def load_more(self) -> dict[str, Source]:
        """Read further sets for evaluation, by name: "shift/<name>" and "ood/<name>"."""
        return {}

    @classmethod
    def of_other_classes(cls, **settings: Any) -> DividedData:
        """Build data whose images are evaluated without their labels."""
        return cls(**settings)

    def load_for_evaluation(self) -> Source | None:
        """Read the images with which networks of other data are evaluated: the test file, or else the training file."""
        return self.load_test() or self.load_train()

    def _load_more(self) -> dict[str, Source]:
        return self.load_more()

    def _load_others(self) -> dict[str, InMemorySet | FileSet]:
        """Sets of other benchmarks that are evaluated with the test set; the data's own sets are there."""
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
        more = self._load_more()
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
        try:
            others = self._load_others()
        except BaseException:
            self._sets = {}
            raise
        self._files |= {name: name for name in others}
        self._sets = sets | others
        self._own = tuple(sets)

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
        """SHA-256 over the names, rows, labels and image files of the data's own sets: equal hashes mean equal splits.

        Sets of other data that are evaluated beside them do not count: they can be named for a trained network.
        """
        digest = hashlib.sha256()
        others = set(self._ready()) - set(self._own)
        for name, rows in self.splits.items():
            if name not in others:
                digest.update(f"{name}:{self._files.get(name)}:{len(rows)}:".encode())
                digest.update(rows.astype("<i8").tobytes())
        for data in (self._ready()[name] for name in self._own):
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

    def set_of(self, name: str) -> InMemorySet | FileSet:
        """Images and labels of one set, as a network is evaluated on them.

        Args:
            name: One of `set_names`.

        Returns:
            The set.

        Raises:
            ValueError: If the set does not exist or has no images.
        """
        if name not in self._ready():
            raise ValueError(f"name is {name!r}; it must be one of the sets with images: {', '.join(self._ready())}.")
        return self._ready()[name]

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
