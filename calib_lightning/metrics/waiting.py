"""The one place where small batches wait, until a state is read or enough rows are there for one pass over them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

AT_ONCE = 2**19
"""How many scores are processed together on the CPU: their intermediate results stay in the cache."""

AT_ONCE_ON_DEVICE = 2**20
"""How many scores wait on a device, where launching the operations costs more than the rows do: 4 MiB of float32."""


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
        self._room: RowBatch | None = None
        self._rows = 0
        self._kind: tuple[Any, ...] = ()

    def append(self, batch: RowBatch) -> bool:
        """Copy a batch behind the others; false if it cannot wait with them."""
        room, start, stop = self._room, self._rows, self._rows + len(batch.labels)
        # Joining other kinds would change a dtype.
        kind = _kind(batch)
        usable = room is not None and (torch.is_inference_mode_enabled() or not room.logits.is_inference())
        if room is None or not usable or kind != self._kind or stop > len(room.labels):
            if start:
                return False
            self._room = room = _room_for(batch)
            self._kind = kind
        for kept, column in zip(room, batch, strict=True):
            if kept is not None and column is not None:
                kept[start:stop] = column.detach()
        self._rows = stop
        return True

    def emptied(self) -> RowBatch | None:
        """All rows in their order, to be used at once, as the next ones are copied to the same place; or ``None``."""
        room, rows, self._rows = self._room, self._rows, 0
        if room is None or rows == 0:
            return None
        if room.logits.device.type != "cpu":  # where memory is scarce, and soon had again
            self._room = None
        logits, labels, confidence, numbers = room
        return RowBatch(
            logits[:rows],
            labels[:rows],
            None if confidence is None else confidence[:rows],
            None if numbers is None else numbers[:rows],
        )


def _room_for(batch: RowBatch) -> RowBatch:
    logits, labels, confidence, numbers = batch
    rows = max(1, at_once(logits.device) // logits.shape[1])
    return RowBatch(
        logits.new_empty(rows, logits.shape[1]),
        labels.new_empty(rows, dtype=torch.int64),
        None if confidence is None else confidence.new_empty(rows),
        None if numbers is None else numbers.new_empty(rows),
    )


def _kind(batch: RowBatch) -> tuple[Any, ...]:
    logits, _, confidence, numbers = batch
    dtype = None if confidence is None else confidence.dtype
    return logits.shape[1], logits.device, logits.dtype, dtype, numbers is None
