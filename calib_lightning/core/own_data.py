"""Data that is not of this package: batches of several forms, and the position of every sample in its data set."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.data import sized_len
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from calib_lightning.types import Batch

FORMS = "(image, label), (image, label, index) or a dict with 'image' and 'label'"

# --- batches ---------------------------------------------------------------------------------------------------------


def as_batch(batch: Any, who: str, *, labelled: bool = True) -> Batch:
    """Bring a batch of any form into the package's own.

    Args:
        batch: ``(image, label)``, ``(image, label, index)`` or a dict with ``image`` and ``label`` and perhaps
            ``index``. What is no integer tensor ``(N,)`` is no index (a path, say) and is left out.
        who: Who asks, for the message.
        labelled: Whether labels are needed; else images alone are a batch, too.

    Returns:
        Images, labels and index; -1 stands for a label or an index that is not known.

    Raises:
        TypeError: If images or labels are missing, or there are more than three parts.
    """
    image, label, index = _parts(batch)
    missing = [] if isinstance(image, Tensor) else ["image"]
    missing += [] if isinstance(label, Tensor) or not labelled else ["label"]
    if missing or (isinstance(batch, list | tuple) and len(batch) > 3):
        reason = f": {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else ""
        raise TypeError(
            f"{who} needs batches {FORMS} of tensors, but this one is {_description(batch)}{reason}. Let the data set "
            "return one of these forms."
        )
    if not isinstance(label, Tensor):
        label = _unknown(image)
    elif not label.is_floating_point():  # integers of any width, also as a column
        label = (label.squeeze(1) if label.ndim == 2 and label.shape[1] == 1 else label).long()
    return Batch(image, label, _unknown(image) if index is None else index)


def has_index(batch: Any) -> bool:
    """Tell whether a batch says which sample of its set each row is.

    Args:
        batch: A batch of any form.

    Returns:
        Whether there is an integer tensor ``(N,)`` in the place of the index.
    """
    return _parts(batch)[2] is not None


def image_and_label(batch: Any, who: str) -> tuple[Any, Tensor]:
    """Take a batch of any module apart.

    Args:
        batch: A tuple or list whose first two parts are the input and the class labels ``(N,)``, or a dict with
            ``image`` and ``label``.
        who: Who asks, for the message.

    Returns:
        Both.

    Raises:
        TypeError: If it is anything else.
    """
    image, label, _ = _parts(batch)
    if image is not None and isinstance(label, Tensor):
        return image, label
    raise TypeError(
        f"{who} needs batches (image, label, ...) or dicts with 'image' and 'label', but this one is "
        f"{_description(batch)}; let the data set return one of these forms."
    )


def rows_in(batch: Any) -> int:
    """Count the images of a batch.

    Args:
        batch: A batch of any form.

    Returns:
        Their number; 0 where no images are found.
    """
    return sized_len(_parts(batch)[0]) or 0


def _parts(batch: Any) -> tuple[Any, Any, Tensor | None]:
    """Image, label and index; ``None`` for what is not there."""
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
    """A batch as its loader made it, on its way to the module, and the positions of its samples."""

    batch: Any
    index: Tensor  # type: ignore[assignment]  # as in Batch

    def attached(self) -> Any:
        """The batch with the positions, unless it has an index of its own or another number of rows."""
        image, label, own = _parts(self.batch)
        if own is not None or not isinstance(image, Tensor) or len(image) != len(self.index):
            return self.batch
        index = self.index.to(image.device, non_blocking=True)
        if not isinstance(label, Tensor):  # images alone, for predictions
            return Positioned(self.batch, index)
        return (
            self.batch if isinstance(self.batch, list | tuple) and len(self.batch) > 3 else Batch(image, label, index)
        )


def with_positions(loader: object) -> object:
    """Let a loader tell the position of every sample in its data set.

    Args:
        loader: Anything; a ``DataLoader`` that makes batches of a map-style data set is copied, all else stays.

    Returns:
        A loader like it whose batches are `Positioned`.
    """
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        return loader
    if isinstance(loader.dataset, IterableDataset | _Drawing):
        return loader
    copied = copy.copy(loader)
    # a loader refuses to be assigned to; workers that persist belong to the loader that began them
    vars(copied).update(dataset=_Drawing(loader.dataset), collate_fn=_Collate(loader.collate_fn), _iterator=None)
    vars(copied)["_without_positions"] = loader
    return copied


def without_positions(loader: Any) -> Any:
    """Give back the loader that `with_positions` was given.

    Args:
        loader: Any loader.

    Returns:
        The loader before, or itself.
    """
    return getattr(loader, "_without_positions", loader)


class _Drawn(NamedTuple):
    samples: Any
    places: Sequence[Any]


class _Drawing(Dataset[Any]):
    """A data set whose batches remember where their samples were drawn; all else is asked of the set itself."""

    def __init__(self, data: Any) -> None:
        vars(self)["_drawn_from"] = data

    def __len__(self) -> int:
        return len(self._drawn_from)

    def __getitem__(self, place: Any) -> Any:
        return self._drawn_from[place]

    def __getitems__(self, places: Sequence[Any]) -> _Drawn:
        data = self._drawn_from
        at_once = getattr(data, "__getitems__", None)
        return _Drawn(at_once(places) if at_once else [data[place] for place in places], places)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_drawn_from":  # asked for before unpickling has filled the object
            raise AttributeError(name)
        return getattr(self._drawn_from, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._drawn_from, name, value)


class _Collate:
    """Collates the samples as the loader would, and passes their positions on."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, drawn: _Drawn) -> Any:
        batch = self.collate(drawn.samples)
        try:
            return Positioned(batch, torch.tensor([operator.index(place) for place in drawn.places]))
        except TypeError:  # a sampler of keys that are no positions
            return batch
