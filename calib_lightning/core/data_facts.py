"""What data that is not of this package says of itself: labels, number and names of its classes, its loaders."""

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

_prepared: WeakSet[LightningDataModule] = WeakSet()
_UNKNOWN = object()


def labels_of(dataset: Any) -> Tensor | None:
    """Find the labels of a data set without reading its images.

    Args:
        dataset: A data set with ``targets``, ``labels``, ``y`` or ``samples``, a `TensorDataset`, or a `Subset` or
            `ConcatDataset` of such sets.

    Returns:
        ``(N,)`` int64, ``None`` where they are not found.

    Example:
        >>> labels_of(Subset(TensorDataset(torch.zeros(3, 2), torch.tensor([4, 5, 6])), [2, 0]))
        tensor([6, 4])
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
        with contextlib.suppress(Exception):  # somebody else's attribute of this name may be anything
            values = [sample[1] for sample in found] if name == "samples" else found
            labels = _whole_numbers(values if change is None else [change(value) for value in values], size)
            if labels is not None:
                return labels
    return None


def num_classes_of(datamodule: LightningDataModule) -> int | None:
    """Find out how many classes a data module has; it is prepared for a fit if it does not say so before.

    Args:
        datamodule: Any data module.

    Returns:
        K, ``None`` where it cannot be found.
    """
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
    """Read how many classes a data module or data set says that it has.

    Args:
        data: A data module or data set.

    Returns:
        Its ``num_classes`` or ``n_classes``, or the length of ``class_names`` or ``classes``.
    """
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
    """Read the names of the classes of a data module, or of a data set, in the order of the labels.

    Args:
        data: A data module or a data set; of a data module that is set up, its training set is asked, too.

    Returns:
        K strings, ``None`` where they are not known.
    """
    for name in ("class_names", "classes"):
        names = _asked(data, name)
        if isinstance(names, list | tuple) and names and all(isinstance(each, str) for each in names):
            return tuple(names) if declared_classes(data) == len(names) else None
    if isinstance(data, Subset):
        return class_names_of(data.dataset)
    if isinstance(data, LightningDataModule):
        with contextlib.suppress(Exception):  # it may not be set up
            return class_names_of(_dataset_of(loader_of(data, "train_dataloader")))
    return None


def training_labels(source: Any) -> Tensor | None:
    """Find the labels that a fit trains on.

    Args:
        source: A data module that is set up, or a loader.

    Returns:
        ``(N,)`` int64, ``None`` where they are not found.
    """
    loader = loader_of(source, "train_dataloader") if isinstance(source, LightningDataModule) else source
    labels = labels_of(_dataset_of(loader))
    if labels is not None and isinstance(loader.sampler, SubsetRandomSampler):
        labels = labels[torch.as_tensor(loader.sampler.indices, dtype=torch.int64)]
    return labels


def loader_of(datamodule: LightningDataModule, method: str) -> Any:
    """Ask a data module for its loaders, outside of a trainer as well.

    Args:
        datamodule: A data module that is set up.
        method: ``"train_dataloader"``, ``"val_dataloader"`` or another method of this kind.

    Returns:
        The loaders, ``None`` where it has none.
    """
    if not is_overridden(method, datamodule):
        return None
    with isolate_rng(include_cuda=False):
        loader = getattr(datamodule, method)()
    return None if loader is None or sized_len(loader) == 0 else loader


def lacks_class_counts(datamodule: LightningDataModule) -> bool:
    """Tell whether it is known before a fit that the samples of each class cannot be counted.

    Args:
        datamodule: Any data module.

    Returns:
        Whether it has neither ``class_counts`` nor a training set whose labels are found.
    """
    # a property of data of ours reads all of it; that it is there is enough
    if hasattr(type(datamodule), "class_counts") or not prepare(datamodule):
        return False
    if _asked(datamodule, "class_counts") is not None:
        return False
    loader = _loader_so_far(datamodule, "train_dataloader")
    return loader is not _UNKNOWN and training_labels(loader) is None


def has_validation(datamodule: LightningDataModule) -> bool:
    """Tell whether a data module has a validation set; where that cannot be known without a trainer, it is believed.

    Args:
        datamodule: Any data module.

    Returns:
        Its ``has_validation``, or whether ``val_dataloader`` gives anything.
    """
    known = _asked(datamodule, "has_validation")
    if isinstance(known, bool) or not is_overridden("val_dataloader", datamodule):
        return known is True
    return not prepare(datamodule) or _loader_so_far(datamodule, "val_dataloader") is not None


def has_test(datamodule: LightningDataModule) -> bool:
    """Tell whether a data module that has a trainer has a test set.

    Args:
        datamodule: Any data module.

    Returns:
        Whether ``test_dataloader`` gives anything.
    """
    if not is_overridden("test_dataloader", datamodule):
        return False
    datamodule.setup("test")
    return loader_of(datamodule, "test_dataloader") is not None


def prepare(datamodule: LightningDataModule) -> bool:
    """Prepare a data module for a fit before it has a trainer, once; random numbers go on as if it had not been.

    Args:
        datamodule: Any data module.

    Returns:
        Whether that could be done without a trainer.
    """
    if datamodule not in _prepared:
        try:
            with isolate_rng(include_cuda=False):
                with FileLock(_lock_of_job()):  # processes have no group yet: each of them looks, one after the other
                    datamodule.prepare_data()
                datamodule.setup("fit")
        except AttributeError as error:
            if not _asks_trainer(error, datamodule):
                raise
            return False
        _prepared.add(datamodule)
    return True


def _loader_so_far(datamodule: LightningDataModule, method: str) -> Any:
    """Loaders of a data module that may ask for a trainer which it does not have yet: then they are not known."""
    try:
        return loader_of(datamodule, method)
    except AttributeError as error:
        if not _asks_trainer(error, datamodule):
            raise
        return _UNKNOWN


def _asks_trainer(error: AttributeError, datamodule: LightningDataModule) -> bool:
    """Whether a data module has asked something of the trainer that it does not have yet, which is ``None``."""
    return error.obj is None and datamodule.trainer is None


def _lock_of_job() -> Path:
    """A file that the processes of one job on one machine share."""
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
    """An attribute, ``None`` where there is none; a property may fail before data is set up."""
    try:
        return getattr(data, name, None)
    except Exception:
        return None


def _whole_numbers(values: Any, size: int | None) -> Tensor | None:
    """Values ``(N,)`` as int64, ``None`` if they are something else than one whole number for each of N samples."""
    if not isinstance(values, Tensor | np.ndarray | Sequence) or isinstance(values, str) or len(values) != size:
        return None
    found = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    found = found.squeeze(1) if found.ndim == 2 and found.shape[1] == 1 else found
    return found.long() if found.ndim == 1 and not found.is_floating_point() else None
