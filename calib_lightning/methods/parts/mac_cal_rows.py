"""The rows on which MaC-Cal measures its classifier as deployed: the calibration split, or all training images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from calib_lightning.core.data_in_use import datamodule_in_use, staged_data
from calib_lightning.core.distributed import gather_rows
from calib_lightning.core.feature_loader import FeatureRows
from calib_lightning.core.own_data import without_positions
from calib_lightning.data.sets import FeatureSet
from calib_lightning.methods.parts.mac_cal_rule import HeldOut
from calib_lightning.types import Batch
from calib_lightning.utils.seeding import derive_seed, run_seed

Features = Callable[[LightningModule, Any], Tensor]
Labels = Callable[[Any], Tensor]

_PASS = 102  # separates this random stream from others
_ROWS = 4096  # stored features that the classifier is given at once


def check_rows(trainer: Trainer, held_out: HeldOut, loader: Iterable[Any] | None, owner: str) -> None:
    """Raise if there is no calibration split for ``owner`` to measure on; called before training."""
    if held_out is True and loader is None:
        _calibration_loader(trainer, owner)


def check_pass(trainer: Trainer, held_out: HeldOut, owner: str) -> None:
    """Raise if ``owner`` cannot read the training images once more; called when the loader is known."""
    if held_out == "clean_pass" and staged_data(trainer) is None:
        _readable(trainer, owner)


def deployed_rows(
    module: LightningModule,
    held_out: HeldOut,
    loader: Iterable[Any] | None,
    features: Features,
    labels: Labels,
    owner: str,
) -> list[tuple[Tensor, Tensor]]:
    """Features and labels of this process's part of the rows, in batches, on the device of the module.

    A pass over the training images leaves the random numbers of the run as they are.
    """
    if held_out is True:
        loader = _calibration_loader(module.trainer, owner) if loader is None else loader
        held = ((features(module, batch), labels(batch)) for batch in loader)
        return [(found, label.to(found.device)) for found, label in held]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(run_seed(), _PASS))
        batches = _training_batches(module, features, labels, owner)
        return [(found.to(module.device), label.to(module.device)) for found, label in batches]


def _training_batches(
    module: LightningModule, features: Features, labels: Labels, owner: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of every training row, stored or computed from images without our augmentation."""
    trainer = module.trainer
    data = staged_data(trainer)
    if data is not None and data.stage_features is None:
        for batch in data.ordered_train_loader(augmented=False):
            yield features(module, batch), labels(batch)
        return
    if data is not None:
        stored = getattr(trainer.train_dataloader, "data", None)
        assert isinstance(stored, FeatureSet)
        own = torch.arange(trainer.global_rank, len(stored), trainer.world_size)
        for rows in _pieces(own):
            for view in range(stored.features.shape[1]):
                found = stored.features[rows.to(stored.features.device), view]
                yield found, labels(Batch(found, stored.label[rows], rows))
        return
    loader = _readable(trainer, owner)
    own = _rows_read(loader)[trainer.global_rank :: trainer.world_size]
    if isinstance(loader.dataset, FeatureRows):
        for rows in _pieces(own):
            columns = [column[rows] for column in loader.dataset.columns]
            yield columns[0], labels(columns)
        return
    options: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": loader.num_workers}
    for batch in DataLoader(Subset(loader.dataset, own.tolist()), batch_size=loader.batch_size, **options):
        yield features(module, batch), labels(batch)


def _rows_read(loader: DataLoader[Any]) -> Tensor:
    """The rows that the samplers of all processes name, each once; collective."""
    with _unchanged(getattr(loader.sampler, "generator", None)):
        rows = gather_rows(torch.tensor(list(loader.sampler), dtype=torch.int64))
    return torch.tensor(sorted(set(rows.tolist())))


def _pieces(rows: Tensor) -> list[Tensor]:
    return [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]


@contextmanager
def _unchanged(generator: torch.Generator | None) -> Iterator[None]:
    state = None if generator is None else generator.get_state()
    yield
    if generator is not None and state is not None:
        generator.set_state(state)


def _readable(trainer: Trainer, owner: str) -> DataLoader[Any]:
    loader: Any = without_positions(trainer.train_dataloader)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        return loader
    raise ValueError(
        f"{owner} reads the training images once more after every epoch (held_out='clean_pass'), for which a "
        f"{type(loader).__name__} must be a DataLoader with a batch_size over a map-style data set. Use one, a data "
        "module of this package, or AdaptiveSparsity(held_out=False)."
    )


def _calibration_loader(trainer: Trainer, owner: str) -> Any:
    data = datamodule_in_use(trainer)
    make = getattr(data, "calibration_dataloader", None)
    loader = None if make is None else make()
    if loader is None:
        name = "plain loaders" if data is None else type(data).__name__
        raise ValueError(
            f"The data ({name}) has no calibration split, on which {owner} measures confidence and accuracy. Give the "
            f"data module calibration images (split.calibration, or a method calibration_dataloader), pass {owner} a "
            "loader of them, or use AdaptiveSparsity(held_out=False)."
        )
    return loader
