"""Cases for several processes: plain functions of ``(rank, world)`` run inside an initialised gloo group.

Each returns plain numbers: the metrics computed over all ranks, next to those of one process that saw all rows.
"""

import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from calib_lightning.metrics import (
    FULL,
    REPORT,
    CorrectnessAUROC,
    EvaluationState,
    ExpectedCalibrationError,
    SoftLabelScores,
    SquaredKernelCalibrationError,
)
from tests.metrics.table import METRICS, OOD, TERMS, name_of


def _rows(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(n, 7, generator=generator, dtype=torch.float64)
    labels = torch.where(
        torch.rand(n, generator=generator) < 0.6, logits.argmax(1), torch.randint(7, (n,), generator=generator)
    )
    return logits.to(dtype), labels


def _numbers(state: EvaluationState) -> dict[str, float]:
    return {name: value.item() for name, value in state.compute().items()}


def _alone(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    whole = EvaluationState(sync_on_compute=False)
    for logits, labels in batches:
        whole.update(logits, labels)
    return _numbers(whole)


def _shared(shards: list[tuple[torch.Tensor, torch.Tensor]], rank: int, batch: int = 5) -> dict[str, object]:
    state = EvaluationState()
    logits, labels = shards[rank]
    for part in range(0, len(labels), batch):
        state.update(logits[part : part + batch], labels[part : part + batch])
    local = int(state.count)
    ours = _numbers(state)
    return {
        "ours": ours,
        "alone": _alone(shards),
        "count_after": int(state.count),
        "local": local,
        "width": str(state.rows_of("rank_scores").dtype),
    }


def case_uneven_shards(rank: int, world: int) -> dict[str, object]:
    """Shards of 40, 23, 6 ... rows; the local state is back after `compute`."""
    logits, labels = _rows(40 + 23 * world, torch.float32)
    cuts = [0, *[40 + 23 * r for r in range(world - 1)], len(labels)]
    return _shared([(logits[a:b], labels[a:b]) for a, b in itertools.pairwise(cuts)], rank)


def case_empty_rank(rank: int, world: int) -> dict[str, object]:
    """Rank 0 has no rows (unless it is alone) and never calls `update`."""
    shards = [_rows(0 if r == 0 and world > 1 else 30 + r, torch.float32, seed=r) for r in range(world)]
    return _shared(shards, rank)


def case_float64_scores(rank: int, world: int) -> dict[str, object]:
    """The last rank brings float64 logits, the others float32, and rank 0 nothing where there are three."""
    shards = [
        _rows(0 if r == 0 and world > 2 else 30 + r, torch.float64 if r == world - 1 else torch.float32, seed=r)
        for r in range(world)
    ]
    return _shared(shards, rank)


def case_no_rows_anywhere(rank: int, world: int) -> dict[str, float]:
    """No rank has rows: all nan, no hang."""
    return _numbers(EvaluationState())


def case_single_metrics(rank: int, world: int) -> dict[str, float]:
    """Single metrics synchronise like the whole state, also after pickling, reset and a second epoch."""
    ece, rank_auc = pickle.loads(pickle.dumps((ExpectedCalibrationError(n_bins=10), CorrectnessAUROC())))
    for epoch in range(2):
        for metric in (ece, rank_auc):
            metric.reset()
            metric.update(*_rows(20 + 3 * rank, torch.float32, seed=10 * epoch + rank))
        values = {"ece": ece.compute().item(), "correctness_auroc": rank_auc.compute().item()}
    whole = EvaluationState(n_bins=10, sync_on_compute=False)
    for other in range(world):
        whole.update(*_rows(20 + 3 * other, torch.float32, seed=10 + other))
    alone = _numbers(whole)
    return values | {f"alone_{key}": alone[key] for key in values}


def case_soft_labels(rank: int, world: int) -> dict[str, dict[str, float]]:
    """Distributions as labels; the last rank has fewer rows."""

    def rows(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = _rows(31 - 12 * (rank == world - 1), torch.float32, seed=rank)
        return logits, 0.75 * torch.nn.functional.one_hot(labels, 7) + 0.25 / 7

    ours, alone = SoftLabelScores(), SoftLabelScores(sync_on_compute=False)
    ours.update(*rows(rank))
    for other in range(world):
        alone.update(*rows(other))
    return {name: {k: v.item() for k, v in m.compute().items()} for name, m in (("ours", ours), ("alone", alone))}


def case_deferred_fault(rank: int, world: int) -> dict[str, object]:
    """A fault that only the last rank counted raises on all ranks, twice, and the local state survives."""
    from calib_lightning.metrics import devices as module

    original = module.checks_at_once
    module.checks_at_once = lambda device: False
    try:
        metric = EvaluationState()
        logits, labels = _rows(12, torch.float32, seed=rank)
        metric.update(logits, labels)
        if rank == world - 1:
            logits = logits.clone()
            logits[3] = torch.nan
        metric.update(logits, labels)
        messages = []
        for _ in range(2):
            try:
                metric.compute()
            except ValueError as error:
                messages.append(str(error))
        local = int(metric.count)
        metric.reset()
        metric.update(*_rows(12, torch.float32, seed=rank))
        return {"messages": messages, "local": local, "after_reset": _numbers(metric)}
    finally:
        module.checks_at_once = original


# --- every class, and every way to share rows out

Batch = tuple[torch.Tensor, torch.Tensor]

STATES = {
    "everything": lambda **options: EvaluationState(FULL, **options),
    "histogram": lambda **options: EvaluationState(REPORT, rank_bins=16384, **options),
    "details": lambda **options: EvaluationState(FULL, details=True, **options),
}


def _bf16(batch: Batch) -> Batch:
    return batch[0].bfloat16(), batch[1]


def shards_of(name: str, world: int, seed: int = 0) -> list[list[Batch]]:
    """The batches of every rank."""
    sizes = [40 - 17 * rank for rank in range(world)]
    rows = [_rows(n, torch.float32, seed=seed + rank) for rank, n in enumerate(sizes)]
    whole = [[(x[:9], y[:9]), (x[9:], y[9:])] if len(y) > 9 else [(x, y)] for x, y in rows]
    nothing = _rows(0, torch.float32)
    last = world - 1
    match name.split():
        case ["uneven"]:
            pass
        case ["one", "row"]:
            whole[last] = [_rows(1, torch.float32, seed=seed + 9)]
        case ["empty", place]:
            whole[{"first": 0, "middle": world // 2, "last": last}[place]] = [nothing]
        case ["untouched", place]:
            whole[{"first": 0, "middle": world // 2, "last": last}[place]] = []
        case ["only", "last"]:
            whole = [*([] for _ in range(last)), [_rows(40, torch.float32, seed=seed)]]
        case ["empty", "batch", "between"]:
            whole = [[nothing, *batches, nothing] for batches in whole]
        case ["mixed", "widths"]:
            whole[last] = [_rows(21, torch.float64, seed=seed + 9)]
            whole[0] = [_rows(8, torch.float32, seed=seed + 8)] if world == 2 else []
        case ["mixed", "within"]:
            whole[0] = [_rows(6, torch.float64, seed=seed + 9), *whole[0]]
        case ["half"]:
            whole = [[_bf16(batch) for batch in batches] for batches in whole]
        case ["half", "and", "double"]:
            whole[0] = [_bf16(batch) for batch in whole[0]]
            whole[last] = [_rows(21, torch.float64, seed=seed + 9)]
        case ["nobody"]:
            whole = [[] for _ in range(world)]
        case ["nobody,", "empty", "batches"]:
            whole = [[nothing] for _ in range(world)]
        case _:
            raise ValueError(name)
    return whole


SHARES_OF_ALL = ["uneven", "untouched first", "empty last", "mixed widths", "nobody"]
SHARES = [
    *("one row", "empty first", "empty middle", "untouched middle", "untouched last", "only last"),
    *("empty batch between", "mixed within", "half", "half and double", "nobody, empty batches"),
]


def _ood(batch: Batch) -> Batch:
    return batch[0].amax(dim=1), batch[1] < 4


def makers() -> dict[str, tuple[Callable[..., Any], Callable[[Batch], Batch]]]:
    """Every class with what it is fed: by key, by name for those of several values, and whole states."""
    single = {key: row[0] for key, row in METRICS.items()}
    terms = {name_of(row[0]): row[0] for row in TERMS.values()}
    others = {"skce": SquaredKernelCalibrationError}
    plain = {name: (maker, lambda batch: batch) for name, maker in (single | terms | others | STATES).items()}
    return plain | {name: (maker, _ood) for name, maker in OOD.items()}


def _read(metric: Any, name: str) -> dict[str, float]:
    value = metric.compute()
    return {key: v.item() for key, v in value.items()} if isinstance(value, dict) else {name: value.item()}


def _snapshot(metric: Any) -> dict[str, list[torch.Tensor]]:
    return {
        name: [t.clone() for t in (state if isinstance(state, list) else [state])]
        for name, state in metric.metric_state.items()
    }


def _is_same(one: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        len(one[name]) == len(other[name])
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))
        for name in one
    )


def _fed(metric: Any, batches: Iterable[Batch]) -> Any:
    for batch in batches:
        metric.update(*batch)
    return metric


def _complaint(metric: Any) -> str:
    try:
        metric.compute()
    except ValueError as error:
        return str(error)
    return "nothing"


def case_every_metric(rank: int, world: int, shares: str, only_states: bool) -> dict[str, dict[str, Any]]:
    """Each class after a reset: its figures, and whether its own rows came back."""
    results = {}
    for name, (maker, view) in makers().items():
        if only_states and name not in STATES:
            continue
        metric = maker()
        if shares in ("uneven", "nobody, empty batches"):  # other rows before, and a synchronised result of them
            _read(_fed(metric, map(view, shards_of("uneven", world, seed=50)[rank])), name)
            metric.reset()
        shards = shards_of(shares, world)
        _fed(metric, map(view, shards[rank]))
        before = _snapshot(metric)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = _read(metric, name)
        results[name] = {"ours": ours, "intact": _is_same(before, _snapshot(metric))}
        if name == "details":
            with metric.sync_context():
                results[name]["rows"] = {key: metric.rows_of(key).tolist() for key in metric.lists}
        if rank == 0:
            alone = _fed(maker(sync_on_compute=False), map(view, itertools.chain(*shards)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[name]["alone"] = _read(alone, name)
            if name == "details":
                results[name]["alone_rows"] = {key: alone.rows_of(key).tolist() for key in alone.lists}
    return results


def case_other_classes(rank: int, world: int) -> dict[str, dict[str, Any]]:
    """The last rank has 5 classes and the others 7: what is raised, what is left, and a clean second epoch."""
    results = {}
    for name, (maker, view) in makers().items():
        if name in OOD:
            continue
        metric = maker()
        logits, labels = _rows(12, torch.float32, seed=rank)
        if rank == world - 1:
            logits, labels = logits[:, :5], labels % 5
        metric.update(logits, labels)
        before = _snapshot(metric)
        message = _complaint(metric)
        intact = _is_same(before, _snapshot(metric))
        metric.reset()
        shards = shards_of("uneven", world)
        ours = _read(_fed(metric, map(view, shards[rank])), name)
        alone = _read(_fed(maker(sync_on_compute=False), map(view, itertools.chain(*shards))), name)
        results[name] = {"message": message, "intact": intact, "ours": ours, "alone": alone}
    return results


def case_fault_of_any_rank(rank: int, world: int, faulty: int) -> dict[str, list[str]]:
    """One row in the third batch of one rank has a NaN that is only counted: what every class raises on this rank."""
    from calib_lightning.metrics import devices

    original = devices.checks_at_once
    devices.checks_at_once = lambda device: False
    results = {}
    try:
        for name, (maker, view) in makers().items():
            metric = maker()
            for number in range(4):
                logits, labels = _rows(10, torch.float32, seed=10 * rank + number)
                if (rank, number) == (faulty, 2):
                    logits[3, :] = torch.nan
                metric.update(*view((logits, labels)))
            results[name] = [type(metric).__name__, _complaint(metric)]
    finally:
        devices.checks_at_once = original
    return results


def case_figures_and_local_intervals(rank: int, world: int) -> dict[str, Any]:
    """Figures show the rows of all ranks; intervals of a state that does not synchronise those of its own rank."""
    from matplotlib.text import Text

    from calib_lightning.metrics import bootstrap_intervals
    from calib_lightning.plots import figures

    shared = EvaluationState()
    shared.update(*_rows(0 if rank == 0 else 100 + rank, torch.float32, seed=rank))
    drawn = figures(shared)["reliability"]
    alone = EvaluationState(["accuracy"], details=True, sync_on_compute=False)
    alone.update(*_rows(50 + 10 * rank, torch.float32, seed=rank))
    interval = bootstrap_intervals(alone, 50)["accuracy"]
    return {
        "text": " ".join(text.get_text() for text in drawn.findobj(Text)),
        "left": int(shared.count),
        "value": interval.value,
        "own": alone.compute()["accuracy"].item(),
        "held": interval.low <= interval.value <= interval.high,
    }
