"""What a metric keeps: sums, and lists of rows; how they grow, wait for rows, travel between processes and move."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from calib_lightning.metrics import devices
from calib_lightning.metrics.functional.bins import check_n_bins
from calib_lightning.metrics.functional.checks import InputKind, check_kind
from calib_lightning.metrics.waiting import RowBatch, WaitingRoom, at_once

_LEAST_ROWS = 1024


class RowStates(Metric):
    """Sums and lists of rows, float64 and int64 whatever the dtype of the enclosing module.

    Args:
        n_bins: Number of bins M of the binned parts.
        rank_bins: Size of the histogram of log-odds; ``None`` keeps the score of every row.
        details: Whether to keep one value per row of every part.
        input: Whether the scores are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    count: Tensor
    num_classes: Tensor

    def __init__(self, n_bins: int, rank_bins: int | None, details: bool, input: InputKind, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_kind(input)
        check_n_bins(n_bins)
        self.n_bins = n_bins
        self.rank_bins = rank_bins
        self.details = details
        self.input = input
        self._list_dtypes: dict[str, torch.dtype] = {}
        self._class_sums: list[str] = []
        self._buffers_of_rows: dict[str, Tensor] = {}
        self._waiting = WaitingRoom()
        self.add_state("num_classes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    # --- declaring and growing

    def add_list(self, name: str, dtype: torch.dtype) -> None:
        """Declare a state that keeps one value (or K values) per row; ranks agree on float64 if one of them has it."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._list_dtypes[name] = dtype

    def add_class_sums(self, name: str) -> None:
        """Declare a state of sums ``(2, K, M)``; the first batch creates it, as it determines K."""
        self.add_state(name, torch.zeros(2, 0, self.n_bins, dtype=torch.float64), dist_reduce_fx="sum")
        self._class_sums.append(name)

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the list states."""
        return tuple(self._list_dtypes)

    def append_rows(self, name: str, rows: Tensor) -> None:
        """Copy rows ``(n,)`` or ``(n, K)`` to the end of a list state."""
        # The list mostly holds one tensor, the used part of a buffer that doubles when full: a small tensor per batch
        # would fragment the memory, which cost a gigabyte in a million rows.
        kept: list[Tensor] = getattr(self, name)
        buffer = self._buffers_of_rows.get(name)
        used = 0
        # The list may hold rows that are not ours to overwrite: of a merged state, or of a restored one.
        if buffer is not None and kept and _is_start_of(kept[-1], buffer) and _fits(rows, buffer):
            used = len(kept[-1])
        else:
            buffer = None
        if buffer is None or used + len(rows) > len(buffer):
            size = max(2 * used, used + len(rows), _LEAST_ROWS)
            larger = rows.new_empty((size, *rows.shape[1:]))
            if buffer is not None:
                larger[:used] = buffer[:used]
            self._buffers_of_rows[name] = buffer = larger
        buffer[used : used + len(rows)] = rows
        if used:
            kept[-1] = buffer[: used + len(rows)]
        else:
            kept.append(buffer[: len(rows)])

    def rows_of(self, name: str) -> Tensor:
        """All values ``(N,)`` or ``(N, K)`` of a list state; empty without rows."""
        batches = [batch for batch in self._row_tensors(name) if len(batch)]
        if len(batches) == 1:
            return batches[0]
        if batches:
            return torch.cat(batches)
        return torch.empty(0, dtype=self._list_dtypes[name], device=self.count.device)

    def _row_tensors(self, name: str) -> list[Tensor]:
        state: Tensor | list[Tensor] = getattr(self, name)
        return [state] if isinstance(state, Tensor) else state

    # --- waiting

    @abstractmethod
    def _add(self, batch: RowBatch) -> None:
        """Add rows to the states."""

    def _let_wait(self, batch: RowBatch) -> None:
        """Keep a small batch for later; add a large one."""
        device = batch.logits.device
        # Tensors on a wrong device go on to where that raises.
        alone = {each.device for each in batch if each is not None} == {device}
        here = alone and (device == self._device or not devices.has_float64(self._device))
        if not here or 2 * batch.logits.numel() > at_once(device):
            self._add_waiting()
            self._add(batch)
            return
        if not self._waiting.append(batch):
            self._add_waiting()
            self._waiting.append(batch)
        if not self._waiting.states:
            inside = vars(self)
            self._waiting.states = {name: inside.pop(name) for name in self._defaults}

    def __getattr__(self, name: str) -> Any:
        """Read what is not there: a state whose rows wait, which are added first."""
        # torchmetrics and its collections read states in a dozen places, and users read them too. A state that is out
        # of date is not among the attributes, so that each of these ways leads here.
        waiting = vars(self).get("_waiting")
        if waiting is None or name not in waiting.states:
            return super().__getattr__(name)
        self._add_waiting()
        return vars(self)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a state takes the rows that wait first, so that the value replaces them too."""
        waiting = vars(self).get("_waiting")
        if waiting is not None and name in waiting.states:
            self._add_waiting()
        super().__setattr__(name, value)

    def _add_waiting(self) -> None:
        """Bring the states up to date."""
        batch = self._leave_waiting_room()
        if batch is not None:
            with torch.no_grad():
                self._add(batch)

    def _leave_waiting_room(self) -> RowBatch | None:
        """Put the states back as they are, and return the rows that waited."""
        states, self._waiting.states = self._waiting.states, {}
        vars(self).update(states)
        return self._waiting.emptied()

    # --- copying, moving, other processes

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the unused ends of buffers; a copy creates its own."""
        self._add_waiting()
        used = {name: [rows.clone() for rows in self._row_tensors(name)] for name in self._list_dtypes}
        return {**super().__getstate__(), **used, "_buffers_of_rows": {}, "_waiting": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with a waiting room of its own."""
        super().__setstate__({**state, "_waiting": WaitingRoom()})

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = ()) -> RowStates:
        # Only the device of a conversion matters: float64 sums rounded to half precision would be worthless.
        def move(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=state.device)).device
            return state.to(device if devices.has_float64(device) else "cpu")

        super()._apply(move, exclude_state)
        return self

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # All sums travel as the bytes of one tensor: one exchange instead of one per state. A byte per list says
        # whether it is float64 here; the lists follow in a dtype that all ranks know by then, because a rank without
        # rows, or with rows of another dtype, would break the exchange. Sums per class come last: a rank without rows
        # does not know K.
        group = process_group or self.process_group
        lists = {name: self.rows_of(name) for name in self._list_dtypes}
        plain = [name for name in self._defaults if name not in lists and name not in self._class_sums]
        wide = torch.tensor([rows.dtype == torch.float64 for rows in lists.values()], dtype=torch.uint8)
        packed = [getattr(self, name).reshape(-1).view(torch.uint8) for name in (*plain, *self._class_sums)]
        packed.insert(len(plain), wide.to(self.count.device))
        gathered = dist_sync_fn(torch.cat(packed), group=group)
        start = 0
        for name in plain:
            state = getattr(self, name)
            stop = start + state.nbytes
            of_ranks = torch.stack([rank[start:stop] for rank in gathered]).flatten().view(state.dtype)
            if name == "num_classes":  # the first state, so nothing has changed yet
                self._agree_on_classes(of_ranks.tolist())
            self._set_reduced(name, of_ranks.reshape(-1, *state.shape))
            start = stop
        is_wide = torch.stack([rank[start : start + len(wide)] for rank in gathered]).any(dim=0).tolist()
        start += len(wide)
        shape = (2, int(self.num_classes), self.n_bins)
        for name in self._class_sums:
            stop = start + 8 * math.prod(shape)
            present = [rank[start:stop].clone().view(torch.float64) for rank in gathered if len(rank) >= stop]
            whole = [torch.zeros(shape, dtype=torch.float64, device=self.count.device)]
            self._set_reduced(name, torch.stack(whole + [sums.reshape(shape) for sums in present]))
            start = stop
        for (name, rows), double in zip(lists.items(), is_wide, strict=True):
            rows = rows.double() if double else rows
            if name == "scores" and not len(rows):
                rows = rows.reshape(0, shape[1])
            self._set_reduced(name, dist_sync_fn(rows, group=group))

    def _agree_on_classes(self, ranks: list[int]) -> None:
        seen = sorted(set(ranks) - {0})
        if len(seen) > 1:
            raise ValueError(f"{type(self).__name__}: the processes saw {seen} classes; the number must be the same.")

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        for name in self._class_sums:
            here, there = getattr(self, name), incoming_state[name]
            if here.shape[1] == 0:
                setattr(self, name, torch.zeros_like(there))
            elif there.shape[1] == 0:
                incoming_state = {**incoming_state, name: torch.zeros_like(here)}
        super()._reduce_states(incoming_state)

    def _set_reduced(self, name: str, ranks: Tensor | list[Tensor]) -> None:
        reduction: Any = self._reductions[name]
        setattr(self, name, reduction(ranks))


def _is_start_of(rows: Tensor, buffer: Tensor) -> bool:
    return rows.data_ptr() == buffer.data_ptr() and rows.device == buffer.device and len(rows) <= len(buffer)


def _fits(rows: Tensor, buffer: Tensor) -> bool:
    changeable = torch.is_inference_mode_enabled() or not buffer.is_inference()
    return changeable and (rows.dtype, rows.device, rows.shape[1:]) == (buffer.dtype, buffer.device, buffer.shape[1:])
