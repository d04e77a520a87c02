"""The one place where small batches wait, until a state is read or enough rows are there for one pass over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2**19
"""How many scores are processed together on the CPU: their intermediate results stay in the cache."""

AT_ONCE_ON_DEVICE = 2**22
"""How many scores wait on a device, where launching the operations costs more than the rows do: 16 MiB of float32."""


class RowBatch(NamedTuple):
    """Rows on their way into a state.

    Attributes:
        logits: Scores ``(N, K)``.
        labels: Class labels ``(N,)``.
        confidence: Confidence ``(N,)``, or ``None``.
        numbers: For each row the number of its batch ``(N,)`` int64; ``None`` if the values have been checked.
    """

    logits: Tensor
    labels: Tensor
    confidence: Tensor | None
    numbers: Tensor | None


def at_once(device: torch.device) -> int:
    """How many scores are processed together on ``device``."""
    return AT_ONCE if device.type == "cpu" else AT_ONCE_ON_DEVICE


class WaitingRoom:
    """Copies of small batches of one kind, and the states that they belong to.

    About a hundred operations on 1000 rows cost more by their number than by the rows. So a metric lets small batches
    wait and adds them together. Meanwhile its states are here: what is out of date cannot be read.
    """

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self._batches: list[RowBatch] = []
        self._rows = 0
        self._kind: tuple[Any, ...] = ()

    def takes(self, batch: RowBatch) -> bool:
        """Whether the batch can wait with those that are here."""
        most = max(1, at_once(batch.logits.device) // batch.logits.shape[1])
        return not self._batches or (self._kind == _kind(batch) and self._rows + len(batch.labels) <= most)

    def append(self, batch: RowBatch) -> None:
        """Copy a batch; its tensors may be overwritten afterwards."""
        if not self._batches:
            self._kind = _kind(batch)
        logits, labels, confidence, numbers = batch
        labels = labels.to(torch.int64, copy=True)
        own = None if confidence is None else confidence.detach().clone()
        self._batches.append(RowBatch(logits.detach().clone(), labels, own, numbers))
        self._rows += len(labels)

    def emptied(self) -> RowBatch | None:
        """All rows in their order, which leave; ``None`` without any."""
        batches, self._batches, self._rows = self._batches, [], 0
        if not batches:
            return None
        logits, labels, confidence, numbers = zip(*batches, strict=True)
        return RowBatch(torch.cat(logits), torch.cat(labels), _joined(confidence), _joined(numbers))


def _joined(column: tuple[Tensor | None, ...]) -> Tensor | None:
    given = [part for part in column if part is not None]
    return torch.cat(given) if given else None


def _kind(batch: RowBatch) -> tuple[Any, ...]:
    """Only batches of the same kind can be joined without changing a dtype."""
    confidence = None if batch.confidence is None else batch.confidence.dtype
    return (*batch.logits.shape[1:], batch.logits.device, batch.logits.dtype, confidence, batch.numbers is None)
