"""Balancing a linear and a fixed classifier, BalCAL (Ni, Zhao, Gao, Guo and Zha, CVPR 2025).

The fixed classifier is in `parts.balcal_etf`, the search for the balance in `parts.balcal_search`. Here are the loss
and the method.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from calib_lightning.core import ClassificationModule, LinearHead, ModuleOptions
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.methods.parts.balcal_etf import ETFBranch, feature_map_channels
from calib_lightning.methods.parts.balcal_search import find_balance
from calib_lightning.types import Batch, Criterion

JOINED_BATCHES = 50


def batch_class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Class weights of a batch, ``E_k = sqrt((N / C) / n_k)``, 1 for absent classes.

    Args:
        labels: ``(N,)`` int64.
        num_classes: K.

    Returns:
        ``(K,)`` float32; ``C`` is the number of classes in the batch, ``n_k`` the number of rows of class k.

    Example:
        >>> batch_class_weights(torch.tensor([0, 0, 0, 1]), 3).square()
        tensor([0.6667, 2.0000, 1.0000])
    """
    counts = labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
    present = counts > 0
    weights = (len(labels) / present.sum().float() / counts.clamp_min(1)).sqrt()
    return torch.where(present, weights, 1.0)


def balcal_loss(
    linear_logits: Tensor,
    etf_logits: Tensor,
    labels: Tensor,
    *,
    lam: float | Tensor,
    criterion: Criterion = F.cross_entropy,
) -> Tensor:
    """Loss of BalCAL (Ni et al., 2025), ``L = lam C(l_lin, y) + (1 - lam) C(E * l_etf, y)``.

    ``C`` is cross-entropy or another criterion; ``E`` are the `batch_class_weights`, one per column.

    Args:
        linear_logits: ``(N, K)`` of the linear classifier.
        etf_logits: ``(N, K)`` of the fixed classifier.
        labels: ``(N,)`` int64; soft targets are not supported.
        lam: Weight of the linear classifier, in ``[0, 1]``.
        criterion: ``C``, maps logits ``(N, K)`` and labels ``(N,)`` to a scalar.

    Returns:
        Scalar, in nats.

    Raises:
        TypeError: If a dtype is wrong (see `calib_lightning.functional.checked_batch`).
        ValueError: If shapes do not match, there are no rows, or a label is outside ``0..K-1``.

    Example:
        >>> zeros = torch.zeros(2, 4)
        >>> round(balcal_loss(zeros, zeros, torch.tensor([0, 1]), lam=0.8).item(), 4)
        1.3863
    """
    linear_logits, labels = checked_batch(linear_logits, labels, soft=False)
    if etf_logits.shape != linear_logits.shape:
        raise ValueError(
            f"The logits of the fixed classifier have shape {tuple(etf_logits.shape)}, those of the linear one "
            f"{tuple(linear_logits.shape)}; both must be (N, K)."
        )
    weighted = at_least_float32(etf_logits) * batch_class_weights(labels, linear_logits.shape[1])
    return lam * criterion(linear_logits, labels) + (1.0 - lam) * criterion(weighted, labels)


