"""Sets that are evaluated beside the test set: the same classes in other images, and images of other classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calib_lightning.data.divided import DividedData
from calib_lightning.data.generated import GeneratedShift
from calib_lightning.data.named_sets import Kind, named_set
from calib_lightning.data.options import OtherSet
from calib_lightning.data.sets import FileSet, ImageFiles, InMemorySet
from calib_lightning.data.source import Source, check_source, first_rows, take
from calib_lightning.data.transforms import Compose, Fit, Normalize
from calib_lightning.utils.images import Frame

_MOST_CUT = 0.75
"""Share of an image that may be cut away where its shape is fitted."""
_NAMED = 3  # shared classes in a remark


class OtherSets:
    """The sets that the options ``shift`` and ``ood`` of a `BenchmarkDataModule` name.

    Args:
        shift: Sets of the same classes.
        ood: Sets of other classes.
        rows: How many images of each shifted set are evaluated, from its first on; ``None`` for all.
        files: ``root`` and ``download`` of entries that do not say them.

    Raises:
        ValueError: If a name is unknown, named twice, or its settings are wrong.
    """

    def __init__(
        self, shift: Sequence[OtherSet], ood: Sequence[OtherSet], rows: int | None, files: Mapping[str, Any]
    ) -> None:
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"shift_rows is {rows!r}; it must be a whole number, at least 1, or null for all rows.")
        kinds: dict[Kind, Sequence[OtherSet]] = {"shift": shift, "ood": ood}
        self.named = [named_set(kind, entry, files) for kind, entries in kinds.items() for entry in entries]
        self.rows, self.notes = rows, list[str]()
        names = [f"{found.kind}/{found.name}" for found in self.named]
        if again := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"{again[0]} is named twice; every set must have a name of its own. Leave one out, or give one another "
                "name: {name: ..., as: NAME}."
            )

    def prepare(self, owner: DividedData) -> None:
        """Fetch or check the files of every set whose classes, as far as they are known by now, are right.

        Args:
            owner: The data whose network is evaluated.

        Raises:
            ValueError: If a set has the wrong classes.
            FileNotFoundError: If files are missing or damaged and were not, or could not be, downloaded.
        """
        for found in self.named:
            data: Any = found.data
            if not isinstance(data, GeneratedShift):
                _checked_classes(owner, found.kind, found.name, data)
            data.prepare_data()

    def load(self, owner: DividedData, facts: Mapping[str, Any]) -> dict[str, InMemorySet | FileSet]:
        """Read every set and fit its images to the network's input.

        Args:
            owner: The data whose network is evaluated, with its own sets.
            facts: Its `image_facts`.

        Returns:
            The sets by name, ``shift/...`` before ``ood/...``.

        Raises:
            ValueError: If a set has the wrong classes, or its images cannot be fitted.
        """
        normalize, self.notes = Normalize(owner.mean, owner.std), []
        sets: dict[str, InMemorySet | FileSet] = {}
        archived: list[str] = []  # corruptions of a whole test file
        for kind, name, data in self.named:
            if isinstance(data, GeneratedShift):
                found = data.sets(owner, f"shift/{name}", self.rows, normalize)
                self.notes.append(f"shift/{name}: {data.note}")
            else:
                sources = dict(_sources(kind, name, data))
                remarks = _checked_classes(owner, kind, name, data)
                found, fitted = self._of_other(owner, kind, sources, normalize, tuple(facts["shape"]))
                remarks += sorted(fitted)
                self.notes += [f"{kind}/{name}: {'; '.join(remarks)}"] if remarks else []
                archived += [key for key in found if key.count("/") > 1]
            if again := [key for key in found if key in sets or key in owner.set_names]:
                raise ValueError(f"{again[0]} is named twice; every set must be named once. Leave one out.")
            sets |= found
        held = {name for name, file in owner.source_files.items() if file == "test" and name != "test"}
        for name in sorted({key.rpartition("/")[0] for key in archived}) if held else ():
            self.notes.append(f"{name}: of the whole test file, some of which is {' and '.join(sorted(held))} here")
        if self.rows is not None and any(name.startswith("shift/") for name in sets):
            self.notes.append(f"of shifted sets at most the first {self.rows:,} test rows")
        return sets

    def _of_other(
        self, owner: DividedData, kind: Kind, sources: dict[str, Source], normalize: Normalize, shape: tuple[int, ...]
    ) -> tuple[dict[str, InMemorySet | FileSet], set[str]]:
        """The sets of another benchmark, and how their images are fitted."""
        sets: dict[str, InMemorySet | FileSet] = {}
        said = set()
        for key, source in sources.items():
            if kind == "ood":
                source = source._replace(label=torch.full_like(source.label, -1))
            else:
                source = first_rows(source, self.rows)
            check_source(key, source, owner.num_classes)
            image, fit, how = _fitted(key, source.image, shape, owner.frame)
            prepare = normalize if fit is None else Compose(fit, normalize)
            sets[key] = take(source._replace(image=image), None, prepare)
            said.add(how)
        return sets, said - {""}


def _sources(kind: Kind, name: str, data: DividedData) -> Iterator[tuple[str, Source]]:
    """The images of a set: the shifted sets that it is made of, or its test images."""
    more = data.load_more()
    if more and kind == "ood":
        raise ValueError(
            f"ood has {name!r}, whose images are shifted ones of known classes ({next(iter(more))}). Name it under "
            "shift."
        )
    if more:
        yield from more.items()
        return
    source = data.load_for_evaluation()
    if source is None or not len(source.label):
        raise ValueError(f"{kind} has {name!r}, which has no test images. Name a set that has some.")
    yield f"{kind}/{name}", source


def _checked_classes(owner: DividedData, kind: Kind, name: str, data: DividedData) -> list[str]:
    """Refuse shifted sets of other classes, and others of the same; remarks on what is not sure."""
    own, other = owner.class_names, data.class_names
    who = type(owner).__name__
    if owner.identity == data.identity:
        raise ValueError(f"{kind} has {name!r}, which is the data itself. Name another set, or leave it out.")
    if kind == "shift" and data.num_classes != owner.num_classes:
        raise ValueError(
            f"shift has {name!r} with {data.num_classes} classes; {who} has {owner.num_classes}. Name a set of the "
            "same classes, or name it under ood."
        )
    if own is None or other is None:
        return ["classes have no names, so they are not compared"]
    if kind == "shift" and list(own) != list(other):
        first = next(k for k in range(len(own)) if own[k] != other[k])
        raise ValueError(
            f"shift has {name!r}, whose class {first} is {other[first]!r}; that of {who} is {own[first]!r}. Name a set "
            "of the same classes in the same order, or name it under ood."
        )
    if kind == "ood" and set(other) <= set(own):
        raise ValueError(
            f"ood has {name!r}, whose classes are those of {who}; images of other classes are wanted. Name it under "
            "shift, or name another set."
        )
    shared = sorted(set(other) & set(own)) if kind == "ood" else []
    if not shared:
        return []
    some = ", ".join(shared[:_NAMED]) + (", ..." if len(shared) > _NAMED else "")
    return [f"{len(shared)} of its {len(other)} classes are known to the network ({some})"]


def _fitted(
    key: str, image: Tensor | ImageFiles, shape: tuple[int, ...], frame: Frame | None
) -> tuple[Tensor | ImageFiles, Fit | None, str]:
    """Images, the transform that brings them to a shape (C, H, W), and what it does in words."""
    channels, height, width = shape
    if isinstance(image, ImageFiles):
        if channels not in (1, 3):
            raise ValueError(f"{key} has image files, which have 1 or 3 channels; the network takes {channels}.")
        mine = frame or Frame((height, width), channels)
        return ImageFiles(image.root, image.names, mine), None, f"files as ({channels}, {height}, {width})"
    found, tall, wide = image.shape[1:]
    if found != channels and {found, channels} != {1, 3}:
        raise ValueError(
            f"{key} has images of {found} channels; the network takes {channels}. Only grey and colour images are "
            "turned into each other."
        )
    cut = 1 - min(tall * width, wide * height) / max(tall * width, wide * height)
    if cut > _MOST_CUT:
        raise ValueError(
            f"{key} has images of {tall} x {wide} pixels; fitted to the network's {height} x {width}, {cut:.0%} of "
            f"each would be cut away; it must be at most {_MOST_CUT:.0%}. Crop them before."
        )
    if (found, tall, wide) == shape:
        return image, None, ""
    said = [] if found == channels else ["grey repeated as RGB" if found == 1 else "RGB turned grey"]
    said += [] if (tall, wide) == (height, width) else [f"{tall} x {wide} resized to {height} x {width}"]
    return image, Fit(channels, (height, width)), ", ".join(said)
