"""Features of a loader from outside this package, as a loader with the same options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from calib_lightning.core.module import ClassificationModule
from calib_lightning.core.own_data import as_batch, has_index, without_positions
from calib_lightning.core.stored_features import StoredFeatures

T = TypeVar("T")

LOOKED_AT = 256  # rows of a loader that are read twice: enough to notice an augmentation of one row in ten


class FeatureRows(Dataset[Any]):
    """Features and whatever came with the images, in the original type of tuple."""

    def __init__(self, kind: type[Any], columns: list[Tensor]) -> None:
        self.kind, self.columns = kind, columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> Any:
        parts = [column[row] for column in self.columns]
        return self.kind(*parts) if hasattr(self.kind, "_fields") else parts


def loader_over_features(
    trainer: Trainer, module: LightningModule, stored: StoredFeatures, head: nn.Module, loaders: list[Any]
) -> DataLoader[Any]:
    """A loader of features with the options of the trainer's own."""
    loader = without_positions(loaders[0])
    if len(loaders) != 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"CachedFeatures cannot read {type(loader).__name__} in order; it needs a single DataLoader over a "
            "map-style data set. Omit the cache, or use a data module of this package."
        )
    if loader.batch_size is None:
        raise ValueError("CachedFeatures needs a DataLoader with a batch_size, not with a batch_sampler.")
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
    ordered: DataLoader[Any] = DataLoader(loader.dataset, batch_size=loader.batch_size, shuffle=False, **options)
    for first, second in islice(zip(ordered, ordered, strict=True), -(-LOOKED_AT // loader.batch_size)):
        batch, again = _columns(module, first), _columns(module, second)
        if not isinstance(batch, list | tuple) or not all(
            isinstance(part, Tensor) and part.shape[:1] == batch[0].shape[:1] for part in batch
        ):
            raise ValueError(
                "CachedFeatures needs batches that are tuples of tensors with one row per image, but the batch is a "
                f"{type(batch).__name__}. Omit the cache, or let the data set return such tuples."
            )
        if not all(torch.equal(part, other) for part, other in zip(batch, again, strict=True)):
            raise ValueError(
                "The training images, or the tensors that come with them, differ between two readings: features of "
                "random augmentations cannot be stored. Omit CachedFeatures, or train this stage without augmentation."
            )
    columns: list[list[Tensor]] = []
    for batch in with_progress(trainer, ordered, "Features"):
        features, batch = stored.learn(module, head, batch).cpu(), _columns(module, batch)
        columns.append([features, *batch[1:]])
    rows = FeatureRows(type(batch), [torch.cat(parts) for parts in zip(*columns, strict=True)])
    stored.expect(rows.columns[0])
    return DataLoader(
        dataset=rows,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        generator=loader.generator,
    )


def _columns(module: LightningModule, batch: Any) -> Any:
    """The parts of a batch; for our modules, a dict is split into images and labels."""
    if not isinstance(module, ClassificationModule) or not isinstance(batch, Mapping):
        return batch
    found = as_batch(batch, "CachedFeatures")
    return found if has_index(batch) else list(found[:2])


def with_progress(trainer: Trainer, loader: Iterable[T], what: str) -> Iterable[T]:
    """Iterate with a progress bar on the first process, if the trainer has one."""
    silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
    bar: Callable[..., Iterable[T]] = tqdm
    return bar(loader, desc=what, disable=silent, leave=False)
