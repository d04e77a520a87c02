"""The data that a trainer is reading: which it is, what it offers to a stage, and how a fit changes its loader."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, Protocol, cast

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from calib_lightning.core.twins import is_twin
from calib_lightning.types import Batch, Views


class OrderedLoader(Protocol):
    """Training images in row order."""

    data: Sized
    """The training set."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches of this process."""

    def set_epoch(self, epoch: int) -> None:
        """Select the augmentation of an epoch."""


class StagedData(Protocol):
    """What a data module offers if a stage may change its images, as `BenchmarkDataModule` does.

    Its ``train_dataloader`` must follow the three ``stage_...`` attributes: a switch sets them, then asks for a loader.
    """

    augment: bool
    """Whether training images are augmented."""
    stage_views: Views | None
    """How the stage prepares its images; ``None`` keeps those of the data module."""
    stage_batch_size: int | None
    """Batch size of the stage per process; ``None`` keeps that of the data module."""
    stage_features: Tensor | None
    """Features ``(N, V, d)`` that replace the images; ``None`` for images."""

    def ordered_train_loader(self, *, augmented: bool) -> OrderedLoader:
        """Training images in row order, augmented or as in evaluation."""

    def training_images_key(self, *, augmented: bool) -> str:
        """A key of these images: equal keys mean equal images."""


_OFFERED = (
    "augment",
    "stage_views",
    "stage_batch_size",
    "stage_features",
    "ordered_train_loader",
    "training_images_key",
)


def datamodule_in_use(trainer: Trainer) -> LightningDataModule | None:
    """Return the data module whose loaders the trainer is reading, ``None`` for plain loaders.

    ``trainer.datamodule`` is no substitute: it persists after a fit, even when other loaders are evaluated.
    """
    loops: dict[TrainerFn, Any] = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    loop = None if trainer.state.fn is None else loops.get(trainer.state.fn)
    source = None if loop is None else loop._data_source.instance
    return source if is_twin(source, LightningDataModule) else None


def staged_data(trainer: Trainer) -> StagedData | None:
    """Return the trainer's data module if a stage may change its images and batch size, else ``None``."""
    data = datamodule_in_use(trainer)
    # attributes that a module passes on from another one count as well, which `isinstance` would not see
    return cast(StagedData, data) if all(hasattr(data, name) for name in _OFFERED) else None


class ViewedData(Protocol):
    """What prepares its images as a stage asks: a `StagedData`, or a data set such as `ViewedDataset`."""

    stage_views: Views | None
    """How the stage prepares its images; ``None`` keeps those of the data."""


def viewed_data(trainer: Trainer) -> ViewedData | None:
    """Return what prepares the training images of a fit as a stage asks, else ``None``."""
    data = staged_data(trainer)
    plain = getattr(trainer.fit_loop._data_source.instance, "dataset", None)  # of a plain loader
    return cast(ViewedData, plain) if data is None and hasattr(plain, "stage_views") else data


def can_change_views(trainer: Trainer) -> bool:
    """Return whether the trainer's data can change its images at a switch."""
    return viewed_data(trainer) is not None


def can_change_loading(trainer: Trainer) -> bool:
    """Return whether the trainer's data can change its images and batch size at a switch."""
    return staged_data(trainer) is not None


def tell_epoch(trainer: Trainer, loader: Any = None) -> None:
    """Tell the data set of a plain training loader the epoch, if it prepares its images as a stage asks."""
    loop = trainer.fit_loop
    given = [] if loop._combined_loader is None else loop._combined_loader.flattened
    for each in given if loader is None else [loader]:
        data: Any = getattr(each, "dataset", None)
        if hasattr(data, "stage_views"):
            data.set_epoch(trainer.current_epoch)


def set_loading(trainer: Trainer, views: Views | None, batch_size: int | None) -> None:
    """Set the images and the batch size of the next training loader, if the data can change them."""
    viewed, data = viewed_data(trainer), staged_data(trainer)
    if viewed is not None:
        viewed.stage_views = views
    if data is not None:
        data.stage_batch_size, data.stage_features = batch_size, None


def reload_train_loader(trainer: Trainer, loader: Any = None, *, resumed: bool = False) -> None:
    """Switch the fit to another training loader, at the start of an epoch or of the fit.

    ``None`` asks the data module or module again; a ``resumed`` loader continues where the previous one stopped.
    """
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    before = loop._combined_loader.flattened
    states = [part.state_dict() if hasattr(part, "state_dict") else None for part in before]
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
    source = loop._data_source.instance
    loop._combined_loader = None
    # Lightning creates an iterator here and another at the start of the epoch: the first must not draw the order
    generators = [part.generator for part in (*before, loader) if getattr(part, "generator", None) is not None]
    drawn = [generator.get_state() for generator in generators]
    try:
        if loader is not None:
            loop._data_source.instance = loader
        with torch.random.fork_rng(devices=[]):
            loop.setup_data()
    finally:
        loop._data_source.instance = source
        for generator, state in zip(generators, drawn, strict=True):
            generator.set_state(state)
    after: list[Any] = loop._combined_loader.flattened  # type: ignore[attr-defined]  # set by setup_data
    for part, state in zip(after, states, strict=False):
        if resumed and state is not None and hasattr(part, "load_state_dict"):
            part.load_state_dict(state)
        _set_sampler_epoch(part, trainer.current_epoch)


def label_distributions_of(data: LightningDataModule | None, name: str) -> Tensor | None:
    """Return the class distributions ``(N, K)`` of a set, such as annotators' votes; ``None`` if there are none.

    They come from the method ``label_distributions(name)`` of the data module; row i belongs to ``Batch.index`` i.
    """
    find: Any = getattr(data, "label_distributions", None)
    found: Tensor | None = None if find is None else find(name)
    if found is None:
        return None
    source_rows: Any = getattr(data, "source_rows", None)
    rows = len(found) if source_rows is None else len(source_rows(name))
    if found.ndim != 2 or len(found) != rows:
        raise ValueError(
            f"label_distributions({name!r}) has shape {tuple(found.shape)}; it must be ({rows}, K). Return one row per "
            "image of the set, in index order."
        )
    return found.float()
