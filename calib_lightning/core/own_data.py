"""Data from outside this package: batch formats, and the position of every sample in its data set."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from calib_lightning.core.data_in_use import tell_epoch
from calib_lightning.types import Batch

BatchParts = tuple[str | int, str | int] | Callable[[Any], tuple[Any, Tensor]]
"""Where input and labels are in a batch: two keys or positions, or a function ``batch -> (input, labels)``."""

FORMS = "(image, label), (image, label, index) or a dict with 'image' and 'label'"

# --- batches ---------------------------------------------------------------------------------------------------------


def as_batch(batch: Any, who: str, *, labelled: bool = True) -> Batch:
    """Convert a batch of any supported form to `Batch`; -1 stands for an unknown label or index.

    An index that is not an integer tensor ``(N,)`` (a path, for example) is dropped. ``who`` is named in errors;
    without ``labelled``, images alone are accepted.
    """
    image, label, index = _parts(batch)
    missing = [] if isinstance(image, Tensor) else ["image"]
    missing += [] if isinstance(label, Tensor) or not labelled else ["label"]
    if missing or (isinstance(batch, list | tuple) and len(batch) > 3):
        reason = f": {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else ""
        raise TypeError(
            f"{who} needs batches {FORMS} of tensors, but the batch is {_description(batch)}{reason}. Let the data set "
            "return one of these forms."
        )
    if not isinstance(label, Tensor):
        label = _unknown(image)
    elif not label.is_floating_point():  # integers of any width, possibly as a column
        label = (label.squeeze(1) if label.ndim == 2 and label.shape[1] == 1 else label).long()
    return Batch(image, label, _unknown(image) if index is None else index)


def has_index(batch: Any) -> bool:
    """Return whether a batch holds the index of each row in its set."""
    return _parts(batch)[2] is not None


def image_and_label(batch: Any, who: str, parts: BatchParts | None = None) -> tuple[Any, Tensor]:
    """Return input and labels of a batch from any module, where ``parts`` says; ``who`` is named in errors."""
    wanted = "batches (image, label, ...) or dicts with 'image' and 'label'"
    if parts is None:
        image, label, _ = _parts(batch)
    elif callable(parts):
        image, label = _pair(parts(batch), who)
        wanted = "labels that are a tensor from batch=..."
    else:
        first, second = _pair(parts, who)
        wanted = f"{first!r} and {second!r} in a batch, as batch=({first!r}, {second!r}) says"
        try:
            image, label = batch[first], batch[second]
        except (KeyError, IndexError, TypeError):
            image = label = None
    if image is not None and isinstance(label, Tensor | Sequence | np.ndarray) and not isinstance(label, str):
        with suppress(TypeError, ValueError, RuntimeError):  # a list of numbers has labels, others do not
            return image, torch.as_tensor(label)
    raise TypeError(
        f"{who} needs {wanted}, but the batch is {_description(batch)}. Give batch=(key of the input, key of the "
        "labels), or a function that returns both."
    )


def check_parts(parts: BatchParts | None, who: str) -> None:
    """Reject a ``batch`` of an argument that no batch could be read with."""
    if parts is not None and not callable(parts):
        _pair(parts, who)


def _pair(parts: Any, who: str) -> tuple[Any, Any]:
    if isinstance(parts, list | tuple) and len(parts) == 2:
        return parts[0], parts[1]
    raise TypeError(
        f"batch of {who} gives {_description(parts)}; it must give two parts, the input and the labels. Pass two keys, "
        "or a function that returns (input, labels)."
    )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Reject class labels ``(N,)`` outside ``0..K-1``, on the CPU."""
    # On a GPU this would synchronise every step; data modules check their labels on loading.
    if labels.device.type != "cpu" or labels.ndim != 1 or len(labels) == 0:
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"A training batch holds the label {wrong}; labels must be in 0..{num_classes - 1}. Map the "
            "labels where they are loaded, or set num_classes to the number of classes."
        )


def rows_in(batch: Any) -> int:
    """Count the images of a batch; 0 if there are none."""
    return sized_len(_parts(batch)[0]) or 0


