"""A loader that resumes anywhere and reads every row exactly once on any number of processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from calib_lightning.data.sets import BatchSet, FeatureSet
from calib_lightning.types import Batch
from calib_lightning.utils.seeding import derive_seed

_Key = tuple[int, NDArray[np.int64]]
"""Epoch and positions of a batch: all that a worker needs, so workers are stateless."""


class ResumableLoader:
    """Batches of a set in an order that is a function of (seed, epoch), so only the position needs saving.

    The order of the epoch is cut into global batches of ``batch_size * world`` rows, and rank r takes rows
    ``r::world`` of each. A last global batch with fewer rows than ranks is merged with the previous one; in a shuffled
    (training) loader, one with fewer than twice as many is, since BatchNorm rejects a single row. So every row is read
    exactly once without padding, all ranks have the same number of batches, and a rank only has an empty batch if the
    whole set has fewer rows than ranks. A step sees the same rows for any number of processes with the same global
    batch size, except for the merged last batch.

    Lightning does not replace it, since it is not a ``DataLoader``, but calls ``sampler.set_epoch`` before an epoch,
    ``state_dict`` when saving in the middle of one, and ``load_state_dict`` on resuming. Epoch, position, rank and
    world are read when the first batch of a pass is requested, not when the iterator is created.

    Args:
        data: The set to read.
        batch_size: Batch size per process.
        shuffle: Whether each epoch has its own random order.
        seed: Seed of the order.
        drop_last: Whether to drop an incomplete last global batch.
        num_workers: Worker processes that prepare batches; batches are bit-identical for any number.

    Raises:
        ValueError: If a value is out of range or the set is empty.

    Example:
        >>> from calib_lightning.data import InMemorySet
        >>> rows = torch.arange(5)
        >>> data = InMemorySet(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64), rows)
        >>> [batch.index.tolist() for batch in ResumableLoader(data, 2, shuffle=False, seed=0)]
        [[0, 1], [2, 3], [4]]
    """

    # Lightning looks here for a shuffling sampler; there is none.
    batch_sampler = None

    def __init__(
        self,
        data: BatchSet,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 0. 0 loads in this process.")
        if not len(data):
            raise ValueError("The set has 0 rows; it must have at least 1. Check the sizes of the splits.")
        # Not called `dataset`: with `overfit_batches`, Lightning rebuilds loaders that have one as a DataLoader.
        self.data = data
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.drop_last, self.num_workers = drop_last, num_workers
        self._epoch: int | None = None
        self._position = 0
        self._loaded: dict[str, int] | None = None

    @property
    def sampler(self) -> ResumableLoader:
        """The loader itself: Lightning calls ``set_epoch`` on it."""
        return self

    @property
    def epoch(self) -> int:
        """The epoch given to `set_epoch`, else that of a loaded state, else 0."""
        if self._epoch is not None:
            return self._epoch
        return 0 if self._loaded is None else self._loaded["epoch"]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass.

        Args:
            epoch: Epoch number.
        """
        if epoch != self.epoch:
            self._position = 0
        self._epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of batches read in it, and the global batch size."""
        position = self._position if self._loaded is None else self._resumed()
        return {"epoch": self.epoch, "position": position, "global_batch": self.batch_size * _world()[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass continue where the state was saved.

        The epoch of `set_epoch` takes precedence over that of the state, in either order: a state of another or
        finished epoch starts the epoch from its first batch.

        Args:
            state: As returned by `state_dict`.
        """
        self._loaded = {"epoch": int(state["epoch"]), "position": int(state["position"])}
        self._loaded["global_batch"] = int(state.get("global_batch", self.batch_size * _world()[1]))

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def __iter__(self) -> Iterator[Batch]:
        # a generator runs nothing before its first `next`, so a later `set_epoch` or state still counts
        self._position, epoch = self._resumed(), self.epoch
        self._epoch, self._loaded = epoch, None
        keys = self._keys(epoch)[self._position :]
        loader: DataLoader[Batch] = DataLoader(
            dataset=_Keyed(self.data),
            batch_size=None,
            sampler=keys,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=False,
            worker_init_fn=_leave_signals_to_the_main_process,
            # querying the device would initialise it in a run on the CPU
            pin_memory=torch.cuda.is_initialized() and self._on_cpu(),  # type: ignore[no-untyped-call]
            # a separate generator: otherwise it draws a seed from the global one
            generator=torch.Generator(),
        )
        with _signals_held():
            batches = iter(loader)
        for number, batch in enumerate(batches, start=self._position + 1):
            self._position = number
            yield batch

    def _on_cpu(self) -> bool:
        return not isinstance(self.data, FeatureSet) or self.data.features.device.type == "cpu"

    def _resumed(self) -> int:
        """Position at which the next pass starts."""
        state = self._loaded
        if state is None or state["epoch"] != self.epoch or state["position"] >= len(self):
            return 0
        step = self.batch_size * _world()[1]
        if state["global_batch"] != step:
            raise ValueError(
                f"The global batch size is {step} (batch_size={self.batch_size} on {_world()[1]} processes), but the "
                f"epoch was interrupted after {state['position']} batches of {state['global_batch']} rows and cannot "
                "continue without reading rows twice or never. Use the same product of batch_size and processes, or "
                "resume from the end of an epoch."
            )
        return state["position"]

    def _bounds(self) -> list[int]:
        """Starts of the global batches of an epoch, and the end of the last one."""
        rows, step, world = len(self.data), self.batch_size * _world()[1], _world()[1]
        if self.drop_last:
            return list(range(0, rows - rows % step + 1, step))
        starts = list(range(0, rows, step))
        # BatchNorm rejects a training batch of a single row
        least = 2 * world if self.shuffle and self.batch_size > 1 else world
        if len(starts) > 1 and rows - starts[-1] < least:
            starts.pop()
        return [*starts, rows]

    def _keys(self, epoch: int) -> list[_Key]:
        """One key per batch of this rank, in the order of the epoch."""
        order = np.arange(len(self.data))
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            order = torch.randperm(len(self.data), generator=generator).numpy()
        rank, world = _world()
        bounds = self._bounds()
        return [(epoch, order[start:stop][rank::world]) for start, stop in pairwise(bounds)]


class _Keyed(Dataset[Batch]):
    """Lets a ``DataLoader`` request a whole batch by its key."""

    def __init__(self, data: BatchSet) -> None:
        self.data = data

    def __getitem__(self, key: _Key) -> Batch:
        epoch, index = key
        return self.data.fetch(torch.tensor(index), epoch)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ignore stop signals, which reach the whole group: workers must live until the main process has saved."""
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Block stop signals while workers start: they inherit the mask and cannot be killed too early."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_is(batch: Any) -> Any:
    return batch


def _world() -> tuple[int, int]:
    """Rank and number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
