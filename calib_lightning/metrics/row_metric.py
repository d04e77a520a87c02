"""A metric over rows of ``(logits, labels)``: what happens to a batch between `update` and the parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from calib_lightning.metrics import devices
from calib_lightning.metrics.functional.checks import FAULTS, InputKind, check_shapes, check_values, fault_masks
from calib_lightning.metrics.functional.proper import check_soft_labels, check_soft_values, is_soft, soft_label_faults
from calib_lightning.metrics.functional.rows import Rows
from calib_lightning.metrics.functional.undefined import undefined_keys, warn_undefined, why_undefined
from calib_lightning.metrics.parts import check_rank_bins, part_of
from calib_lightning.metrics.storage import RowStates
from calib_lightning.metrics.view import StateView
from calib_lightning.metrics.waiting import RowBatch, at_once

_NEVER = torch.iinfo(torch.int64).max
_SYNC_FLAGS = ("_cache", "_is_synced", "_to_sync", "_should_unsync")
_SWITCHED_BY_FORWARD = ("_num_classes", "_update_count", "_enable_grad", "compute_on_cpu", *_SYNC_FLAGS)


class RowMetric(RowStates):
    """Base of all metrics over rows of ``(logits, labels)``: checks, accumulation, synchronisation.

    Sums are float64 and counts int64, whatever the dtype of the enclosing module: ``half()``, ``to(dtype)`` and
    `set_dtype` do not change them. Invalid values raise in `update` on the CPU; on other devices they are counted
    without a sync and raise in `compute`. Small batches are copied and added together later, at most 4 MiB of them
    (a device: some 16 MiB); reading a state adds them first.

    Args:
        parts: Names of the needed `PARTS`.
        n_bins: Number of bins M of the binned parts.
        rank_bins: Size of the histogram of log-odds for ranking metrics; ``None`` keeps the score of every row, which
            is exact.
        details: Whether to keep one value per row of every part, for intervals and groups.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    takes_soft_labels: ClassVar[bool] = False

    faults: Tensor
    first_fault: Tensor

    def __init__(
        self,
        parts: Iterable[str],
        n_bins: int = 15,
        rank_bins: int | None = None,
        details: bool = False,
        input: InputKind = "logits",
        **kwargs: Any,
    ) -> None:
        super().__init__(n_bins, rank_bins, details, input, **kwargs)
        if rank_bins is not None:
            check_rank_bins(rank_bins)
        self.parts = tuple(dict.fromkeys(parts))
        if details:
            if rank_bins is not None:
                raise ValueError(f"rank_bins is {rank_bins}; it must be None with details=True, which keeps every row.")
            rows = ("confidence", "correct", "ranks", "labels")
            scores = ("scores",) if "classwise" in self.parts else ()
            self.parts = tuple(dict.fromkeys((*self.parts, *rows, *scores)))
        self._num_classes: int | None = None
        self._count_before_forward: int | None = None
        self.add_state("faults", torch.zeros(len(FAULTS), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("first_fault", torch.full((), _NEVER), dist_reduce_fx="min")
        for part in self.parts:
            part_of(part).declare(self)

    def update(self, logits: Tensor, labels: Tensor, confidence: Tensor | None = None) -> None:
        """Add a batch; its tensors are not kept. A batch without rows is fine.

        Args:
            logits: Scores ``(N, K)``, floating point: logits, or probabilities with ``input="probs"``.
            labels: Class labels ``(N,)``, integer, in ``0..K-1``.
            confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, a different K than before, or (on the CPU) an invalid value.
        """
        number = self._update_count + (self._count_before_forward or 0)
        if self.takes_soft_labels and is_soft(labels):
            self._update_soft(logits, labels, number)
            return
        where = f"{type(self).__name__}, batch {number}"
        check_shapes(logits, labels, confidence, where)
        self._check_classes(logits, where)
        if not devices.has_float64(logits.device):
            logits, labels = logits.cpu(), labels.cpu()
            confidence = None if confidence is None else confidence.cpu()
        numbers = None
        if devices.checks_at_once(logits.device):
            check_values(logits, labels, confidence, self.input, where)
        else:
            numbers = torch.full(labels.shape, number, device=labels.device)
        self._begin(logits)
        if len(labels):
            self._let_wait(RowBatch(logits, labels, confidence, numbers))

    def _add(self, batch: RowBatch) -> None:
        logits, labels, confidence, numbers = batch
        if numbers is not None:
            self._count_faults(fault_masks(logits, labels, confidence, self.input), numbers)
            # An index outside the row would stop the device before `compute` can name the fault.
            labels = labels.clamp(0, logits.shape[1] - 1)
        self.count = self.count + len(labels)
        # On the CPU a large batch is processed in pieces.
        step = max(1, at_once(logits.device) // logits.shape[1]) if logits.device.type == "cpu" else len(labels)
        adders = [part_of(part).add for part in self.parts]
        for start in range(0, len(labels), step):
            piece = slice(start, start + step)
            rows = Rows(logits[piece], labels[piece], None if confidence is None else confidence[piece], self.input)
            for add in adders:
                add(self, rows)

    def forward(self, logits: Tensor, labels: Tensor, confidence: Tensor | None = None) -> Any:
        """Add a batch and return the metric of that batch alone; slower than `update`.

        Args:
            logits: As in `update`.
            labels: As in `update`.
            confidence: As in `update`.

        Returns:
            What `compute` would return if this were the only batch.

        Raises:
            TypeError: As in `update`.
            ValueError: As in `update`.
        """
        return self._forward_once(logits, labels, confidence)

    def _forward_once(self, *batch: Tensor | None) -> Any:
        # The base class empties the state on the way, and a fault stops it halfway: earlier batches, what it has
        # switched off and the number of the batch come back. K is not forgotten in between. Lists are emptied in place,
        # and metrics of one collection share them.
        before: dict[str, Any] = dict(self.metric_state)
        lists = {name: list(state) for name, state in before.items() if isinstance(state, list)}
        switched = {name: vars(self)[name] for name in _SWITCHED_BY_FORWARD}
        self._count_before_forward = 0 if self.dist_sync_on_step else self._update_count
        try:
            return super().forward(*batch)
        except Exception:
            self._leave_waiting_room()
            for name, rows in lists.items():
                before[name][:] = rows
            vars(self).update({**before, **switched, "_computed": None})
            raise
        finally:
            self._count_before_forward = None

    def reset(self) -> None:
        """Forget all batches."""
        if self._is_synced:
            self.unsync()
        self._leave_waiting_room()
        super().reset()
        self._buffers_of_rows.clear()
        if self._count_before_forward is None:
            self._num_classes = None

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the state of another metric of this class.

        Args:
            incoming_state: The other metric, or its ``metric_state``.

        Raises:
            ValueError: Its class, its settings or its number of classes differ.
            RuntimeError: The metric was made with ``dist_sync_on_step=True``.
        """
        state: Any = incoming_state.metric_state if isinstance(incoming_state, RowMetric) else incoming_state
        if isinstance(incoming_state, RowMetric):
            for name in ("parts", "n_bins", "rank_bins", "details", "input"):
                ours, theirs = getattr(self, name), getattr(incoming_state, name)
                if ours != theirs:
                    raise ValueError(
                        f"{type(self).__name__}: {name} of the other state is {theirs!r}; it must be {ours!r}."
                    )
        here, there = int(self.num_classes), int(state.get("num_classes", 0)) if isinstance(state, dict) else 0
        if here and there and here != there:
            raise ValueError(
                f"{type(self).__name__}: the number of classes of the other state is {there}; it must be {here}."
            )
        super().merge_state(incoming_state)
        self._num_classes = here or there or None
        self._computed = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the values must know: conventions, kind of input, rows and classes seen by this process."""
        known: dict[str, Any] = {"rows": int(self.count), "classes": int(self.num_classes) or None, "input": self.input}
        parts = set(self.parts)
        if parts & {"bins", "moments", "classwise", "ranks"}:
            known["n_bins"] = self.n_bins
        if parts & {"bins", "moments", "classwise"}:
            known["bins"] = "(lo, hi]"
        if "ranks" in parts:
            known["ranking"] = "exact" if self.rank_bins is None else f"histogram of {self.rank_bins} bins"
        return known

    def extra_repr(self) -> str:
        """The settings that change results, for ``repr``."""
        ranks = "" if self.rank_bins is None else f", rank_bins={self.rank_bins}"
        return f"n_bins={self.n_bins}{ranks}, input={self.input!r}"

    def _begin(self, logits: Tensor) -> None:
        # `forward` empties the states on the way, but not `_num_classes`.
        if self._num_classes is None or self._count_before_forward is not None:
            self._num_classes = logits.shape[1]
            self.num_classes = torch.full((), logits.shape[1], device=self.num_classes.device)

    def _update_soft(self, logits: Tensor, labels: Tensor, batch: int) -> None:
        if not devices.has_float64(logits.device):
            logits, labels = logits.cpu(), labels.cpu()
        where = f"{type(self).__name__}, batch {batch}"
        check_soft_labels(logits, labels, where)
        self._check_classes(logits, where)
        hard = labels.new_zeros(len(labels), dtype=torch.int64)
        if devices.checks_at_once(logits.device):
            check_values(logits, hard, None, self.input, where)
            check_soft_values(labels, where)
        elif len(labels):
            masks = fault_masks(logits, hard, None, self.input)
            masks[FAULTS.index("labels")] = soft_label_faults(labels)
            self._count_faults(masks, batch)
        self._begin(logits)
        self.count = self.count + len(labels)
        for part in self.parts:
            part_of(part).add_soft(self, logits, labels)

    def _count_faults(self, masks: Tensor, numbers: Tensor | int) -> None:
        """Count faults ``(3, N)`` of rows from the batches with these numbers, without reading a value."""
        if masks.shape[1]:
            self.faults = self.faults + masks.sum(dim=1)
            first = torch.where(masks.any(dim=0), numbers, _NEVER).amin()
            self.first_fault = torch.minimum(self.first_fault, first)

    def _check_classes(self, logits: Tensor, where: str) -> None:
        if self._num_classes not in (None, logits.shape[1]):
            raise ValueError(
                f"{where}: logits have {logits.shape[1]} classes but earlier batches had {self._num_classes}. "
                "Call reset() before another set."
            )

    @property
    def _validity(self) -> tuple[tuple[str, ...], str]:
        """The kinds of faults, and what is allowed."""
        kinds = (self.input, *FAULTS[1:])
        return kinds, (
            "logits must be finite, probs >= 0 with rows that sum to 1, labels in 0..K-1, confidence in [0, 1]"
        )

    def check_faults(self) -> None:
        """Report invalid values that were only counted so far.

        Raises:
            ValueError: There are some; their number, kind and first batch are named.
        """
        if int(self.first_fault) != _NEVER:
            kinds, allowed = self._validity
            counts = [f"{n} with invalid {kind}" for n, kind in zip(self.faults.tolist(), kinds, strict=True) if n]
            message = (
                f"{type(self).__name__}: {', '.join(counts)} among {int(self.count)} rows, the first in batch "
                f"{int(self.first_fault)} (of a process); {allowed}"
            )
            if self._is_synced:
                self.unsync()
            raise ValueError(message)

    def _warn_about(self, values: dict[str, Tensor]) -> None:
        # If `update` was never called, the base class has warned already.
        undefined = undefined_keys(values)
        if not undefined or not self.update_called:
            return
        rows = int(self.count)
        view = StateView(self)
        correct = None
        if "correct" in self.parts:
            correct = round(float(view.mean("correct") * view.count)) if rows else 0
        elif "ranks" in self.parts:
            correct = int(view.ordered.correct.sum())
        names = undefined if rows and len(values) > 1 else ()
        warn_undefined(type(self).__name__, names, why_undefined(rows, correct), stacklevel=4)