def _parts(batch: Any) -> tuple[Any, Any, Tensor | None]:
    """Image, label and index; ``None`` for missing parts."""
    if isinstance(batch, Positioned):
        return (*_parts(batch.batch)[:2], batch.index)
    if isinstance(batch, Mapping):
        parts = [batch.get(name) for name in ("image", "label", "index")]
    else:
        given = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, list | tuple) else []
        parts = [*given, None, None, None][:3] if len(given) <= 3 else [*given[:2], None]
    image, label, index = parts
    if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        return image, label, None
    return image, label, index.long()


def _unknown(image: Tensor) -> Tensor:
    return torch.full((len(image),), -1, device=image.device)


def _description(batch: Any) -> str:
    batch = batch.batch if isinstance(batch, Positioned) else batch
    if isinstance(batch, Mapping):
        return f"a dict with the keys {', '.join(map(repr, batch))}" if batch else "an empty dict"
    if isinstance(batch, list | tuple):
        kinds = ", ".join(type(part).__name__ for part in batch)
        return f"a {type(batch).__name__} of {len(batch)} parts ({kinds})"
    return f"a {type(batch).__name__}"


# --- positions -------------------------------------------------------------------------------------------------------


class Positioned(NamedTuple):
    """A batch on its way to the module, as its loader made it, with the positions of its samples."""

    batch: Any
    index: Tensor  # type: ignore[assignment]  # as in Batch

    def attached(self) -> Any:
        """The batch with the positions, unless it has its own index or a different number of rows."""
        image, label, own = _parts(self.batch)
        if own is not None or not isinstance(image, Tensor) or len(image) != len(self.index):
            return self.batch
        index = self.index.to(image.device, non_blocking=True)
        if not isinstance(label, Tensor):  # images only, for predictions
            return Positioned(self.batch, index)
        return (
            self.batch if isinstance(self.batch, list | tuple) and len(self.batch) > 3 else Batch(image, label, index)
        )


def with_positions(loader: object) -> object:
    """Return a loader like ``loader`` whose batches are `Positioned`.

    Only a ``DataLoader`` that batches a map-style data set is copied; anything else is returned unchanged.
    """
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return loader
    if isinstance(loader.dataset, IterableDataset | _Drawing):
        return loader
    copied = copy.copy(loader)
    # DataLoader forbids assignment; persistent workers belong to the loader that started them
    vars(copied).update(dataset=_Drawing(loader.dataset), collate_fn=_Collate(loader.collate_fn), _iterator=None)
    vars(copied)["_without_positions"] = loader
    return copied


def report_positions(trainer: Trainer, wanted: type[LightningModule]) -> None:
    """Make the trainer's loaders report positions, as long as its module is a ``wanted`` one.

    No hook of a module sees a loader after Lightning has set its distributed sampler; the strategy, which is asked for
    every loader of every stage then, does.
    """

    def process_dataloader(loader: object) -> object:
        ours = isinstance(trainer.lightning_module, wanted)
        if ours and trainer.training:
            tell_epoch(trainer, loader)  # worker processes start before the epoch does
        return type(strategy).process_dataloader(strategy, with_positions(loader) if ours else loader)

    strategy = trainer.strategy
    vars(strategy)["process_dataloader"] = process_dataloader


def without_positions(loader: Any) -> Any:
    """Return the loader that `with_positions` was given, or the loader itself."""
    return getattr(loader, "_without_positions", loader)


class _Drawn(NamedTuple):
    samples: Any
    places: Sequence[Any]


class _Drawing(Dataset[Any]):
    """A data set whose batches remember where their samples were drawn; otherwise it delegates to the original."""

    def __init__(self, data: Any) -> None:
        vars(self)["_drawn_from"] = data  # assignment would set an attribute of the data

    def __len__(self) -> int:
        return len(self._drawn_from)

    def __getitem__(self, place: Any) -> Any:
        return self._drawn_from[place]

    def __getitems__(self, places: Sequence[Any]) -> _Drawn:
        data = self._drawn_from
        at_once = getattr(data, "__getitems__", None)
        return _Drawn(at_once(places) if at_once else [data[place] for place in places], places)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_drawn_from":  # requested before unpickling has filled the object
            raise AttributeError(name)
        return getattr(self._drawn_from, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._drawn_from, name, value)


class _Collate:
    """Collate the samples like the loader, and pass on their positions."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, drawn: _Drawn) -> Any:
        batch = self.collate(drawn.samples)
        try:
            return Positioned(batch, torch.tensor([operator.index(place) for place in drawn.places]))
        except TypeError:  # the sampler's keys are not positions
            return batch
