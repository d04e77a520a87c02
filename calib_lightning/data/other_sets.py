"""Sets that are evaluated beside the test set: the same classes in other images, and images of other classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import yaml  # type: ignore[import-untyped]
from torch import Tensor

from calib_lightning.data.divided import DividedData
from calib_lightning.data.generated import GENERATED, GeneratedShift
from calib_lightning.data.options import OtherSet
from calib_lightning.data.sets import FileSet, ImageFiles, InMemorySet
from calib_lightning.data.source import Source, check_source, take
from calib_lightning.data.transforms import Compose, Fit, Normalize
from calib_lightning.utils.config_search import check_aliases, config_names, find_config
from calib_lightning.utils.images import Frame
from calib_lightning.utils.names import did_you_mean
from calib_lightning.utils.registry import find_class

Kind = Literal["shift", "ood"]
_MOST_CUT = 0.75
"""Share of an image that may be cut away where its shape is fitted."""


class Prepared(Protocol):
    """Data whose files are fetched or checked before they are read."""

    def prepare_data(self) -> None:
        """Fetch or check the files."""


class Named(NamedTuple):
    """Another set: which option names it, how, and its data module or generator."""

    kind: Kind
    name: str
    data: DividedData | GeneratedShift


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
        if rows is not None and rows < 1:
            raise ValueError(f"shift_rows is {rows}; it must be at least 1, or null for all rows.")
        kinds: dict[Kind, Sequence[OtherSet]] = {"shift": shift, "ood": ood}
        self.named = [_named(kind, entry, files) for kind, entries in kinds.items() for entry in entries]
        self.rows = rows
        names = [f"{found.kind}/{found.name}" for found in self.named]
        if again := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{sorted(again)[0]} is named twice; every set must be named once.")

    def prepare(self) -> None:
        """Fetch or check the files of every set.

        Raises:
            FileNotFoundError: If files are missing or damaged and were not, or could not be, downloaded.
        """
        for found in self.named:
            data: Prepared | Any = found.data
            if isinstance(data, GeneratedShift):
                data.check()
            else:
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
        normalize, self.notes = Normalize(owner.mean, owner.std), list[str]()
        sets: dict[str, InMemorySet | FileSet] = {}
        for kind, name, data in self.named:
            if isinstance(data, GeneratedShift):
                sets |= data.sets(owner, self.rows, normalize)
                self.notes.append(data.note)
                continue
            found = dict(_sources(kind, name, data))
            _check_classes(owner, kind, name, data)
            said = set()
            for key, source in found.items():
                source = _labelled(kind, source, self.rows)
                check_source(key, source, owner.num_classes)
                image, fit, how = _fitted(key, source.image, tuple(facts["shape"]), owner.frame)
                prepare = normalize if fit is None else Compose(fit, normalize)
                sets[key] = take(source._replace(image=image), None, prepare)
                said.add(how)
            self.notes += [f"{kind}/{name}: {'; '.join(sorted(how for how in said if how))}"] if any(said) else []
        if self.rows is not None and any(found.kind == "shift" for found in self.named):
            self.notes.append(f"of shifted sets the first {self.rows:,} test rows")
        return sets


def _named(kind: Kind, entry: OtherSet, files: Mapping[str, Any]) -> Named:
    """The set that an entry of an option names."""
    settings = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = settings.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{kind} has {entry!r}; each entry must be a name, or a name with settings such as {{name: svhn, root: "
            "DIR}. `calib data list` lists all names."
        )
    if name == GENERATED:
        if kind == "ood":
            raise ValueError("ood has 'generated'; corrupted test images keep their classes. Name it under shift.")
        return Named(kind, name, _build(f"{kind}: {name}", GeneratedShift, settings))
    path = find_config(name, "data")
    if path is None:
        known = [*config_names("data"), *([GENERATED] if kind == "shift" else [])]
        raise ValueError(
            f"{kind} has {name!r}; it must be a name of `calib data list` or a file of that kind."
            f"{did_you_mean(name, known)}"
        )
    text = path.read_text(encoding="utf-8")
    check_aliases(text)
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or not isinstance(config.get("class_path"), str):
        raise ValueError(f"{kind} names {path}; it must have a class_path and init_args. Write one as in configs/data.")
    cls: type[DividedData] = find_class(config["class_path"], DividedData)
    init = {key: value for key, value in (config.get("init_args") or {}).items() if key != "split"}
    if hasattr(cls, "test_only"):
        init |= files
    data = _build(f"{kind}: {name}", cls, init | settings)
    if hasattr(data, "test_only"):
        data.test_only = True
    return Named(kind, path.stem if Path(name).is_file() else name, data)


def _build(where: str, cls: type[Any], settings: Mapping[str, Any]) -> Any:
    try:
        return cls(**settings)
    except TypeError as error:
        raise ValueError(f"{where}: {error}. Its settings are those of {cls.__name__}.") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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


def _check_classes(owner: DividedData, kind: Kind, name: str, data: DividedData) -> None:
    """Shifted sets must have the classes of the training data, others must not."""
    own, other = owner.class_names, data.class_names
    who = type(owner).__name__
    same = type(owner) is type(data) and owner.identity == getattr(data, "identity", None)
    if own is not None and other is not None:
        same = set(other) <= set(own)
    if kind == "ood" and same:
        raise ValueError(
            f"ood has {name!r}, whose classes are those of {who}; images of other classes are wanted. Name it under "
            "shift, or name another set."
        )
    if kind == "shift" and data.num_classes != owner.num_classes:
        raise ValueError(
            f"shift has {name!r} with {data.num_classes} classes; {who} has {owner.num_classes}. Name a set of the "
            "same classes, or name it under ood."
        )
    if kind == "shift" and own is not None and other is not None and list(own) != list(other):
        first = next(k for k in range(len(own)) if own[k] != other[k])
        raise ValueError(
            f"shift has {name!r}, whose class {first} is {other[first]!r}; that of {who} is {own[first]!r}. Name a set "
            "of the same classes in the same order, or name it under ood."
        )


def _labelled(kind: Kind, source: Source, rows: int | None) -> Source:
    """The first rows of shifted images; images of other classes have no label."""
    if kind == "ood":
        return source._replace(label=torch.full_like(source.label, -1))
    if rows is None or rows >= len(source.label):
        return source
    image = source.image[:rows] if isinstance(source.image, Tensor) else source.image[torch.arange(rows)]
    return Source(image, source.label[:rows], None if source.rows is None else source.rows[:rows])


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
