"""Features computed once: a stage whose images and encoder do not change need not see the images again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from calib_lightning.core.distributed import gather_rows, world_size
from calib_lightning.core.module import ClassificationModule, datamodule_in_use
from calib_lightning.files import write_whole
from calib_lightning.types import Views

if TYPE_CHECKING:
    from calib_lightning.core.stages import StageTraining


class CachedFeatures(Views):
    """Train a stage on features that are computed once, in place of images that go through a frozen encoder.

    The images are those without augmentation, or a fixed number of augmented views of each, of which every step draws
    one a row. With a ``folder`` the features are kept in a file named after everything that they depend on: the
    encoder's weights, the images, the transform and the precision. Runs that share the folder share the file; of two
    that want it at once, one computes and the other waits.

    With a data module of this package the processes share the work, and ``views`` and ``folder`` can be used. Any other
    loader must be a ``DataLoader`` of a map-style data set whose images are the same each time they are read; every
    process then computes all features.

    Args:
        views: Augmented views of each image; 0 means the images as they are.
        folder: Where files are kept; ``None`` keeps the features in memory alone.
        on_device: Keep them on the training device, where 4 N d bytes must fit.

    Raises:
        ValueError: If ``views`` is negative; before training starts, if features cannot be stored in this run.

    Example:
        >>> CachedFeatures(views=5).views
        5
    """

    def __init__(self, views: int = 0, folder: str | None = None, on_device: bool = False) -> None:
        if views < 0:
            raise ValueError(f"views is {views}; it must be at least 0 (0 means the images without augmentation).")
        self.views = views
        self.folder = folder
        self.on_device = on_device

    def transform(self, normalize: nn.Module, augment: nn.Module | None, seed: int) -> nn.Module:
        """Return ``normalize``: images are seen only until their features are stored."""
        return normalize

    def check(
        self,
        trainer: Trainer,
        module: LightningModule,
        encoder: nn.Module,
        head: nn.Module,
        training: StageTraining,
    ) -> None:
        """Refuse a run whose features cannot be stored; before training starts.

        Args:
            trainer: The trainer.
            module: The module.
            encoder: What is frozen.
            head: The head before the switch.
            training: How the stage is trained.

        Raises:
            ValueError: If the images of the stage are random, or the loader cannot be read in order.
        """
        if any(part is head for part in encoder.modules()):
            raise ValueError(
                "CachedFeatures passes the encoder by, but the head is part of it: name the submodule that computes "
                "the features as encoder=..., apart from head=...."
            )
        transform = module.batch_transform if isinstance(module, ClassificationModule) else None
        if transform is not None and training.criterion is None:
            raise ValueError(
                f"CachedFeatures cannot be used with {type(transform).__name__}, which mixes or multiplies images: "
                "give the stage a criterion, which takes the transform's place, or leave the cache out."
            )
        data: Any = datamodule_in_use(trainer)
        if hasattr(data, "stage_features"):
            if self.views and not data.augment:
                raise ValueError(
                    f"views is {self.views}, but {type(data).__name__} does not augment its images: all views would be "
                    "the same. Use views=0."
                )
            return
        if self.views or self.folder is not None:
            raise ValueError(
                f"views is {self.views} and folder is {self.folder!r}, but with "
                f"{type(data).__name__ if data else 'plain loaders'} nothing is known of the images: fixed views and "
                "files need a data module of this package. Use views=0 and folder=None."
            )

    def store(
        self, trainer: Trainer, module: LightningModule, encoder: nn.Module, head: nn.Module, *, resumed: bool
    ) -> StoredFeatures:
        """Compute the features, give them to the training loader, and let the encoder pass them through.

        Args:
            trainer: The trainer, within ``fit``, at the start of an epoch or of the fit.
            module: The module, with its new head.
            encoder: What is frozen.
            head: The new head.
            resumed: Whether the loader may be in the middle of an epoch, where it goes on.

        Returns:
            What must be told before and after each training step, and be removed in the end.
        """
        stored = StoredFeatures(encoder, head)
        try:
            data: Any = datamodule_in_use(trainer)
            if hasattr(data, "stage_features"):
                features = self._of_benchmark(trainer, module, stored, head, data)
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
        path = Path(self.folder) / f"features-{self._key(trainer, stored, data)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # one process of the run holds the lock, and all of them do what it finds
        lock = FileLock(f"{path}.lock")
        if trainer.is_global_zero:
            lock.acquire()
        try:
            there: bool = trainer.strategy.broadcast(path.is_file())
            if not there:
                features = self._compute(trainer, module, stored, head, data)
                if trainer.is_global_zero:
                    write_whole(path, lambda file: torch.save(features, file))
                return features
        finally:
            if trainer.is_global_zero:
                lock.release()
        stored.learn(module, head, next(iter(data.ordered_train_loader(augmented=False))))
        kept: Tensor = torch.load(path, weights_only=True)
        return kept

    def _compute(
        self, trainer: Trainer, module: LightningModule, stored: StoredFeatures, head: nn.Module, data: Any
    ) -> Tensor:
        views = []
        for number in range(max(1, self.views)):
            loader = data.ordered_train_loader(augmented=self.views > 0)
            loader.set_epoch(number)  # the augmentation of an epoch is a view
            index, features = [], []
            for batch in _progress(trainer, loader, f"Features, view {number + 1}" if self.views else "Features"):
                features.append(stored.learn(module, head, batch).cpu())
                index.append(batch.index)
            own = torch.cat(features)
            every = gather_rows(own.to(module.device)).cpu() if world_size() > 1 else own
            rows = gather_rows(torch.cat(index).to(module.device)).cpu() if world_size() > 1 else torch.cat(index)
            view = torch.empty_like(every)
            view[rows] = every
            views.append(view)
        return torch.stack(views, dim=1)

    def _key(self, trainer: Trainer, stored: StoredFeatures, data: Any) -> str:
        digest = hashlib.sha256()
        for name, value in stored.encoder.state_dict().items():
            digest.update(
                name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        digest.update(f"{self.views} {trainer.precision} {data.training_images_key(augmented=self.views > 0)}".encode())
        return digest.hexdigest()[:32]


class StoredFeatures:
    """Lets stored features take the place of images within a training step.

    While `in_use`, the encoder gives back what it is given, in the shape that its output has, and the head gets the
    features, whatever lies between the two.

    Args:
        encoder: What is passed by.
        head: What gets the features.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        self.encoder = encoder
        self.in_use = False
        self._encode = encoder.forward
        self._shape: tuple[int, ...] | None = None
        self._given: Tensor | None = None
        vars(encoder)["forward"] = self._forward
        self._handle = head.register_forward_pre_hook(self._substitute)

    def _forward(self, *inputs: Any, **options: Any) -> Any:
        if self.in_use:
            (given, *_) = inputs
            self._given = given
            if tuple(given.shape[1:]) == self._shape:
                return given
            assert self._shape is not None
            return given.new_zeros(()).expand(len(given), *self._shape)
        output = self._encode(*inputs, **options)
        self._shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else None
        return output

    def _substitute(self, head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._given, *inputs[1:]) if self.in_use else None

    def learn(self, module: LightningModule, head: nn.Module, batch: Any) -> Tensor:
        """Features ``(N, d)`` of a batch; notes the shape of the encoder's output.

        Args:
            module: The module.
            head: Its head.
            batch: A batch of images.

        Returns:
            The features, on the module's device.

        Raises:
            ValueError: If they depend on chance, or the encoder gives no tensor.
        """
        first = self._shape is None
        with evaluating(module):
            features = caught_features(module, head, batch)
        if first:
            if self._shape is None:
                raise ValueError(
                    f"CachedFeatures needs an encoder that returns a tensor; {type(self.encoder).__name__} does not."
                )
            if not torch.equal(features, caught_features(module, head, batch)):
                raise ValueError(
                    f"The features of {type(module).__name__} differ between two passes over the same images (dropout "
                    "outside of the encoder, say): they cannot be stored. Leave CachedFeatures out."
                )
        return features

    def remove(self) -> None:
        """Give the encoder its own way back; a second call changes nothing."""
        self._handle.remove()
        if vars(self.encoder).get("forward") == self._forward:
            del vars(self.encoder)["forward"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while; every part gets back the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def caught_features(module: LightningModule, head: nn.Module, batch: Any) -> Tensor:
    """Call a module on the first part of a batch and return what goes into its head, without gradient.

    Args:
        module: The module, with its trainer.
        head: Its head.
        batch: A tuple or list whose first part are the images, on any device.

    Returns:
        ``(N, d)``.
    """
    caught: list[Tensor] = []
    trainer = module.trainer
    batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
    handle = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            module.forward(batch[0])
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ValueError(
            f"{type(module).__name__}.forward calls its head {len(caught)} times; it must call it once on the features "
            "of the images."
        )
    return caught[0]


def reload_train_loader(trainer: Trainer, loader: Any = None, *, resumed: bool = False) -> None:
    """Let the fit read another training loader from here on, at the start of an epoch or of the fit.

    Args:
        trainer: The trainer, within ``fit``.
        loader: The loader; ``None`` asks the data module or module again.
        resumed: Whether the loader goes on where the one before stands.
    """
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    before = loop._combined_loader.flattened
    states = [part.state_dict() if hasattr(part, "state_dict") else None for part in before]
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
    source = loop._data_source.instance
    loop._combined_loader = None
    # Lightning makes an iterator here and another one when the epoch starts: the first must not draw the order
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
    after: list[Any] = loop._combined_loader.flattened  # type: ignore[attr-defined]  # setup_data has made it
    for part, state in zip(after, states, strict=False):
        if resumed and state is not None and hasattr(part, "load_state_dict"):
            part.load_state_dict(state)
        _set_sampler_epoch(part, trainer.current_epoch)


class _Rows(Dataset[tuple[Any, ...]]):
    """Features, and what came with the images."""

    def __init__(self, columns: list[Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return tuple(column[row] for column in self.columns)


def _over_features(
    trainer: Trainer, module: LightningModule, stored: StoredFeatures, head: nn.Module, loaders: list[Any]
) -> DataLoader[Any]:
    """Make a loader like the trainer's own, over features."""
    loader = loaders[0]
    if len(loaders) != 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"CachedFeatures cannot read {type(loader).__name__} in order: it needs one DataLoader of a map-style data "
            "set. Leave the cache out, or use a data module of this package."
        )
    if loader.batch_size is None:
        raise ValueError("CachedFeatures needs a DataLoader with a batch size of its own (no batch_sampler).")
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
    ordered: DataLoader[Any] = DataLoader(loader.dataset, batch_size=loader.batch_size, shuffle=False, **options)
    (image, *_), (again, *_) = next(iter(ordered)), next(iter(ordered))
    if not torch.equal(image, again):
        raise ValueError(
            "The training images differ between two readings: features of random augmentations cannot be stored. Leave "
            "CachedFeatures out, or train this stage on images without augmentation."
        )
    columns: list[list[Tensor]] = []
    for batch in _progress(trainer, ordered, "Features"):
        if not isinstance(batch, list | tuple) or not all(isinstance(part, Tensor) for part in batch):
            raise ValueError(f"CachedFeatures needs batches that are tuples of tensors, not {type(batch).__name__}.")
        columns.append([stored.learn(module, head, batch).cpu(), *batch[1:]])
    rows = _Rows([torch.cat(parts) for parts in zip(*columns, strict=True)])
    return DataLoader(
        dataset=rows,
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        generator=loader.generator,
    )


def _progress(trainer: Trainer, loader: Any, what: str) -> Iterator[Any]:
    silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
    bar: Callable[..., Iterator[Any]] = tqdm
    return bar(loader, desc=what, disable=silent, leave=False)
