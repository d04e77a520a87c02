"""Cases for several processes: plain functions of ``(rank, world)`` run inside an initialised gloo group.

Each returns plain numbers: the metrics computed over all ranks, next to those of one process that saw all rows.
"""

import itertools
import pickle

import torch

from calib_lightning.metrics import CorrectnessAUROC, EvaluationState, ExpectedCalibrationError


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


def case_deferred_fault(rank: int, world: int) -> dict[str, object]:
    """A fault that only the last rank counted raises on all ranks, twice, and the local state survives."""
    from calib_lightning.metrics import state as module

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
