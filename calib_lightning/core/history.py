"""What a method remembers of every training sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib_lightning.core.distributed import gather_rows


class CorrectnessHistory(nn.Module):
    """How often each training sample was classified correctly, the same on every process.

    Each process counts its own rows at once; `settle` gives those of the epoch to all. The settled counts are a buffer
    and travel in checkpoints; the rows of a begun epoch are kept by `rows` and `restore`.

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
        # No buffer: DDP would overwrite it with that of the first process in every step.
        self._counts: Tensor | None = None
        self._rows: list[Tensor] = []

    @property
    def counts(self) -> Tensor:
        """Counts ``(size,)`` int64: the settled ones and this process's rows of the begun epoch."""
        if self._counts is None:  # after a settlement, or a checkpoint whose weights arrive after its rows
            rows = self.rows()
            self._counts = self.count.index_add(0, rows[:, 0], rows[:, 1])
        return self._counts

    def resize(self, size: int) -> None:
        """Start anew with another number of samples.

        Args:
            size: Samples in the training set.
        """
        self.count = torch.zeros(size, dtype=torch.int64, device=self.count.device)
        self._counts, self._rows = None, []

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
        """This process's rows ``(n, 2)`` of the begun epoch: index and 0 or 1."""
        parts = [part.to(self.count.device) for part in self._rows]  # those of a checkpoint come on the CPU
        return torch.cat(parts) if parts else self.count.new_zeros((0, 2))

    def restore(self, rows: Tensor) -> None:
        """Take back what `rows` gave; the settled counts may be loaded later.

        Args:
            rows: ``(n, 2)``.
        """
        self._counts, self._rows = None, [rows]

    def settle(self) -> None:
        """Give the rows of the epoch to all processes; all must call it. A second call changes nothing."""
        rows = gather_rows(self.rows())
        self.count.index_add_(0, rows[:, 0], rows[:, 1])  # in place: DDP holds on to the tensor
        self._counts, self._rows = None, []
