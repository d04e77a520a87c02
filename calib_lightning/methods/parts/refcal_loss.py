"""The contrastive losses of RefCal, over the rows of all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from calib_lightning.core.distributed import rows_by_rank, world_size
from calib_lightning.functional import at_least_float32
from calib_lightning.utils.described import Described


def supcon_loss(
    embeddings: Tensor, labels: Tensor | None, *, temperature: float = 0.1, base_temperature: float = 0.07
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020); without labels, SimCLR's (Chen et al., ICML 2020).

    Every view ``i`` of every row is an anchor, ``A(i)`` are all other views, and ``P(i)`` those with the same label or,
    without labels, of the same row:

    ``L = t/b mean_i [ -1/|P(i)| sum_{p in P(i)} log( exp(z_i z_p / t) / sum_{a in A(i)} exp(z_i z_a / t) ) ]``

    An anchor without positives contributes 0 and counts in the mean.

    Args:
        embeddings: z, ``(N, V, D)``, V views of N rows, each of length 1. The loss is computed in float32 or wider,
            even under autocast.
        labels: ``(N,)`` of an integer type, or ``None``.
        temperature: t, above 0.
        base_temperature: b, above 0: the gradients are scaled by t / b.

    Returns:
        Scalar, in nats if t = b.

    Raises:
        TypeError: If the embeddings are not floating point, or the labels not integers.
        ValueError: If shapes do not match, there are fewer than two views in total, or rows have fewer than two views
            and no labels.

    Example:
        >>> supcon_loss(torch.ones(1, 3, 1), None, temperature=0.07).item()  # log 2: one of two
        0.6931471824645996
    """
    _check_temperatures(temperature, base_temperature)
    embeddings, labels = _checked(embeddings, labels)
    return _loss_of_own_anchors(embeddings, embeddings, 0, labels, temperature, base_temperature)


def gather_embeddings(embeddings: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenate the embeddings ``(n, V, D)`` of all processes; ``counts`` holds n of every process.

    The gradient of a row, summed over all processes, flows back to the process that it comes from.
    """
    if len(counts) == 1:
        return embeddings
    padding = max(counts) - len(embeddings)
    parts = all_gather(F.pad(embeddings, (0, 0, 0, 0, 0, padding)))  # type: ignore[no-untyped-call]
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _gathered_loss(embeddings: Tensor, labels: Tensor | None, temperature: float, base_temperature: float) -> Tensor:
    """This process's share of `supcon_loss` over the rows of all processes, times their number.

    DDP averages the gradients, which gives the gradient of the loss over all rows. Each process only uses its own
    anchors, so memory is (rows of one process) x (rows of all).
    """
    embeddings, labels = _checked(embeddings, labels)
    rows = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device) if labels is None else labels
    parts = rows_by_rank(rows)
    counts = [len(part) for part in parts]
    first = sum(counts[: dist.get_rank()]) if len(counts) > 1 else 0
    loss = _loss_of_own_anchors(
        embeddings,
        gather_embeddings(embeddings, counts),
        first,
        None if labels is None else torch.cat(parts),
        temperature,
        base_temperature,
    )
    return world_size() * loss


def _loss_of_own_anchors(
    own: Tensor, everything: Tensor, first: int, labels: Tensor | None, temperature: float, base_temperature: float
) -> Tensor:
    """Part of the loss over ``everything (N, V, D)`` with the anchors ``own``, its rows from ``first`` on."""
    count, views = everything.shape[:2]
    if count * views < 2:
        raise ValueError(
            f"The batch has {count} row with {views} view; a contrastive loss needs at least two views in total. Use a "
            "larger batch."
        )
    group = torch.arange(count, device=own.device) if labels is None else labels
    group = group.repeat_interleave(views)
    number = torch.arange(len(group), device=own.device)
    mine = slice(first * views, (first + len(own)) * views)
    itself = number[mine].unsqueeze(1) == number
    # in half precision, division by a temperature of 0.1 causes errors of several per cent
    with torch.autocast(own.device.type, enabled=False):
        similarity = own.flatten(0, 1) @ everything.flatten(0, 1).T / temperature
    # small values have small rounding errors; `logsumexp` alone only prevents overflow
    similarity = similarity - similarity.detach().amax(dim=1, keepdim=True)
    log_sum = similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1)
    positive = (group[mine].unsqueeze(1) == group) & ~itself
    positives = positive.sum(dim=1)
    mean_similarity = (similarity * positive).sum(dim=1) / positives.clamp_min(1)
    losses = (log_sum - mean_similarity) * (positives > 0)
    return losses.sum() * (temperature / base_temperature / len(group))


def _checked(embeddings: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not embeddings.is_floating_point():
        raise TypeError(
            f"The embeddings have dtype {embeddings.dtype}; it must be floating point. Pass the network's output."
        )
    if embeddings.ndim != 3 or 0 in embeddings.shape:
        raise ValueError(
            f"The embeddings have shape {tuple(embeddings.shape)}; it must be (N, V, D), V views of N rows, all above "
            "0."
        )
    if labels is None:
        if embeddings.shape[1] < 2:
            raise ValueError(
                "The embeddings have one view per row and there are no labels, so there are no positives. Give two "
                "views, or labels."
            )
        return at_least_float32(embeddings), None
    if labels.ndim == 2:
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)}; a contrastive loss does not support soft targets. Give "
            "class labels (N,), or None."
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)}, the embeddings {tuple(embeddings.shape)}; there must be one "
            f"label per row, ({len(embeddings)},)."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"The labels have dtype {labels.dtype}; it must be an integer type such as int64.")
    return at_least_float32(embeddings), labels.long()


def _check_temperatures(temperature: float, base_temperature: float) -> None:
    for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be above 0 and finite, such as 0.1.")


class SupConLoss(Described, nn.Module):
    """`supcon_loss` over the rows of all processes (Khosla et al., NeurIPS 2020).

    Under DDP each process returns its share times the number of processes, so the mean gradient is the gradient of the
    loss over all rows, and the mean value is its value.

    Args:
        temperature: t, above 0; 0.1 in the paper.
        base_temperature: b, above 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> SupConLoss()(torch.ones(2, 2, 1), torch.tensor([0, 0])).isfinite()
        tensor(True)
    """

    def __init__(self, temperature: float = 0.1, base_temperature: float = 0.07) -> None:
        super().__init__()
        _check_temperatures(temperature, base_temperature)
        self.temperature, self.base_temperature = temperature, base_temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of embeddings ``(N, V, D)`` and labels ``(N,)``."""
        return _gathered_loss(embeddings, labels, self.temperature, self.base_temperature)


class SimCLRLoss(SupConLoss):
    """`supcon_loss` without labels, over the rows of all processes (Chen et al., ICML 2020): each row is its own class.

    Args:
        temperature: t, above 0.
        base_temperature: b, above 0. Chen et al. have no such factor: b = t removes it.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> SimCLRLoss()(torch.ones(2, 2, 1), torch.tensor([0, 0])).isfinite()
        tensor(True)
    """

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of embeddings ``(N, V, D)``, V at least 2; the labels are ignored."""
        return _gathered_loss(embeddings, None, self.temperature, self.base_temperature)
