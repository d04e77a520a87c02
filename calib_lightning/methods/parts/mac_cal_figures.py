"""Confidence and accuracy of a classifier in an epoch, from which MaC-Cal sets its keep rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calib_lightning.core.distributed import own_rows, rows_by_rank
from calib_lightning.core.submodules import evaluating
from calib_lightning.functional import at_least_float32, binary_labels, two_columns
from calib_lightning.methods.parts.mac_cal_rows import Features, Labels, check_pass, check_rows, deployed_rows
from calib_lightning.methods.parts.mac_cal_rule import HeldOut


def confidence_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``(3,)`` float64: sum of confidences, number of correct rows, number of rows; does not synchronise.

    One logit z of a binary network is read as ``(0, z)``; its targets may be 0. and 1., smoothed, or a column.
    """
    if logits.ndim == 1 or logits.shape[1] == 1:
        logits = two_columns(logits)
        labels = (labels.reshape(-1) > 0.5) if labels.is_floating_point() else labels.reshape(-1)
    labels = binary_labels(labels)  # class numbers may be a column, too
    if len(labels) != len(logits):
        raise ValueError(
            f"The classifier returned {len(logits)} rows of logits for {len(labels)} labels; there must be one label "
            "per row. Give the stage a criterion and one view per image, or measure with held_out=True."
        )
    device = _summing_device(logits.device)
    logits, labels = logits.to(device), labels.to(device)
    if labels.ndim == 2:
        labels = labels.argmax(dim=-1)
    confidence, predicted = at_least_float32(logits).softmax(dim=-1).max(dim=-1)
    rows = torch.stack([confidence.double(), (predicted == labels).double(), torch.ones_like(confidence).double()])
    return rows.sum(dim=1)


def _summing_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


class EpochFigures:
    """Mean confidence and accuracy of an epoch: over its masked steps, or of the classifier as deployed.

    As deployed means on the calibration split or in a pass over the training images; features that cannot change are
    computed once. Over the steps, a hook on the classifier catches the logits of each.

    Args:
        features: Returns the features ``(N, d)`` of a batch, given the module and the batch.
        labels: Returns the labels of a batch.
        held_out: Which of them, as in `AdaptiveSparsity`.
        loader: Batches of the calibration split; ``None`` asks the data module for them.

    Raises:
        ValueError: If a loader is given, and confidence and accuracy are not measured on the calibration split.
    """

    def __init__(
        self, features: Features, labels: Labels, *, held_out: HeldOut, loader: Iterable[Any] | None = None
    ) -> None:
        if loader is not None and held_out is not True:
            raise ValueError(
                f"loader is given, but held_out of the sparsity is {held_out!r}; it must be True, or the calibration "
                "split is not read. Omit the loader, or set held_out=True."
            )
        self.features, self.labels, self.held_out, self.loader = features, labels, held_out, loader
        self._sums: Tensor | None = None  # over the steps, of this process
        self._rows: list[tuple[Tensor, Tensor]] | None = None  # features and labels on which it is measured as deployed
        self._logits: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def check(self, trainer: Trainer, owner: str) -> None:
        """Raise if there is no calibration split for ``owner`` to measure on."""
        check_rows(trainer, self.held_out, self.loader, owner)

    def begin_fit(self, module: LightningModule, owner: str) -> None:
        """Raise if the training images cannot be read again; move the sums of a checkpoint to the module's device."""
        check_pass(module.trainer, self.held_out, owner)
        if self._sums is not None:
            self._sums = self._sums.to(_summing_device(module.device))

    def begin_epoch(self, *, same_features: bool) -> None:
        """Reset the sums; without ``same_features`` the encoder has changed, by its BatchNorm statistics."""
        self._sums = None
        if not same_features:
            self._rows = None

    def begin_step(self, head: nn.Module) -> None:
        """Catch what the classifier returns in this step."""
        if not self.held_out:
            # for this step only: a permanent hook would be copied and saved with the module
            self._hook = head.register_forward_hook(self._catch)

    def end_step(self, batch: Any) -> None:
        """Add what was caught to the sums."""
        logits = self._logits
        self._release()
        if logits is not None:
            sums = confidence_sums(logits, self.labels(batch))
            self._sums = sums if self._sums is None else self._sums + sums

    def measured(self, module: LightningModule, head: nn.Module, owner: str) -> tuple[float, float] | None:
        """Confidence and accuracy over all processes, or ``None`` without steps; collective."""
        trainer = module.trainer
        sums = self._deployed_sums(module, head, owner) if self.held_out else self._sums
        if sums is None:
            return None
        total: Tensor = trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        confidence, correct, rows = total.tolist()
        if rows == 0:
            raise ValueError(f"{owner}: the calibration split has no images to measure the classifier on.")
        return confidence / rows, correct / rows

    def forget(self) -> None:
        """Remove the hook of an interrupted step, and the stored features."""
        self._release()
        self._rows = None

    def sums_by_rank(self) -> list[Tensor]:
        """The sums of every process for a checkpoint, on the CPU; collective."""
        return [] if self._sums is None else [part.cpu() for part in rows_by_rank(self._sums.unsqueeze(0))]

    def load_sums(self, parts: list[Tensor], rank: int) -> None:
        """Take this process's share of `sums_by_rank`, which may come from another number of processes."""
        self._sums = own_rows(parts, rank).sum(dim=0) if parts else None

    def _catch(self, head: nn.Module, inputs: Any, logits: Tensor) -> None:
        self._logits = logits.detach()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._logits = None

    @torch.no_grad()
    def _deployed_sums(self, module: LightningModule, head: nn.Module, owner: str) -> Tensor:
        """Sums over this process's part of the rows, with the classifier as deployed."""
        if self._rows is None:
            self._rows = deployed_rows(module, self.held_out, self.loader, self.features, self.labels, owner)
        sums = torch.zeros(3, dtype=torch.float64, device=_summing_device(module.device))
        with evaluating(head), module.trainer.precision_plugin.forward_context():
            for features, labels in self._rows:
                sums += confidence_sums(head(features), labels)
        return sums
