"""A per-sample training history."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calib_lightning.core.distributed import gather_rows


class CorrectnessHistory(nn.Module):
    """How often each training sample was classified correctly, the same on every process.

    Each process counts its own rows immediately; `settle` shares those of the epoch with all. The settled counts are a
    buffer and therefore in every checkpoint; `rows` and `restore` save the rows of an unfinished epoch.

    Args:
        size: Samples in the training set; 0 until it is known.

    Attributes:
        count: ``(size,)`` int64, settled counts.

    Example:
        >>> history = CorrectnessHistory(3)
        >>> history.update(torch.tensor([2, 0]), torch.tensor([True, False]))
        >>> history.counts.tolist()
        [0, 0, 1]
    """

    count: Tensor

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(size, dtype=torch.int64))
        # Not a buffer: DDP would overwrite it with the first process's in every step.
        self._counts: Tensor | None = None
        self._rows: list[Tensor] = []

    @property
    def counts(self) -> Tensor:
        """Counts ``(size,)`` int64: settled counts plus this process's rows of the current epoch."""
        if self._counts is None:  # after settling, or when a checkpoint's weights are loaded after its rows
            rows = self.rows()
            self._counts = self.count.index_add(0, rows[:, 0], rows[:, 1])
        return self._counts

    def resize(self, size: int) -> None:
        """Reset to zero counts for another number of samples.

        Args:
            size: Samples in the training set.
        """
        self.count = torch.zeros(size, dtype=torch.int64, device=self.count.device)
        self._counts, self._rows = None, []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Take the size of a checkpoint; rows that have been restored from it stay."""
        saved = state_dict.get(f"{prefix}count")
        if saved is not None and len(saved) != len(self.count):
            self.count, self._counts = torch.zeros_like(saved, device=self.count.device), None
        super()._load_from_state_dict(state_dict, prefix, *others)

    def update(self, index: Tensor, correct: Tensor) -> None:
        """Count the rows of one batch.

        Args:
            index: Positions ``(N,)`` int64 in the training set.
            correct: ``(N,)``, whether each was classified correctly.
        """
        row = torch.stack([index.to(torch.int64), correct.to(torch.int64)], dim=1)
        self.counts.index_add_(0, row[:, 0], row[:, 1])
        self._rows.append(row)

    def rows(self) -> Tensor:
        """This process's rows ``(n, 2)`` of the current epoch: index, and 0 or 1."""
        parts = [part.to(self.count.device) for part in self._rows]  # a checkpoint's are on the CPU
        return torch.cat(parts) if parts else self.count.new_zeros((0, 2))

    def restore(self, rows: Tensor) -> None:
        """Restore rows saved with `rows`; the settled counts may be loaded later.

        Args:
            rows: ``(n, 2)``.
        """
        self._counts, self._rows = None, [rows]

    def settle(self) -> None:
        """Share the rows of the epoch with all processes; collective. A second call has no effect."""
        rows = gather_rows(self.rows())
        self.count.index_add_(0, rows[:, 0], rows[:, 1])  # in place: DDP keeps a reference
        self._counts, self._rows = None, []
