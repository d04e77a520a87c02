"""What there is to see of data: how many images of each class, and examples as a network sees them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calib_lightning.data.base import BenchmarkDataModule
from calib_lightning.data.corruptions import CORRUPTIONS, SEVERITIES, Table, corrupt, table_for, unavailable
from calib_lightning.data.generated import GENERATED
from calib_lightning.data.sets import BatchSet

_CORRUPTED = re.compile(r"shift/(.+)/(\w+)_([1-5])")
_MOST_CLASSES = 10


class Counts(NamedTuple):
    """Images of one set, or of several that belong together: names, number of images, images ``(K,)`` of each class."""

    names: list[str]
    images: int
    by_class: Tensor


class Examples(NamedTuple):
    """Rows of images ``(N, C, H, W)`` uint8 with their labels, and the names of the N columns."""

    rows: list[tuple[str, Tensor]]
    columns: list[str]


def count_images(data: BenchmarkDataModule) -> dict[str, Counts]:
    """Count the images of every set; corruptions and severities of one shift are counted together.

    Args:
        data: Data after ``setup``.

    Returns:
        The counts by name, such as "train" or "shift/cifar10_c".
    """
    counts: dict[str, Counts] = {}
    for name in data.set_names:
        label = data.set_of(name).label
        by_class = torch.bincount(label[label >= 0], minlength=data.num_classes)
        found = _CORRUPTED.fullmatch(name)
        key = f"shift/{found[1]}" if found else name
        before = counts.get(key, Counts([], 0, torch.zeros_like(by_class)))
        counts[key] = Counts([*before.names, name], before.images + len(label), before.by_class + by_class)
    return counts


def class_examples(data: BenchmarkDataModule, images: int, seed: int) -> Examples:
    """Draw an image of each class: as it is evaluated, then as training augments it in its first epochs.

    The images are those of the training set. Without one, or where nothing is augmented, a row has different images. At
    most ten classes are shown, evenly spread; below them come images of the sets of other data.

    Args:
        data: Data after ``setup``.
        images: Number of augmented versions, or of further images.
        seed: Selects the images; the augmentation has the seed of the run.

    Returns:
        The rows, each of at most ``images + 1`` images.
    """
    names = data.set_names
    evaluated, augmented = data.set_of(names[0]), None
    if names[0] == "train" and data.augment:
        augmented = data.train_dataloader().data
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for label in _spread(data.num_classes):
        chosen = _chosen((evaluated.label == label).nonzero()[:, 0], images + 1, generator)
        if len(chosen):
            rows.append((class_name(data, label), _row(data, evaluated, augmented, chosen, images)))
    for name in names:
        if name.startswith(("shift/", "ood/")) and name != names[0] and not _CORRUPTED.fullmatch(name):
            other = data.set_of(name)
            chosen = _chosen(torch.arange(len(other.label)), images + 1, generator)
            rows.append((name, _bytes(data, other, chosen)))
    columns = ["evaluated", *(f"augmented {version}" for version in range(1, images + 1))]
    if augmented is None:
        columns = [str(number) for number in range(1, images + 2)]
    return Examples(rows, columns[: max(len(shown) for _, shown in rows)])


def corruption_examples(data: BenchmarkDataModule, seed: int) -> dict[str, Examples]:
    """Show one image in every corruption, by severity.

    Args:
        data: Data after ``setup``.
        seed: Selects the image.

    Returns:
        By the name of the shift a row for each corruption; before the severities the image itself, if the shift is
        generated from the test set. Empty without corrupted sets.
    """
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in data.set_names:
        if match := _CORRUPTED.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(match[2], {})[int(match[3])] = name
    return {shift: _by_severity(data, corruptions, seed) for shift, corruptions in found.items()}


def generated_examples(data: BenchmarkDataModule, seed: int) -> tuple[Examples, Table, dict[str, str]]:
    """Corrupt one test image in every way, as the shift "generated" does by default.

    Args:
        data: Data after ``setup``; without test images the first set has the image.
        seed: Selects the image.

    Returns:
        A row for each corruption, the image itself first; the table of constants; and why others cannot be made here.
    """
    images = data.set_of("test" if "test" in data.set_names else data.set_names[0])
    place = _chosen(torch.arange(len(images)), 1, torch.Generator().manual_seed(seed))
    image, row, table = _bytes(data, images, place), images.rows[place], table_for(*data.image_facts["shape"][1:])
    missing, rows = unavailable(CORRUPTIONS), []
    for corruption in CORRUPTIONS:
        if corruption not in missing:
            made = [corrupt(image, corruption, severity, row, table=table) for severity in SEVERITIES]
            rows.append((corruption, torch.cat([image, *made])))
    return Examples(rows, ["original", *map(str, SEVERITIES)]), table, missing


def _by_severity(data: BenchmarkDataModule, corruptions: dict[str, dict[int, str]], seed: int) -> Examples:
    severities = sorted({severity for names in corruptions.values() for severity in names})
    first = next(iter(next(iter(corruptions.values())).values()))
    size = len(data.set_of(first).label)
    place = _chosen(torch.arange(size), 1, torch.Generator().manual_seed(seed))
    before = _original(data, first, int(place))
    rows = []
    for corruption, names in corruptions.items():
        images = [_bytes(data, data.set_of(names[severity]), place) for severity in sorted(names)]
        rows.append((corruption, torch.cat([*before, *images])))
    return Examples(rows, [*("original" for _ in before), *map(str, severities)])


def _original(data: BenchmarkDataModule, corrupted: str, place: int) -> list[Tensor]:
    """The test image that a generated one was made of."""
    if not corrupted.startswith(f"shift/{GENERATED}/") or "test" not in data.set_names:
        return []
    row = data.source_rows(corrupted)[place]
    same = torch.from_numpy(data.source_rows("test") == row).nonzero()[:, 0]
    return [_bytes(data, data.set_of("test"), same[:1])] if len(same) else []


def class_name(data: BenchmarkDataModule, label: int) -> str:
    """Name of a class.

    Args:
        data: The data.
        label: Its label.

    Returns:
        The name, or the number where there is none.
    """
    return str(label) if data.class_names is None else str(data.class_names[label])


def image_bytes(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo `Normalize`, exactly: the bytes of a network's input.

    Args:
        image: ``(N, C, H, W)`` float32.
        mean: Mean of each channel, as a fraction.
        std: Standard deviation of each channel, as a fraction.

    Returns:
        ``(N, C, H, W)`` uint8.

    Example:
        >>> from calib_lightning.data import Normalize
        >>> every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        >>> image = Normalize((0.1307,), (0.3081,))(every, torch.tensor([0]), 0)
        >>> torch.equal(image_bytes(image, (0.1307,), (0.3081,)), every)
        True
    """
    centre, scale = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (mean, std))
    return ((image.double() * scale + centre) * 255).round().clamp(0, 255).to(torch.uint8)


def _row(
    data: BenchmarkDataModule, evaluated: BatchSet, augmented: BatchSet | None, chosen: Tensor, images: int
) -> Tensor:
    if augmented is None:
        return _bytes(data, evaluated, chosen)
    versions = [_bytes(data, augmented, chosen[:1], epoch) for epoch in range(images)]
    return torch.cat([_bytes(data, evaluated, chosen[:1]), *versions])


def _bytes(data: BenchmarkDataModule, images: BatchSet, index: Tensor, epoch: int = 0) -> Tensor:
    return image_bytes(images.fetch(index, epoch).image, data.mean, data.std)


def _chosen(positions: Tensor, most: int, generator: torch.Generator) -> Tensor:
    return positions[torch.randperm(len(positions), generator=generator)[:most]]


def _spread(classes: int) -> list[int]:
    """At most ten classes, the first and the last among them."""
    return sorted({round(k) for k in torch.linspace(0, classes - 1, min(classes, _MOST_CLASSES)).tolist()})
