"""Facts about data from outside this package: labels, number and names of classes, loaders."""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from filelock import FileLock
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, SubsetRandomSampler, TensorDataset

from calib_lightning.core.twins import is_twin

_prepared: WeakSet[LightningDataModule] = WeakSet()
_UNKNOWN = object()


def labels_of(dataset: Any) -> Tensor | None:
    """Labels ``(N,)`` int64 of a data set, found without reading images; ``None`` if they are not found.

    Looks for ``targets``, ``labels``, ``y`` or ``samples``, also in a `TensorDataset`, `Subset` or `ConcatDataset`.
    """
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return _whole_numbers(dataset.tensors[1], len(dataset)) if len(dataset.tensors) > 1 else None
    size, change = sized_len(dataset), _asked(dataset, "target_transform")
    for name in ("targets", "labels", "y", "_labels", "samples"):
        found = _asked(dataset, name)
        with contextlib.suppress(Exception):  # an attribute of this name may be anything
            values = [sample[1] for sample in found] if name == "samples" else found
            labels = _whole_numbers(values if change is None else [change(value) for value in values], size)
            if labels is not None:
                return labels
    return None


def num_classes_of(datamodule: LightningDataModule) -> int | None:
    """Number of classes of a data module, which is prepared for a fit if necessary; ``None`` if unknown."""
    number = declared_classes(datamodule)
    if number is None and prepare(datamodule):
        number = declared_classes(datamodule)
        if number is None:
            loader = _loader_so_far(datamodule, "train_dataloader")
            number = _declared_by_set(_dataset_of(loader))
            labels = labels_of(_dataset_of(loader)) if number is None else None
            number = int(labels.max()) + 1 if labels is not None and len(labels) else number
    return number


def declared_classes(data: Any) -> int | None:
    """Number of classes that a data module or data set declares, by number or by names."""
    for name in ("num_classes", "n_classes"):
        number = _asked(data, name)
        if isinstance(number, Integral) and not isinstance(number, bool) and int(number) > 0:
            return int(number)
    for name in ("class_names", "classes"):
        names = _asked(data, name)
        if isinstance(names, list | tuple | set | dict) and names:
            return len(names)
    return None


def class_names_of(data: Any) -> tuple[str, ...] | None:
    """Class names of a data module or data set in label order; ``None`` if unknown."""
    for name in ("class_names", "classes"):
        names = _asked(data, name)
        if isinstance(names, list | tuple) and names and all(isinstance(each, str) for each in names):
            return tuple(names) if declared_classes(data) == len(names) else None
    if isinstance(data, Subset):
        return class_names_of(data.dataset)
    if is_twin(data, LightningDataModule):
        with contextlib.suppress(Exception):  # it may not be set up yet
            return class_names_of(_dataset_of(loader_of(data, "train_dataloader")))
    return None


def training_labels(source: Any) -> Tensor | None:
    """Labels ``(N,)`` int64 that a fit trains on, from a data module that is set up or a loader, or ``None``."""
    loader = loader_of(source, "train_dataloader") if is_twin(source, LightningDataModule) else source
    labels = labels_of(_dataset_of(loader))
    if labels is not None and isinstance(loader.sampler, SubsetRandomSampler):
        labels = labels[torch.as_tensor(loader.sampler.indices, dtype=torch.int64)]
    return labels


def loader_of(datamodule: LightningDataModule, method: str) -> Any:
    """The loaders of a data module that is set up, also without a trainer; ``None`` if it has none."""
    if not is_overridden(method, datamodule):
        return None
    with isolate_rng(include_cuda=False):
        loader = getattr(datamodule, method)()
    return None if loader is None or sized_len(loader) == 0 else loader


def lacks_class_counts(datamodule: LightningDataModule) -> bool:
    """Return whether it is certain before a fit that the samples per class cannot be counted."""
    # our property reads all data; its existence is enough
    if hasattr(type(datamodule), "class_counts") or not prepare(datamodule):
        return False
    if _asked(datamodule, "class_counts") is not None:
        return False
    loader = _loader_so_far(datamodule, "train_dataloader")
    return loader is not _UNKNOWN and training_labels(loader) is None


def has_validation(datamodule: LightningDataModule) -> bool:
    """Return whether a data module has a validation set; assumed if only a trainer could tell."""
    known = _asked(datamodule, "has_validation")
    if isinstance(known, bool) or not is_overridden("val_dataloader", datamodule):
        return known is True
    return not prepare(datamodule) or _loader_so_far(datamodule, "val_dataloader") is not None


def has_test(datamodule: LightningDataModule) -> bool:
    """Return whether a data module with a trainer has a test set."""
    if not is_overridden("test_dataloader", datamodule):
        return False
    datamodule.setup("test")
    return loader_of(datamodule, "test_dataloader") is not None


def prepare(datamodule: LightningDataModule) -> bool:
    """Prepare a data module for a fit once, without a trainer and without changing the random state.

    Returns False if that needs a trainer.
    """
    if datamodule not in _prepared:
        try:
            with isolate_rng(include_cuda=False):
                with FileLock(_lock_of_job()):  # there is no process group yet: processes take turns
                    datamodule.prepare_data()
                datamodule.setup("fit")
        except AttributeError as error:
            if not _asks_trainer(error, datamodule):
                raise
            return False
        _prepared.add(datamodule)
    return True


def _loader_so_far(datamodule: LightningDataModule, method: str) -> Any:
    """Loaders of a data module, or `_UNKNOWN` if it needs a trainer that it does not have yet."""
    try:
        return loader_of(datamodule, method)
    except AttributeError as error:
        if not _asks_trainer(error, datamodule):
            raise
        return _UNKNOWN


def _asks_trainer(error: AttributeError, datamodule: LightningDataModule) -> bool:
    """Whether the error comes from using the missing trainer, which is ``None``."""
    return error.obj is None and datamodule.trainer is None


def _lock_of_job() -> Path:
    """A lock file shared by the processes of one job on one machine."""
    job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID") or os.environ.get("MASTER_PORT", "")
    return Path(tempfile.gettempdir()) / f"calib-data-{getpass.getuser()}-{job or os.getpid()}.lock"


def _dataset_of(loader: Any) -> Any:
    return loader.dataset if isinstance(loader, DataLoader) else None


def _declared_by_set(dataset: Any) -> int | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if isinstance(dataset, ConcatDataset):
        numbers = [_declared_by_set(part) for part in dataset.datasets]
        return numbers[0] if len(set(numbers)) == 1 else None
    return declared_classes(dataset)


def _asked(data: Any, name: str) -> Any:
    """An attribute, or ``None``; properties may fail before the data is set up."""
    try:
        return getattr(data, name, None)
    except Exception:
        return None


def _whole_numbers(values: Any, size: int | None) -> Tensor | None:
    """Values ``(N,)`` as int64; ``None`` unless they are one integer per sample."""
    if not isinstance(values, Tensor | np.ndarray | Sequence) or isinstance(values, str) or len(values) != size:
        return None
    found = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    found = found.squeeze(1) if found.ndim == 2 and found.shape[1] == 1 else found
    return found.long() if found.ndim == 1 and not found.is_floating_point() else None
