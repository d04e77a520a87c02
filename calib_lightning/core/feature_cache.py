"""Stored features: a stage with a frozen encoder and fixed images needs to encode them only once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from calib_lightning.core.distributed import gather_rows
from calib_lightning.core.module import ClassificationModule, datamodule_in_use
from calib_lightning.core.own_data import as_batch, has_index, without_positions
from calib_lightning.core.submodules import evaluating
from calib_lightning.types import Views
from calib_lightning.utils.files import write_whole
from calib_lightning.utils.registry import class_path_of

if TYPE_CHECKING:
    from calib_lightning.core.stages import StageTraining

_LOOKED_AT = 256  # rows of a loader that are read twice: enough to notice an augmentation of one row in ten


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
        training: StageTraining,
    ) -> None:
        """Reject a run whose features cannot be stored, before training starts.

        Args:
            trainer: The trainer.
            module: The module.
            encoder: The frozen encoder.
            head: The head before the switch.
            training: How the stage is trained.

        Raises:
            ValueError: If the images of the stage are random, or the loader cannot be read in order.
        """
        if any(part is head for part in encoder.modules()):
            raise ValueError(
                "The head is part of the encoder, which CachedFeatures bypasses. Name a submodule that computes the "
                "features and excludes the head with encoder=...."
            )
        transform = module.batch_transform if isinstance(module, ClassificationModule) else None
        if transform is not None and training.criterion is None:
            raise ValueError(
                f"CachedFeatures is incompatible with {type(transform).__name__}, which mixes or multiplies images. "
                "Give the stage a criterion, which replaces the transform, or omit the cache."
            )
        data: Any = datamodule_in_use(trainer)
        if hasattr(data, "stage_features"):
            if self.views and not data.augment:
                raise ValueError(
                    f"views is {self.views}, but {type(data).__name__} does not augment its images: all views would be "
                    "identical. Use views=0."
                )
            return
        if self.views or self.folder is not None or self.on_device:
            raise ValueError(
                f"views is {self.views}, folder is {self.folder!r} and on_device is {self.on_device}; these options "
                f"need a data module of this package, not {type(data).__name__ if data else 'plain loaders'}. Use "
                "views=0, folder=None and on_device=False."
            )

    def store(
        self, trainer: Trainer, module: LightningModule, encoder: nn.Module, head: nn.Module, *, resumed: bool
    ) -> StoredFeatures:
        """Compute the features, pass them to the training loader, and make the encoder pass them through.

        Args:
            trainer: The trainer, within ``fit``, at the start of an epoch or of the fit.
            module: The module, with its new head.
            encoder: The frozen encoder.
            head: The new head.
            resumed: Whether the loader may be in the middle of an epoch, where it continues.

        Returns:
            The active substitution; set ``in_use`` around each training step, and call ``remove`` at the end.
        """
        stored = StoredFeatures(encoder, head)
        try:
            data: Any = datamodule_in_use(trainer)
            if hasattr(data, "stage_features"):
                features = self._of_benchmark(trainer, module, stored, head, data)
                stored.expect(features)
                data.stage_features = features.to(module.device) if self.on_device else features
                reload_train_loader(trainer, resumed=resumed)
            else:
                assert trainer.fit_loop._combined_loader is not None
                loaders = trainer.fit_loop._combined_loader.flattened
                with torch.random.fork_rng(devices=[]):
                    loader = _over_features(trainer, module, stored, head, loaders)
                reload_train_loader(trainer, loader, resumed=resumed)
        except BaseException:
            stored.remove()
            raise
        return stored

    # --- a data module of this package -------------------------------------------------------------------------------

    def _of_benchmark(
        self, trainer: Trainer, module: LightningModule, stored: StoredFeatures, head: nn.Module, data: Any
    ) -> Tensor:
        """Features ``(N, V, d)`` of all training rows, on the CPU."""
        if self.folder is None:
            return self._compute(trainer, module, stored, head, data)
        batch = next(iter(self._ordered(data, 0)))
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
            if trainer.is_global_zero and path.is_file():
                kept = self._read(path, batch.index, first, data.train_size)
            there: bool = trainer.strategy.broadcast(kept is not None)
            if not there:
                kept = self._compute(trainer, module, stored, head, data)
                if trainer.is_global_zero:
                    write_whole(path, lambda file: torch.save(kept, file))
        if kept is None:
            kept = torch.load(path, weights_only=True)
        return kept

    def _read(self, path: Path, index: Tensor, first: Tensor, size: int) -> Tensor | None:
        try:
            kept: Tensor = torch.load(path, weights_only=True)
            if kept.shape[:2] == (size, max(1, self.views)) and _alike(kept[index, 0], first):
                return kept
            problem = "does not match this encoder"
        except Exception as error:  # the error depends on where the file is damaged
            problem = f"cannot be read ({type(error).__name__})"
        rank_zero_warn(f"The feature file {path} {problem}: the features are recomputed and the file is replaced.")
        return None

    def _ordered(self, data: Any, view: int) -> Any:
        loader = data.ordered_train_loader(augmented=self.views > 0)
        loader.set_epoch(view)  # a view is the augmentation of one epoch
        return loader

    def _compute(
        self, trainer: Trainer, module: LightningModule, stored: StoredFeatures, head: nn.Module, data: Any
    ) -> Tensor:
        views = max(1, self.views)
        kept: Tensor | None = None
        for view in range(views):
            what = f"Features, view {view + 1} of {views}" if self.views else "Features"
            for batch in _progress(trainer, self._ordered(data, view), what):
                features = stored.learn(module, head, batch)
                rows = gather_rows(batch.index.to(features.device)).cpu()
                every = gather_rows(features).cpu()
                if kept is None:  # allocated once: the features of a large set take much of the memory
                    kept = every.new_empty((data.train_size, views, *every.shape[1:]))
                kept[rows, view] = every
        assert kept is not None
        return kept

    def _key(self, trainer: Trainer, module: LightningModule, stored: StoredFeatures, data: Any) -> str:
        digest = hashlib.sha256(f"{class_path_of(type(module))} {stored.encoder}".encode())
        for name, value in stored.encoder.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(f"{self.views} {trainer.precision} {data.training_images_key(augmented=self.views > 0)}".encode())
        return digest.hexdigest()[:32]


class StoredFeatures:
    """Feeds stored features to the head within a training step.

    While `in_use`, the encoder returns the features that it receives. If there are layers between encoder and head, it
    returns NaN in the shape of its output instead, and the features go to the head directly. `direct` says whether the
    head's input equals the encoder's output; it is known after the first `learn`.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        self.encoder = encoder
        self.in_use = False
        self.direct = False
        self._encode, self._own = encoder.forward, vars(encoder).get("forward")
        self._output: Any = None
        self._shapes: tuple[torch.Size, torch.Size] | None = None
        self._expected: Tensor | None = None
        self._given: Tensor | None = None
        vars(encoder)["forward"] = self._forward
        self._handle = head.register_forward_pre_hook(self._substitute)

    def _forward(self, *inputs: Any, **options: Any) -> Any:
        if self.in_use:
            assert self._shapes is not None
            output, features = self._shapes
            (given, *_) = (*inputs, *options.values())
            self._given = given if given.shape[1:] == features else None
            if self._expected is not None:
                self._compare(self._expected)
            if self._given is not None:
                return given if self.direct else given.new_full((len(given), *output), torch.nan)
        found = self._encode(*inputs, **options)
        if self._shapes is None:
            self._output = found
        return found

    def _compare(self, expected: Tensor) -> None:
        """Check in the first step that the encoder receives stored features unchanged."""
        if self._given is None or not torch.isin(_marks(self._given), expected).all():
            raise ValueError(
                "The encoder's input in a training step differs from the loader's images: something changes the batch "
                "on the way (normalisation or mixing in the training step or a transfer hook, for example) and would "
                "change stored features instead. Move it to the data set or into the encoder, or omit CachedFeatures."
            )
        self._expected = None

    def _substitute(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._given, *inputs[1:]) if self.in_use and not self.direct and self._given is not None else None

    def learn(self, module: LightningModule, head: nn.Module, batch: Any) -> Tensor:
        """Features ``(N, d)`` of a batch of images; the first call finds out how they reach the head."""
        with evaluating(module):
            features = caught_features(module, head, batch)
        if self._shapes is not None:
            return features
        if not isinstance(self._output, Tensor):
            raise ValueError(
                f"CachedFeatures needs an encoder whose forward returns a tensor, but when {type(module).__name__} is "
                f"called, {type(self.encoder).__name__} returns {type(self._output).__name__} or is not called itself. "
                "Name another submodule with encoder=..., or omit the cache."
            )
        self.direct = self._output.shape == features.shape and torch.equal(self._output, features)
        self._shapes, self._output = (self._output.shape[1:], features.shape[1:]), None
        # in training mode except for the head, whose statistics must not change
        with evaluating(head):
            again = caught_features(module, head, batch, grad=True)
        if again.requires_grad:
            raise ValueError(
                f"A part of {type(module).__name__} below the head is trained in this stage: its features change and "
                "cannot be stored. Omit CachedFeatures, or freeze everything but the head."
            )
        if not _alike(again, features):
            raise ValueError(
                f"The features of {type(module).__name__} differ between two passes over the same images (because of "
                "dropout outside the encoder, for example), so they cannot be stored. Omit CachedFeatures."
            )
        return features

    def expect(self, features: Tensor) -> None:
        """Check in the first training step that its features are among these, ``(..., d)`` of all rows."""
        self._expected = _marks(features)

    def remove(self) -> None:
        """Restore the encoder's own forward; a second call has no effect."""
        self._handle.remove()
        if vars(self.encoder).get("forward") == self._forward:
            del vars(self.encoder)["forward"]
            if self._own is not None:
                vars(self.encoder)["forward"] = self._own


