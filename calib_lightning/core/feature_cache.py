"""Stored features: a stage with a frozen encoder and fixed images needs to encode them only once."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from calib_lightning.core.data_in_use import (
    OrderedLoader,
    StagedData,
    datamodule_in_use,
    reload_train_loader,
    staged_data,
)
from calib_lightning.core.distributed import gather_rows
from calib_lightning.core.feature_loader import loader_over_features, with_progress
from calib_lightning.core.stored_features import StoredFeatures, alike
from calib_lightning.types import Views
from calib_lightning.utils.files import remove_leftovers, write_whole
from calib_lightning.utils.registry import class_path_of
from calib_lightning.utils.stored import load_torch


class CachedFeatures(Views):
    """Train a stage on features computed once, instead of passing images through a frozen encoder every time.

    The images are unaugmented, or a fixed number of augmented views per image, of which each step draws one per row.
    With a ``folder``, the features are saved in a file named after everything they depend on: the encoder's layers and
    weights, the images, the transform and the precision. Runs with the same folder share the file; if two need it at
    once, one computes and the other waits. A file that cannot be read, or whose first rows differ from the encoder's
    current features, is replaced with a warning.

    The encoder must receive the images exactly as the loader returns them: anything that changed them on the way would
    change the features instead, so the first step of the stage checks this. Nothing below the head may be trainable.

    With a data module of this package, the processes share the work and all options are available. Any other loader
    must be a ``DataLoader`` over a map-style data set that returns the same images every time; every process then
    computes all features, and only the defaults are available.

    Args:
        views: Augmented views per image; 0 means unaugmented images.
        folder: Folder of the files; ``None`` keeps the features in memory only.
        on_device: Keep them on the training device, which must hold N V d values.

    Raises:
        ValueError: If ``views`` is negative, or the features cannot be stored in this run; before training starts if
            that is known then, else at the switch or in the first step after it.

    Example:
        >>> CachedFeatures(views=5).views
        5
    """

    stores_features: ClassVar[bool] = True

    def __init__(self, views: int = 0, folder: str | None = None, on_device: bool = False) -> None:
        if views < 0:
            raise ValueError(f"views is {views}; it must be at least 0 (0: images without augmentation).")
        self.views = views
        self.folder = folder
        self.on_device = on_device

    def transform(self, normalize: nn.Module, augment: nn.Module | None, seed: int) -> nn.Module:
        """Return ``normalize``: images are only needed until their features are stored."""
        return normalize

    def check(
        self,
        trainer: Trainer,
        module: LightningModule,
        encoder: nn.Module,
        head: nn.Module,
        transform: nn.Module | None,
    ) -> None:
        """Reject a run whose features cannot be stored; see `Views.check`.

        Raises:
            ValueError: If the images of the stage are random, or the loader cannot be read in order.
        """
        if any(part is head for part in encoder.modules()):
            raise ValueError(
                "The head is part of the encoder, which CachedFeatures bypasses. Name a submodule that computes the "
                "features and excludes the head with encoder=...."
            )
        if transform is not None:
            raise ValueError(
                f"CachedFeatures is incompatible with {type(transform).__name__}, which mixes or multiplies images. "
                "Give the stage a criterion, which replaces the transform, or omit the cache."
            )
        data = staged_data(trainer)
        if data is not None:
            if self.views and not data.augment:
                raise ValueError(
                    f"views is {self.views}, but {type(data).__name__} does not augment its images: all views would be "
                    "identical. Use views=0."
                )
            return
        other = datamodule_in_use(trainer)
        if self.views or self.folder is not None or self.on_device:
            raise ValueError(
                f"views is {self.views}, folder is {self.folder!r} and on_device is {self.on_device}; these options "
                f"need a data module of this package, not {type(other).__name__ if other else 'plain loaders'}. Use "
                "views=0, folder=None and on_device=False."
            )

    def check_batch(self, batch: Any) -> None:
        """Reject batches that are neither tuples nor lists."""
        if not isinstance(batch, list | tuple):
            raise TypeError(
                f"The batch is a {type(batch).__name__}; CachedFeatures needs tuples of tensors that start with the "
                "images. Omit the cache, or let the loader return tuples."
            )

    def store(
        self, trainer: Trainer, module: LightningModule, encoder: nn.Module, head: nn.Module, *, resumed: bool
    ) -> StoredFeatures:
        """Compute the features, give them to the loader, and let the encoder pass them on; see `Views.store`.

        Returns:
            The active substitution; set ``in_use`` around each training step, and call ``remove`` at the end.
        """
        stored = StoredFeatures(encoder, head)
        try:
            data = staged_data(trainer)
            if data is not None:
                features = self._of_benchmark(trainer, module, stored, head, data)
                stored.expect(features)
                data.stage_features = features.to(module.device) if self.on_device else features
                reload_train_loader(trainer, resumed=resumed)
            else:
                assert trainer.fit_loop._combined_loader is not None
                loaders = trainer.fit_loop._combined_loader.flattened
                with torch.random.fork_rng(devices=[]):
                    loader = loader_over_features(trainer, module, stored, head, loaders)
                reload_train_loader(trainer, loader, resumed=resumed)
        except BaseException:
            stored.remove()
            raise
        return stored

    # --- a data module of this package -------------------------------------------------------------------------------

    def _of_benchmark(
        self, trainer: Trainer, module: LightningModule, stored: StoredFeatures, head: nn.Module, data: StagedData
    ) -> Tensor:
        """Features ``(N, V, d)`` of all training rows, on the CPU."""
        if self.folder is None:
            return self._compute(trainer, module, stored, head, data)
        loader = self._ordered(data, 0)
        batch = next(iter(loader))
        first = stored.learn(module, head, batch).cpu()
        if not stored.direct:
            raise ValueError(
                f"folder is {self.folder!r}, but the head of {type(module).__name__} does not receive the output of "
                "its encoder, and files are named after the encoder only. Use folder=None."
            )
        path = Path(self.folder) / f"features-{self._key(trainer, module, stored, data)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # one process of the run holds the lock and decides for all
        lock: AbstractContextManager[Any] = FileLock(f"{path}.lock") if trainer.is_global_zero else nullcontext()
        kept: Tensor | None = None
        with lock:
            if trainer.is_global_zero:
                remove_leftovers(path.parent.glob("*.tmp"))
            if trainer.is_global_zero and path.is_file():
                kept = self._read(path, batch.index, first, len(loader.data))
            there: bool = trainer.strategy.broadcast(kept is not None)
            if not there:
                kept = self._compute(trainer, module, stored, head, data)
                if trainer.is_global_zero:
                    write_whole(path, lambda file: torch.save(kept, file))
        if kept is None:
            kept = load_torch(path)
        return kept

    def _read(self, path: Path, index: Tensor, first: Tensor, size: int) -> Tensor | None:
        try:
            kept: Tensor = load_torch(path)
            if kept.shape[:2] == (size, max(1, self.views)) and alike(kept[index, 0], first):
                return kept
            problem = "does not match this encoder"
        except Exception as error:  # the error depends on where the file is damaged
            problem = f"cannot be read ({type(error).__name__})"
        rank_zero_warn(f"The feature file {path} {problem}: the features are recomputed and the file is replaced.")
        return None

    def _ordered(self, data: StagedData, view: int) -> OrderedLoader:
        loader = data.ordered_train_loader(augmented=self.views > 0)
        loader.set_epoch(view)  # a view is the augmentation of one epoch
        return loader

    def _compute(
        self, trainer: Trainer, module: LightningModule, stored: StoredFeatures, head: nn.Module, data: StagedData
    ) -> Tensor:
        views = max(1, self.views)
        kept: Tensor | None = None
        for view in range(views):
            what = f"Features, view {view + 1} of {views}" if self.views else "Features"
            loader = self._ordered(data, view)
            for batch in with_progress(trainer, loader, what):
                features = stored.learn(module, head, batch)
                rows = gather_rows(batch.index.to(features.device)).cpu()
                every = gather_rows(features).cpu()
                if kept is None:  # allocated once: the features of a large set take much of the memory
                    kept = every.new_empty((len(loader.data), views, *every.shape[1:]))
                kept[rows, view] = every
        assert kept is not None
        return kept

    def _key(self, trainer: Trainer, module: LightningModule, stored: StoredFeatures, data: StagedData) -> str:
        digest = hashlib.sha256(f"{class_path_of(type(module))} {stored.encoder}".encode())
        for name, value in stored.encoder.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(f"{self.views} {trainer.precision} {data.training_images_key(augmented=self.views > 0)}".encode())
        return digest.hexdigest()[:32]