class BalCAL(ClassificationModule):
    """Train a linear and a fixed classifier, balanced by their confidence (Ni et al., CVPR 2025).

    Paper: Ni et al. 2025.
    Mechanism: a fixed, never over-confident classifier balances the linear one.
    Extra cost: an adaptor with two 3x3 convolutions; 8 N K bytes for an epoch's logits.

    Logits are ``lam l_lin + (1 - lam) l_etf``: ``l_lin`` comes from the linear head, ``l_etf`` from a simplex
    equiangular tight frame after an adaptor (`ETFBranch`), both on the feature map before the encoder's last block.
    ``lam`` starts at 0.8, is constant during an epoch and updated at the end of each (`find_balance`) from the logits
    of all training steps of the epoch; those of the fixed classifier are weighted as in the loss. The update precedes
    the validation at the end of the epoch, so that its metrics, the selected checkpoint and the stored ``lam`` belong
    together; a validation in the middle of an epoch uses the ``lam`` of that epoch.

    Args:
        num_classes: K, at least 2; the command line takes it from the data.
        delta: Target confidence on the training set, as a fraction of the accuracy; tune it for each data set.
        etf_scale: Factor of the fixed classifier's logits. With 1 they are in ``[-1, 1]``, and its confidence cannot
            exceed 0.252 for 10 classes or 0.027 for 100.
        adaptor_width: Channels in the middle of the adaptor. Default: half of the feature map's.
        criterion: Loss of both classifiers, such as `FocalLoss`; cross-entropy by default.
        **options: See `ClassificationModule`; no batch transform, since the loss needs more than logits. The encoder
            must have blocks, and the last but one must end in a feature map ``(N, C, H, W)`` with C >= K.

    Attributes:
        lam: ``lam``, a scalar float32 buffer.

    Raises:
        NoBlocksError: If the encoder is not a sequence of blocks.
        ValueError: If an option is invalid, the encoder has no such feature map, or there is a batch transform.

    Deviations:
        The paper's network ends in batch norm, ReLU and pooling, which belong to the linear branch. Here that branch
        consists of the encoder's layers after its last stage: if the stage ends in ReLU, ``l_lin`` is the head on the
        encoder's features, and only the adaptor begins with its own batch norm and ReLU. ``lam`` is set before the
        validation, not after it. Under DDP, class weights are per process; the search uses the rows of all. The
        checkpoint is chosen by ``val/nll`` of the mixture; the authors take the smallest sum of both classifiers'
        cross-entropies. Their schedule is ``recipe/tst`` (Adam, lr 1e-4, 600 epochs); the defaults here are those of
        the base.

    Example:
        >>> BalCAL(10, encoder="digits_cnn")(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    lam: Tensor

    def __init__(
        self,
        num_classes: int,
        delta: float = 0.95,
        etf_scale: float = 1.0,
        adaptor_width: int | None = None,
        criterion: nn.Module | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        if options.get("batch_transform") is not None:
            raise ValueError(
                "BalCAL does not support batch_transform: its loss is not a criterion on logits that a transform could "
                "mix. Omit it, or use it with a method whose loss is a criterion."
            )
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 2 for BalCAL.")
        if not 0 < delta <= 1:
            raise ValueError(f"delta is {delta}; it must be in (0, 1]. The authors' script for CIFAR-10 uses 0.95.")
        if not 0 < etf_scale < math.inf:
            raise ValueError(f"etf_scale is {etf_scale}; it must be above 0 and finite. The authors' code uses 1.")
        if adaptor_width is not None and adaptor_width < 1:
            raise ValueError(f"adaptor_width is {adaptor_width}; it must be at least 1, or None for the default.")
        super().__init__(num_classes, criterion=criterion, **options)
        if isinstance(self.head, LinearHead) and not self.pretrained_head:
            nn.init.zeros_(self.head.linear.bias)
        channels = feature_map_channels(self.encoder, num_classes)
        self.delta = delta
        self.etf_branch = ETFBranch(channels, num_classes, adaptor_width or max(1, channels // 2), etf_scale)
        self.register_buffer("lam", torch.tensor(0.8))
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self._waiting: list[tuple[Tensor, ...]] = []
        self._joined: list[tuple[Tensor, ...]] = []

    # --- the network -------------------------------------------------------------------------------------------------

    def branch_logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K)`` of the linear and the fixed classifier; one pass through the encoder."""
        if image.ndim != 4 or image.shape[1] != self.encoder.in_channels:
            self.encoder(image)  # raises with the reason
        *stages, last = self.encoder.blocks
        feature_map = image
        for stage in stages:
            feature_map = stage(feature_map)
        return self.head(last(feature_map).flatten(1)), self.etf_branch(feature_map)

    def logits(self, image: Tensor) -> Tensor:
        """Logits ``(N, K)``, float32 or wider, of images ``(N, C, H, W)``: the mixture of both classifiers."""
        return _mixed(*self.branch_logits(image), self.lam)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and mixed logits ``(N, K)`` of one batch."""
        linear, etf = self.branch_logits(batch.image)
        # A loss in half precision loses the tail of the softmax; autocast does not widen every operation.
        with torch.autocast(linear.device.type, enabled=False):
            loss = balcal_loss(linear, etf, batch.label, lam=self.lam, criterion=self.criterion)
        self._seen = linear.detach(), etf.detach(), batch.label
        return loss, _mixed(linear, etf, self.lam)

    def end_step(self) -> None:
        """Keep the logits of the step for the end of the epoch."""
        assert self._seen is not None
        self._keep(*self._seen)

    # --- the balance -------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Reset the epoch's logits."""
        super().on_train_epoch_start()
        self._forget()

    def on_validation_start(self) -> None:
        """Set ``lam`` before the validation at the end of an epoch."""
        super().on_validation_start()
        trainer = self.trainer
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        # done: a run that ends within an epoch, by max_steps or early stopping
        if trainer.is_last_batch or trainer.fit_loop.epoch_loop.done:
            self._balance()

    def on_train_epoch_end(self) -> None:
        """Set ``lam`` if no validation ended the epoch; log it and the training metrics."""
        self._balance()
        self.log("train/lambda", self.lam.clone())
        super().on_train_epoch_end()

    def epoch_rows(self) -> dict[str, Tensor]:
        """Logits of both classifiers and labels of the current epoch."""
        empty = torch.zeros((0, self.num_classes), device=self.device)
        kept = [*self._joined, *self._waiting] or [(empty, empty, empty[:, 0].long())]
        # a checkpoint's rows are on the CPU
        linear, etf, labels = _joined([tuple(part.to(self.device) for part in parts) for parts in kept])
        return {"linear": linear, "etf": etf, "labels": labels}

    def restore_epoch_rows(self, rows: dict[str, Tensor]) -> None:
        """Restore the rows of the current epoch."""
        self._forget()
        self._joined.append((rows["linear"], rows["etf"], rows["labels"]))

    def _keep(self, linear: Tensor, etf: Tensor, labels: Tensor) -> None:
        weighted = etf * batch_class_weights(labels, self.num_classes)
        self._waiting.append((linear.float(), weighted.float(), labels))
        # the search reads everything about fifteen times: keep few large parts, but never a second copy
        if len(self._waiting) == JOINED_BATCHES:
            self._joined.append(_joined(self._waiting))
            self._waiting.clear()

    def _forget(self) -> None:
        self._waiting.clear()
        self._joined.clear()

    def _balance(self) -> None:
        """Set ``lam`` from the rows of all processes, if any; collective."""
        parts = [tuple(part.to(self.device) for part in parts) for parts in (*self._joined, *self._waiting)]
        own = torch.tensor([sum(len(labels) for *_, labels in parts)], device=self.device)
        count = int(self.trainer.strategy.reduce(own, reduce_op="sum"))
        if count == 0:  # nor does a stage with its own criterion keep any
            return

        def measure(lam: float) -> tuple[float, float]:
            sums = self.trainer.strategy.reduce(_sums(parts, lam, self.device), reduce_op="sum")
            correct, confidence = sums.tolist()
            return correct / count, confidence / count

        # The sums, and therefore the search, are identical on all processes.
        self.lam.fill_(find_balance(measure, self.delta))
        self._forget()


def _mixed(linear: Tensor, etf: Tensor, lam: float | Tensor) -> Tensor:
    return lam * at_least_float32(linear) + (1.0 - lam) * at_least_float32(etf)


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


@torch.no_grad()
def _sums(parts: list[tuple[Tensor, ...]], lam: float, device: torch.device) -> Tensor:
    """Number of correct rows and sum of confidences ``(2,)`` float64 of the mixture."""
    none = torch.zeros(0, device=device)
    confidences, correct = [none], [none]
    for linear, etf, labels in parts:
        confidence, predicted = _mixed(linear, etf, lam).softmax(dim=-1).max(dim=-1)
        confidences.append(confidence)
        correct.append((predicted == labels).to(confidence.dtype))
    # a single sum over all rows: the partition must not affect rounding
    return torch.stack([torch.cat(columns).sum(dtype=torch.float64) for columns in (correct, confidences)])