def caught_features(module: LightningModule, head: nn.Module, batch: Any, *, grad: bool = False) -> Tensor:
    """Call a module on the images of a batch and return the input ``(N, d)`` of its head.

    The batch is a tuple or list that starts with the images, or a dict with ``image``; on any device.
    """
    if not isinstance(batch, list | tuple) and not (isinstance(batch, Mapping) and "image" in batch):
        raise TypeError(
            f"The batch is a {type(batch).__name__}; features are computed only from tuples or lists that start with "
            "the images and from dicts with 'image'. Let the loader return one of these, or override "
            "StageSwitch.features."
        )
    caught: list[Tensor] = []
    trainer = module.trainer
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    handle = head.register_forward_pre_hook(lambda _, inputs: caught.extend(inputs[:1]))
    try:
        with torch.set_grad_enabled(grad), trainer.precision_plugin.forward_context():
            module.forward(batch["image"] if isinstance(batch, Mapping) else batch[0])
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ValueError(
            f"{type(module).__name__}.forward calls its head {len(caught)} times; it must call it exactly once, on the "
            "features of the images."
        )
    return caught[0]


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


class _Rows(Dataset[Any]):
    """Features and whatever came with the images, in the original type of tuple."""

    def __init__(self, kind: type[Any], columns: list[Tensor]) -> None:
        self.kind, self.columns = kind, columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> Any:
        parts = [column[row] for column in self.columns]
        return self.kind(*parts) if hasattr(self.kind, "_fields") else parts


def _over_features(
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
    for first, second in islice(zip(ordered, ordered, strict=True), -(-_LOOKED_AT // loader.batch_size)):
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
    for batch in _progress(trainer, ordered, "Features"):
        features, batch = stored.learn(module, head, batch).cpu(), _columns(module, batch)
        columns.append([features, *batch[1:]])
    rows = _Rows(type(batch), [torch.cat(parts) for parts in zip(*columns, strict=True)])
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


def _alike(values: Tensor, others: Tensor) -> bool:
    """Whether the features agree up to device rounding error."""
    largest = others.float().abs().amax().item()
    return torch.allclose(values.float(), others.float(), rtol=0, atol=0.01 * largest)


def _marks(features: Tensor) -> Tensor:
    """Fingerprint rows by their largest value and its position: int64 ``(...)`` of ``(..., d)``."""
    largest, place = features.cpu().max(dim=-1)
    return (largest.float().view(torch.int32).to(torch.int64) << 32) | place


def _progress(trainer: Trainer, loader: Any, what: str) -> Iterator[Any]:
    silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
    bar: Callable[..., Iterator[Any]] = tqdm
    return bar(loader, desc=what, disable=silent, leave=False)
