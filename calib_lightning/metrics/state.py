"""One shared accumulator over an evaluated set, from which the metrics are read.

The state is made of *parts* (a count, sums, binned sums, ranking rows) and a metric is a *read-out*: one function
from the state to a scalar, which names the parts it needs. `EvaluationState` holds the parts of all its read-outs and
fills them in one pass; a single metric holds only those of its own. A new metric adds entries to `PARTS` and
`READ_OUTS` and leaves the existing ones alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from calib_lightning.metrics.functional.calibration import bin_sums, check_n_bins, ece_from_bins
from calib_lightning.metrics.functional.refinement import auroc
from calib_lightning.metrics.functional.rows import (
    FAULTS,
    InputKind,
    Rows,
    check_kind,
    check_shapes,
    check_values,
    fault_masks,
)

Direction = Literal["higher", "lower", "zero"]
"""Which values of a metric are better; ``"zero"`` means nearest to zero."""

_NEVER = torch.iinfo(torch.int64).max


def has_float64(device: torch.device) -> bool:
    """Whether ``device`` can hold float64; where it cannot, the state stays on the CPU and batches are moved there.

    Args:
        device: Any device.

    Returns:
        False for Apple's MPS.
    """
    return device.type != "mps"


def checks_at_once(device: torch.device) -> bool:
    """Whether invalid values on ``device`` are looked for in `update` itself, as reading them costs no wait.

    Args:
        device: Any device.

    Returns:
        True for the CPU; elsewhere faults are counted on the device and reported by `compute`.
    """
    return device.type == "cpu"


class Part(NamedTuple):
    """A piece of the state.

    Attributes:
        declare: Adds the states of this part to a metric.
        add: Adds the rows of a batch to them, out of place: a state that was made under `torch.inference_mode` could
            not be changed in place later.
    """

    declare: Callable[[RowMetric], None]
    add: Callable[[RowMetric, Rows], None]


class ReadOut(NamedTuple):
    """A metric: a function of the state.

    Attributes:
        parts: Names of the parts that it reads, besides the count, which is always there.
        value: Maps the state to a 0-d float64 tensor.
        better: Which values are better.
    """

    parts: tuple[str, ...]
    value: Callable[[Any], Tensor]
    better: Direction


class RowMetric(Metric):
    """Base of all metrics over rows of ``(logits, labels)``: checks, accumulation, synchronisation.

    Sums are float64 and counts int64, whatever the dtype of the enclosing module: ``half()``, ``to(dtype)`` and
    `set_dtype` leave them alone. Invalid values raise in `update` on the CPU; on other devices they are counted there
    without a wait and raise in `compute`.

    Args:
        parts: Names of the needed `PARTS`.
        n_bins: Number of bins M of the binned parts.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    count: Tensor
    faults: Tensor
    first_fault: Tensor

    def __init__(self, parts: Iterable[str], n_bins: int = 15, input: InputKind = "logits", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_kind(input)
        check_n_bins(n_bins)
        self.n_bins = n_bins
        self.input = input
        self.parts = tuple(dict.fromkeys(parts))
        self._num_classes: int | None = None
        self._count_before_forward: int | None = None
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("faults", torch.zeros(len(FAULTS), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("first_fault", torch.full((), _NEVER), dist_reduce_fx="min")
        self._list_dtypes: dict[str, torch.dtype] = {}
        for part in self.parts:
            PARTS[part].declare(self)

    def add_list(self, name: str, dtype: torch.dtype) -> None:
        """Declare a state that keeps one value a row, as a list of one tensor a batch.

        Args:
            name: Name of the state.
            dtype: dtype of the values; ranks agree on float64 if one of them holds float64.
        """
        self.add_state(name, [], dist_reduce_fx="cat")
        self._list_dtypes[name] = dtype

    def rows_of(self, name: str) -> Tensor:
        """Return all values of a list state.

        Args:
            name: A name given to `add_list`.

        Returns:
            ``(N,)``, empty where there are no rows.
        """
        state: Tensor | list[Tensor] = getattr(self, name)
        if isinstance(state, Tensor):
            return state
        empty = torch.empty(0, dtype=self._list_dtypes[name], device=self.count.device)
        return torch.cat([empty, *state])

    def update(self, logits: Tensor, labels: Tensor, confidence: Tensor | None = None) -> None:
        """Add a batch; none of its tensors is kept. A batch of no rows is fine.

        Args:
            logits: Scores ``(N, K)``, floating point: logits, or probabilities with ``input="probs"``.
            labels: Class labels ``(N,)``, integer, in ``0..K-1``.
            confidence: Confidence ``(N,)`` in ``[0, 1]`` that replaces the largest probability.

        Raises:
            TypeError: A wrong dtype.
            ValueError: A wrong shape, another K than before, or (on the CPU) an invalid value.
        """
        batch = self._update_count + (self._count_before_forward or 0)
        where = self._check_shapes(logits, labels, confidence, batch)
        if not has_float64(logits.device):
            logits, labels = logits.cpu(), labels.cpu()
            confidence = None if confidence is None else confidence.cpu()
        if checks_at_once(logits.device):
            check_values(logits, labels, confidence, self.input, where)
        elif len(labels):
            found = fault_masks(logits, labels, confidence, self.input).sum(dim=1)
            self.faults = self.faults + found
            self.first_fault = torch.where(found.any(), self.first_fault.clamp(max=batch), self.first_fault)
            # An index outside the row would stop the device before `compute` can say what was wrong.
            labels = labels.clamp(0, logits.shape[1] - 1)
        if self._num_classes is None:
            self._num_classes = logits.shape[1]
        if len(labels) == 0:
            return
        self.count = self.count + len(labels)
        rows = Rows(logits, labels, confidence, self.input)
        for part in self.parts:
            PARTS[part].add(self, rows)

    def forward(self, logits: Tensor, labels: Tensor, confidence: Tensor | None = None) -> Any:
        """Add a batch and return the metric of that batch alone; dearer than `update`.

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
        # The base class empties the state on the way. What is wrong must be found before, or the earlier batches
        # would be lost with the error; and neither K nor the number of the batch may be forgotten.
        where = self._check_shapes(logits, labels, confidence, self._update_count + 1)
        if checks_at_once(logits.device):
            check_values(logits, labels, confidence, self.input, where)
        self._count_before_forward = 0 if self.dist_sync_on_step else self._update_count
        try:
            return super().forward(logits, labels, confidence)
        finally:
            self._count_before_forward = None

    def reset(self) -> None:
        """Forget all batches."""
        if self._is_synced:
            self.unsync()
        super().reset()
        if self._count_before_forward is None:
            self._num_classes = None

    @property
    def settings(self) -> dict[str, Any]:
        """What a reader of the numbers must know: number and convention of the bins, kind of input, rows seen."""
        return {"n_bins": self.n_bins, "bins": "(lo, hi]", "input": self.input, "rows": int(self.count)}

    def extra_repr(self) -> str:
        """Name the settings that change results.

        Returns:
            Text for ``repr``.
        """
        return f"n_bins={self.n_bins}, input={self.input!r}"

    def _check_shapes(self, logits: Tensor, labels: Tensor, confidence: Tensor | None, batch: int) -> str:
        where = f"{type(self).__name__}, batch {batch}"
        check_shapes(logits, labels, confidence, where)
        if self._num_classes not in (None, logits.shape[1]):
            raise ValueError(
                f"{where}: logits have {logits.shape[1]} classes but earlier batches had {self._num_classes}; "
                "call reset() before another set"
            )
        return where

    def _settle(self) -> None:
        """Report what was only counted so far: invalid values, and that there are no rows at all."""
        if int(self.first_fault) != _NEVER:
            kinds = (self.input, *FAULTS[1:])
            counts = [f"{n} with invalid {kind}" for n, kind in zip(self.faults.tolist(), kinds, strict=True) if n]
            message = (
                f"{type(self).__name__}: {', '.join(counts)} among {int(self.count)} rows, the first in batch "
                f"{int(self.first_fault)} (of a process); logits must be finite, probs >= 0 with rows that sum to 1, "
                "labels in 0..K-1, confidence in [0, 1]"
            )
            if self._is_synced:
                self.unsync()
            raise ValueError(message)
        # Where `update` was never called the base class has warned already.
        if self.update_called and int(self.count) == 0:
            warnings.warn(f"{type(self).__name__}: no rows were given, the result is nan", stacklevel=3)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # All sums travel as the bytes of one tensor, which is one exchange in place of one a state. A byte for each
        # list says whether it is float64 here; the lists follow, in a dtype that all ranks know then, because a rank
        # without rows, or with rows of another dtype, would break the exchange.
        group = process_group or self.process_group
        fixed = {name: getattr(self, name).reshape(-1) for name in self._defaults if name not in self._list_dtypes}
        lists = {name: self.rows_of(name) for name in self._list_dtypes}
        wide = torch.tensor([rows.dtype == torch.float64 for rows in lists.values()], dtype=torch.uint8)
        packed = torch.cat([*(state.view(torch.uint8) for state in fixed.values()), wide.to(self.count.device)])
        gathered = torch.stack(dist_sync_fn(packed, group=group))
        start = 0
        for name, state in fixed.items():
            stop = start + state.nbytes
            ranks = gathered[:, start:stop].flatten().clone().view(state.dtype)
            shape = getattr(self, name).shape
            self._set_reduced(name, ranks.reshape(-1, *shape))
            start = stop
        for (name, rows), is_wide in zip(lists.items(), gathered[:, start:].any(dim=0).tolist(), strict=True):
            rows = rows.double() if is_wide else rows
            self._set_reduced(name, dist_sync_fn(rows, group=group))

    def _set_reduced(self, name: str, ranks: Tensor | list[Tensor]) -> None:
        reduction: Any = self._reductions[name]
        setattr(self, name, reduction(ranks))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = ()) -> RowMetric:
        # Only the device of a conversion is followed: float64 sums rounded to half precision would be worthless.
        def move(state: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=state.device)).device
            return state.to(device if has_float64(device) else "cpu")

        super()._apply(move, exclude_state)
        return self


def _sum_part(name: str, values: Callable[[Rows], Tensor], dtype: torch.dtype = torch.float64) -> Part:
    def declare(metric: RowMetric) -> None:
        metric.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def add(metric: RowMetric, rows: Rows) -> None:
        setattr(metric, name, getattr(metric, name) + values(rows).sum(dtype=dtype))

    return Part(declare, add)


def _declare_bins(metric: RowMetric) -> None:
    metric.add_state("bins", torch.zeros(metric.n_bins, 3, dtype=torch.float64), dist_reduce_fx="sum")


def _add_bins(metric: Any, rows: Rows) -> None:
    metric.bins = metric.bins + bin_sums(rows.confidence, rows.correct, metric.n_bins)


def _declare_ranks(metric: RowMetric) -> None:
    metric.add_list("rank_scores", torch.float32)
    metric.add_list("rank_correct", torch.bool)


def _add_ranks(metric: Any, rows: Rows) -> None:
    metric.rank_scores.append(rows.log_odds)
    metric.rank_correct.append(rows.correct)


PARTS: dict[str, Part] = {
    "correct": _sum_part("correct_sum", lambda rows: rows.correct, torch.int64),
    "nll": _sum_part("nll_sum", lambda rows: rows.nll),
    "brier": _sum_part("brier_sum", lambda rows: rows.brier),
    "confidence": _sum_part("confidence_sum", lambda rows: rows.confidence),
    "bins": Part(_declare_bins, _add_bins),
    "ranks": Part(_declare_ranks, _add_ranks),
}
"""The pieces that a state can be made of."""


def _correctness_auroc(state: Any) -> Tensor:
    if int(state.count) == 0:
        return torch.full((), torch.nan, dtype=torch.float64)
    return auroc(state.rows_of("rank_scores"), state.rows_of("rank_correct"))


READ_OUTS: dict[str, ReadOut] = {
    "accuracy": ReadOut(("correct",), lambda state: state.correct_sum.double() / state.count, "higher"),
    "nll": ReadOut(("nll",), lambda state: state.nll_sum / state.count, "lower"),
    "brier": ReadOut(("brier",), lambda state: state.brier_sum / state.count, "lower"),
    "ece": ReadOut(("bins",), lambda state: ece_from_bins(state.bins), "lower"),
    "signed_gap": ReadOut(
        ("correct", "confidence"),
        lambda state: (state.confidence_sum - state.correct_sum.double()) / state.count,
        "zero",
    ),
    "correctness_auroc": ReadOut(("ranks",), _correctness_auroc, "higher"),
}
"""The metrics, by the key that logs and tables use."""


class EvaluationState(RowMetric):
    """All metrics of an evaluated set from one pass over its logits.

    Per batch one maximum, one exponential and a few sums over ``(N, K)`` serve every read-out. The sums do not grow
    with the set; the ranking rows of the exact `correctness_auroc` take 5 bytes a row (9 for float64 logits).

    Args:
        n_bins: Number of equal-width bins ``(lo, hi]`` of the calibration error.
        ranks: Whether to keep the ranking rows; without them there is no ``"correctness_auroc"``.
        input: Whether the scores given to `update` are ``"logits"`` or ``"probs"``.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Example:
        >>> state = EvaluationState()
        >>> state.update(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0]))
        >>> {name: round(float(value), 3) for name, value in state.compute().items()}
        {'accuracy': 0.667, 'nll': 0.496, 'brier': 0.367, 'ece': 0.299, 'signed_gap': 0.188, 'correctness_auroc': 1.0}
    """

    correct_sum: Tensor
    nll_sum: Tensor
    brier_sum: Tensor
    confidence_sum: Tensor
    bins: Tensor
    rank_scores: list[Tensor]
    rank_correct: list[Tensor]

    read_outs: ClassVar[tuple[str, ...]] = ("accuracy", "nll", "brier", "ece", "signed_gap", "correctness_auroc")

    def __init__(self, n_bins: int = 15, ranks: bool = True, input: InputKind = "logits", **kwargs: Any) -> None:
        self._keys = tuple(key for key in self.read_outs if ranks or "ranks" not in READ_OUTS[key].parts)
        super().__init__([part for key in self._keys for part in READ_OUTS[key].parts], n_bins, input, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Read all metrics.

        Returns:
            Each a 0-d float64 tensor; nan, with a warning, where it is not defined.

        Raises:
            ValueError: Batches on a device held invalid values; how many, of which kind and where first.
        """
        self._settle()
        return {key: READ_OUTS[key].value(self) for key in self._keys}


class ReadOutMetric(RowMetric):
    """A single metric: the parts of the state that one read-out needs.

    Subclasses set ``key``, a key of `READ_OUTS`.
    """

    key: ClassVar[str]

    def __init__(self, input: InputKind = "logits", n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(READ_OUTS[self.key].parts, n_bins, input, **kwargs)

    def compute(self) -> Tensor:
        """Read the metric.

        Returns:
            0-d float64; nan, with a warning, where it is not defined.

        Raises:
            ValueError: Batches on a device held invalid values; how many, of which kind and where first.
        """
        self._settle()
        return READ_OUTS[self.key].value(self)
