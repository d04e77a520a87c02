"""Correctness ranking loss, CRL (Moon et al., ICML 2020); `parts.crl_samples` has the checks of its samples."""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack

import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from calib_lightning.core import ClassificationModule, CorrectnessHistory, LearningCriterion, ModuleOptions
from calib_lightning.core.module_record import CHECKPOINT_KEY
from calib_lightning.core.own_data import as_batch, has_index
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.methods.cross_entropy import cross_entropy_loss
from calib_lightning.methods.parts.crl_samples import check_positions, train_size
from calib_lightning.utils.described import Described
from calib_lightning.utils.names import check_choice

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


class CRLLoss(Described, LearningCriterion):
    """Cross-entropy plus the correctness ranking loss (Moon et al., 2020), ``L = CE + w R``.

    `correctness_ranking_loss` over the `correctness_rate` of each sample, which it learns in training; ``Batch.index``
    identifies the sample of each row. Within an epoch a process knows its own rows, at the end those of all processes.
    The criterion of `CRL`, or of a stage, which starts a history of its own.

    Args:
        strength: ``w``, weight of the ranking loss, at least 0.
        ranked: The confidence that is ranked: ``"softmax"``, ``"margin"`` or ``"entropy"``.

    Raises:
        ValueError: If ``strength`` is negative or ``ranked`` is unknown.

    Attributes:
        history: How often each training sample was classified correctly.

    Example:
        >>> CRLLoss(0.5).strength
        0.5
    """

    def __init__(self, strength: float = 1.0, ranked: Confidence = "softmax") -> None:
        super().__init__()
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be at least 0 and finite. The paper uses 1.")
        check_choice("ranked", ranked, Confidence)
        self.strength = strength
        self.ranked: Confidence = ranked
        self.history = CorrectnessHistory()
        self._step: tuple[Tensor, int] | None = None  # samples of the step, finished epochs
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss (scalar) of logits ``(N, K)`` and labels ``(N,)``; cross-entropy alone before the first step."""
        logits, labels = checked_batch(logits, labels, soft=False)
        loss = cross_entropy_loss(logits, labels)
        if self._step is None:
            return loss
        index, epochs = self._step
        rate = correctness_rate(self.history.counts, index, max(1, epochs))
        self._seen = index, logits.detach().argmax(dim=-1) == labels
        return loss + self.strength * correctness_ranking_loss(ranking_confidence(logits, self.ranked), rate)

    def check(self, trainer: Trainer, transform: nn.Module | None, epochs: range) -> None:
        """Reject a batch transform."""
        _reject_transform(transform)

    def look_at(self, batch: Any) -> None:
        """Reject batches that do not identify their samples."""
        if not has_index(batch):
            raise ValueError(
                "CRL keeps a history of every training sample, but the training loader does not identify the sample of "
                "each row. Use a DataLoader with a batch size over a map-style data set, or batches (image, label, "
                "index), where index is the sample's position in its set."
            )

    def renew(self) -> None:
        """Forget the history."""
        self.history.resize(0)
        self._step = self._seen = None

    def begin_fit(self, trainer: Trainer, *, fresh: bool) -> None:
        """Allocate the history, or check that the checkpoint's history fits the training set."""
        loader = trainer.train_dataloader
        if getattr(loader, "shuffle", None) is False or isinstance(getattr(loader, "sampler", None), SequentialSampler):
            rank_zero_warn(
                "The training data is not shuffled, but CRL compares neighbours in a batch, which are then the same in "
                "every epoch. Use shuffle=True."
            )
        size = train_size(loader)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            check_positions(loader.dataset, size)
        known = len(self.history.count)
        if fresh or not known:  # a module that was trained before also starts at its first epoch
            self.history.resize(size)
            self.first_epoch = trainer.current_epoch if fresh else self.first_epoch
        elif known != size:
            raise ValueError(
                f"The checkpoint's history has {known} training samples, but the training set has {size}. Resume with "
                "the data that the checkpoint was trained on."
            )

    def begin_step(self, trainer: Trainer, batch: Any) -> None:
        """Note the samples of the step."""
        self.look_at(batch)
        if not len(self.history.count):  # the first step of a stage
            self.begin_fit(trainer, fresh=False)
        index = as_batch(batch, "CRL").index
        self._check_index(index)
        self._step, self._seen = (index, trainer.current_epoch - self.first_epoch), None

    def end_step(self) -> None:
        """Add the predictions of the step, which count from the next one on."""
        if self._seen is not None:
            self.history.update(*self._seen)
        self._step = None

    def end_epoch(self) -> None:
        """Share the predictions with all processes."""
        self.history.settle()

    def epoch_rows(self) -> dict[str, Tensor]:
        """The predictions of the current epoch."""
        return {"history": self.history.rows()}

    def restore_epoch_rows(self, rows: dict[str, Tensor]) -> None:
        """Restore the predictions of the current epoch."""
        self.history.restore(rows["history"])

    def _check_index(self, index: Tensor) -> None:
        # elsewhere the check would synchronise every step; the first and the last sample have been checked
        if index.device.type != "cpu":
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


def _reject_transform(transform: nn.Module | None) -> None:
    if transform is not None:
        raise ValueError(
            f"CRL does not support batch_transform ({type(transform).__name__}): it compares the confidence of "
            "individual training samples, not mixtures. Omit batch_transform."
        )


class CRL(ClassificationModule):
    """Train with cross-entropy and the correctness ranking loss, CRL (Moon et al., ICML 2020).

    Paper: Moon et al. 2020.
    Mechanism: ranks samples by how often they were classified correctly.
    Extra cost: 32 bytes per training sample.

    The equation is that of `CRLLoss`. The data must be shuffled, since neighbours in a batch are compared.

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
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 2 for CRL.")
        criterion = CRLLoss(strength, ranked)
        _reject_transform(options.get("batch_transform"))
        super().__init__(num_classes, criterion=criterion, **options)

    @property
    def history(self) -> CorrectnessHistory:
        """How often each training sample was classified correctly.

        Raises:
            RuntimeError: In a stage with a criterion of its own.
        """
        if not isinstance(self.criterion, CRLLoss):
            raise RuntimeError(
                f"The criterion of this stage is a {type(self.criterion).__name__}, which keeps no history. Read the "
                "history before the stage begins, from a checkpoint of the stage before, or give the stage a CRLLoss."
            )
        return self.criterion.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read checkpoints from before the history belonged to the criterion."""
        state, record = checkpoint["state_dict"], checkpoint.get(CHECKPOINT_KEY, {})
        for values, old, new in (
            (state, "history.count", "criterion.history.count"),
            (record.get("epoch_rows", {}), "history", "criterion/0/history"),
        ):
            rows = values.pop(old, None)
            if rows is not None and isinstance(self.criterion, CRLLoss):  # a stage's criterion has none
                values[new] = rows
        super().on_load_checkpoint(checkpoint)
