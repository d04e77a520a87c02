"""Correctness ranking loss, CRL (Moon et al., ICML 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from typing import Any, Literal, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from calib_lightning.core import ClassificationModule, CorrectnessHistory, ModuleOptions
from calib_lightning.core.own_data import has_index
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.types import Batch

Confidence = Literal["softmax", "margin", "entropy"]


def ranking_confidence(logits: Tensor, kind: Confidence = "softmax") -> Tensor:
    """Confidence that CRL ranks (Moon et al., 2020).

    Args:
        logits: ``(N, K)``.
        kind: ``"softmax"``, the largest probability; ``"margin"``, the difference of the two largest; ``"entropy"``,
            ``1 - H(p) / log K``, which ranks like the authors' ``-H(p) / log K``.

    Returns:
        ``(N,)`` in ``[0, 1]``, with gradient.

    Example:
        >>> ranking_confidence(torch.zeros(1, 4)).item()
        0.25
    """
    logits = at_least_float32(logits)
    if kind == "entropy":
        log_probs = logits.log_softmax(dim=-1)
        return 1.0 + (log_probs.exp() * log_probs).sum(dim=-1) / math.log(logits.shape[-1])
    probs = logits.softmax(dim=-1)
    if kind == "margin":
        first, second = probs.topk(2, dim=-1).values.unbind(dim=-1)
        return first - second
    return probs.amax(dim=-1)


def correctness_ranking_loss(confidence: Tensor, rate: Tensor) -> Tensor:
    """Ranking loss over neighbours of a batch (Moon et al., 2020).

    ``R = mean_i relu(-t_i (k_i - k_j) + |c_i - c_j|)`` with ``j = i + 1`` (the last row with the first),
    ``t_i = sign(c_i - c_j)``, and 0 for pairs of equal rate.

    Args:
        confidence: ``k``, ``(N,)``; the gradient flows through both of a pair.
        rate: ``c``, ``(N,)`` in ``[0, 1]``: the `correctness_rate` of each sample.

    Returns:
        Scalar >= 0.

    Example:
        >>> correctness_ranking_loss(torch.tensor([0.5, 0.75]), torch.tensor([1.0, 0.0])).item()
        1.25
    """
    difference = rate - rate.roll(-1)
    sign = difference.sign()
    loss = F.relu(-sign * (confidence - confidence.roll(-1)) + difference.abs())
    return (loss * sign.abs()).mean()


def correctness_rate(counts: Tensor, index: Tensor, epochs: int) -> Tensor:
    """Fraction of correct predictions (Moon et al., 2020), ``c = (count - m) / (T - m)``, m the smallest count.

    Args:
        counts: ``(n,)``, how often each training sample was classified correctly.
        index: Samples ``(N,)`` to return the rate of.
        epochs: ``T``, finished epochs, at least 1.

    Returns:
        ``(N,)`` float32 in ``[0, 1]``; 0 if every sample was always correct (``T = m``).

    Deviations:
        Clamped to ``[0, 1]``: a sampler that repeats rows counts some of them twice.

    Example:
        >>> correctness_rate(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]), 3)
        tensor([0.0000, 0.5000, 1.0000])
    """
    least = counts.min()
    return ((counts[index] - least).float() / (epochs - least).clamp_min(1)).clamp(0.0, 1.0)


class CRL(ClassificationModule):
    """Train with cross-entropy and the correctness ranking loss, CRL (Moon et al., ICML 2020).

    Paper: Moon et al. 2020.
    Mechanism: ranks samples by how often they were classified correctly.
    Extra cost: 32 bytes per training sample.

    ``L = CE + w R``, with `correctness_ranking_loss` over `correctness_rate`. ``Batch.index`` identifies the sample
    of each row; the data must be shuffled, since neighbours in a batch are compared. Within an epoch a process knows
    its own rows, at the end those of all processes.

    Args:
        num_classes: K; the command line takes it from the data.
        strength: ``w``, weight of the ranking loss, at least 0.
        ranked: The confidence that is ranked: ``"softmax"``, ``"margin"`` or ``"entropy"``.
        **options: See `ClassificationModule`.

    Raises:
        ValueError: If ``strength`` is negative, ``ranked`` is unknown, or a ``batch_transform`` is given.

    Example:
        >>> CRL(10, encoder="digits_cnn").hparams.strength
        1.0
    """

    def __init__(
        self, num_classes: int, strength: float = 1.0, ranked: Confidence = "softmax", **options: Unpack[ModuleOptions]
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The paper uses 1.")
        if ranked not in ("softmax", "margin", "entropy"):
            raise ValueError(f"ranked is {ranked!r}; it must be 'softmax', 'margin' or 'entropy'.")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 2 for CRL.")
        if options.get("batch_transform") is not None:
            raise ValueError(
                "CRL does not support batch_transform: it compares the confidence of individual training samples, not "
                "mixtures. Omit batch_transform."
            )
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        self.strength = strength
        self.ranked: Confidence = ranked
        self.history = CorrectnessHistory()
        self._seen: tuple[Tensor, Tensor] | None = None

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and logits ``(N, K)`` of one batch."""
        self._check_index(batch.index)
        logits = self(batch.image)
        wide, labels = checked_batch(logits, batch.label, soft=False)
        loss = self.criterion_value(wide, labels)
        if len(self.history.count):  # empty before the first training step
            rate = correctness_rate(self.history.counts, batch.index, max(1, self.current_epoch))
            loss = loss + self.strength * correctness_ranking_loss(ranking_confidence(wide, self.ranked), rate)
        self._seen = batch.index, wide.detach().argmax(dim=-1) == labels
        return loss, logits

    def begin_step(self, batch: Any) -> None:
        """Reject batches that do not identify their samples."""
        if not has_index(batch):
            raise ValueError(
                "CRL keeps a history of every training sample, but the training loader does not identify the sample of "
                "each row. Use a DataLoader with a batch size over a map-style data set, or batches (image, label, "
                "index), where index is the sample's position in its set."
            )

    def end_step(self) -> None:
        """Add the predictions of the step, which count from the next one on."""
        if self._seen is not None and len(self.history.count):
            self.history.update(*self._seen)

    def on_train_start(self) -> None:
        """Allocate the history, or check that the checkpoint's history fits the training set."""
        loader = self.trainer.train_dataloader
        if getattr(loader, "shuffle", None) is False or isinstance(getattr(loader, "sampler", None), SequentialSampler):
            rank_zero_warn(
                "The training data is not shuffled, but CRL compares neighbours in a batch, which are then the same in "
                "every epoch. Use shuffle=True."
            )
        size = _train_size(loader)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            _check_positions(loader.dataset, size)
        known = len(self.history.count)
        fresh = self.trainer.global_step == 0 and self.trainer.ckpt_path is None
        if fresh or not known:  # a module that was trained before also starts at its first epoch
            self.history.resize(size)
        elif known != size:
            raise ValueError(
                f"The checkpoint's history has {known} training samples, but the training set has {size}. Resume with "
                "the data that the checkpoint was trained on."
            )

    def on_train_epoch_end(self) -> None:
        """Log the training metrics; share the predictions with all processes."""
        super().on_train_epoch_end()
        self.history.settle()

    def epoch_rows(self) -> dict[str, Tensor]:
        """The predictions of the current epoch."""
        return {"history": self.history.rows()}

    def restore_epoch_rows(self, rows: dict[str, Tensor]) -> None:
        """Restore the predictions of the current epoch."""
        self.history.restore(rows["history"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resize the history before it is loaded."""
        count = checkpoint["state_dict"].get("history.count")
        if count is not None and len(count) != len(self.history.count):
            self.history.resize(len(count))
        super().on_load_checkpoint(checkpoint)

    def _check_index(self, index: Tensor) -> None:
        if index.dtype != torch.int64 or index.ndim != 1:
            raise TypeError(
                f"Batch.index is {index.dtype} of shape {tuple(index.shape)}; it must be int64 (N,), the position of "
                "each sample in the training set."
            )
        # elsewhere the check would synchronise every step; the first and the last sample have been checked
        if index.device.type != "cpu" or not len(self.history.count):
            return
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= len(self.history.count):
            wrong = low if low < 0 else high
            raise ValueError(
                f"Batch.index holds {wrong}; it must be in 0..{len(self.history.count) - 1}. Let the data set return "
                "each sample's position in it."
            )
        if low == high and len(index) > 1:
            raise ValueError(
                f"Batch.index is {low} for every sample of a batch, but CRL keeps a history of each sample. Let the "
                "data set return each sample's position in it."
            )


def _check_positions(data: Any, size: int) -> None:
    """Check the index that the first and last sample of a data set return."""
    for position in {0, size - 1}:
        sample = data[position]
        said = sample[2] if isinstance(sample, list | tuple) and len(sample) == 3 else None
        said = sample.get("index") if isinstance(sample, Mapping) else said
        said = said.item() if isinstance(said, Tensor) and said.ndim == 0 else said
        if isinstance(said, int | np.integer) and said != position:
            raise ValueError(
                f"Sample {position} of the training set has the index {said!r}, but CRL keeps a history of each "
                "sample. Let the data set return each sample's position in it, or no index at all."
            )


def _train_size(loader: Any) -> int:
    source = getattr(loader, "data", None) or getattr(loader, "dataset", None)
    if not isinstance(source, Sized):
        raise TypeError(
            f"CRL keeps a history of every training sample, but the training loader, a {type(loader).__name__}, has no "
            "data set with a length. Use a single loader over a data set that has one."
        )
    return len(source)
