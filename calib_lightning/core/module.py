"""The LightningModule under every training-time method."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD

from calib_lightning.core.batch_transform import BatchTransform, attached
from calib_lightning.core.data_in_use import datamodule_in_use, tell_epoch
from calib_lightning.core.distributed import rows_by_rank
from calib_lightning.core.encoders import Encoder, TimmEncoder, build_encoder
from calib_lightning.core.finite import guard_saves, naming_cause
from calib_lightning.core.heads import Head, LinearHead, build_head, has_spec
from calib_lightning.core.learning import TeachingModule, restore_rows, rows_of
from calib_lightning.core.module_record import (
    CHECKPOINT_KEY,
    ModuleRecord,
    check_classes,
    check_has_switches,
    check_resumable,
    module_record,
    network_only,
    restore_state,
    stored_arguments,
    summed_state,
)
from calib_lightning.core.own_data import check_labels, report_positions
from calib_lightning.core.schedules import with_schedule
from calib_lightning.functional import at_least_float32
from calib_lightning.metrics import CORE, EvaluationState
from calib_lightning.types import Batch, Criterion, EncoderSpec
from calib_lightning.utils.registry import class_path_of


class ClassificationModule(TeachingModule):
    """Encoder, head, criterion and metrics with one optimiser: the base of every training-time method.

    A method is a subclass with a criterion; one that needs more overrides `loss`. It accepts any data module or loader
    whose batches are ``(image, label)``, ``(image, label, index)`` or dicts with these keys; if a ``DataLoader`` has no
    index, each sample's position in the data set is used. Training labels may be soft targets ``(N, K)`` if the
    criterion accepts them; training metrics use their largest entry. Logged keys are
    ``train/loss`` and ``<set>/<metric>``, where ``<set>`` is train, val, calibration, test or ``shift/<name>`` and
    ``<metric>`` is the name of the function in `calib_lightning.metrics.functional`.

    Args:
        num_classes: K; the command line takes it from the data.
        criterion: Maps ``(logits (N, K) in float32 or wider, labels (N,))`` to a scalar. Default: cross-entropy.
        encoder: The name of one of our networks (`encoder_names`) or of a timm model, or ``{"name": ..., **options}``;
            a pretrained timm model with the same number of classes keeps its classifier.
        optimizer: Called with the trainable parameters. Default: SGD, lr 0.1, momentum 0.9, weight decay 5e-4.
        scheduler: Called with the optimiser; stepped once per epoch. ``ReduceLROnPlateau`` monitors ``val/nll``.
        batch_transform: Mixes or multiplies training images around the criterion, as mixup does.

    Raises:
        ValueError: If ``num_classes`` is not positive, the encoder is unknown, or the batch transform is incompatible
            with this module.

    Example:
        >>> module = ClassificationModule(10, encoder="digits_cnn")
        >>> module(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    stage: int = 0
    """Number of stage switches so far."""
    select_on: str = "val/nll"
    """The validation metric by which the command line selects a checkpoint by default."""
    first_stage_epochs: int | None = None
    """Epochs before the first stage switch of the current fit; ``None`` without one."""
    pretrained_head: bool
    """Whether the first head has the weights of a pretrained encoder's classifier."""

    def __init__(
        self,
        num_classes: int,
        *,
        criterion: Criterion | None = None,
        encoder: EncoderSpec = "resnet18_cifar",
        optimizer: OptimizerCallable = lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4),
        scheduler: LRSchedulerCallable | None = None,
        batch_transform: BatchTransform | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1.")
        # Here only, and as plain data: checkpoints then load with weights_only=True.
        self.save_hyperparameters(stored_arguments(inspect.currentframe()))
        self.num_classes = num_classes
        self.encoder = build_encoder(encoder)
        head = LinearHead(self.encoder.num_features, num_classes)
        self.pretrained_head = isinstance(self.encoder, TimmEncoder) and self.encoder.hand_over_classifier(head.linear)
        self.head: Head = head
        self.criterion: Criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.optimizer = optimizer
        self.scheduler = scheduler
        # whether a stage's criterion has replaced the method's own training, whose hooks then stand back
        self.plain_loss = False
        self.batch_transform = attached(batch_transform, self)
        self.stage_transform: BatchTransform | None = None  # around the criterion of a stage, if the method has one
        self.train_state = EvaluationState([key for key in CORE if key != "correctness_auroc"])
        self._image_shape: tuple[int, ...] = ()

    # --- the network -------------------------------------------------------------------------------------------------

    def features(self, image: Tensor) -> Tensor:
        """Features ``(N, d)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.encoder(image)
        return features

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``."""
        return ClassificationModule.logits(self, image) if self.plain_loss else self.logits(image)

    # --- data --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the image size, and make foreign loaders report each sample's position; subclasses must call it."""
        facts = getattr(datamodule_in_use(self.trainer), "image_facts", None)
        if isinstance(facts, dict):
            self.check_images(facts["shape"])
        report_positions(self.trainer, ClassificationModule)
        guard_saves(self.trainer)
        if stage == "fit" and not self.plain_loss:
            self.begin_fit()

    def check_images(self, shape: Sequence[int]) -> None:
        """Reject images that the encoder cannot process, before anything starts; each shape is checked once.

        Args:
            shape: ``(C, H, W)``.

        Raises:
            ValueError: If the encoder is one of this package and does not accept them.
        """
        if tuple(shape) != self._image_shape and isinstance(self.encoder, Encoder):
            self.encoder.check_images(shape)
        self._image_shape = tuple(shape)

    # --- the method's own training: hooks that are not called once a stage's criterion has replaced it ---------------

    def logits(self, image: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``; a method with its own overrides it, not `forward`."""
        logits: Tensor = self.head(self.features(image))
        return logits

    def begin_fit(self) -> None:
        """Called at the start of each fit, with the trainer: build what depends on the data."""

    def begin_step(self, batch: Any) -> None:
        """Called before each training step: set what follows from the epoch, since a fit may resume within one.

        Args:
            batch: The batch as `training_step` receives it.
        """

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and logits ``(N, K)`` of one batch; methods that need more than a criterion override it."""
        if self.batch_transform is not None:
            return self.batch_transform.loss(self, batch)
        logits = self(batch.image)
        return self.criterion_value(logits, batch.label), logits

    def end_step(self) -> None:
        """Called at the end of each training step: collect what its `loss` has computed."""

    def end_validation(self) -> None:
        """Called after each validation within a fit, except the sanity check."""

    # --- training ----------------------------------------------------------------------------------------------------

    @property
    def classifies(self) -> bool:
        """Whether the module has a classifier to validate; a first stage may have none."""
        return True

    def enter_stage(self, stage: int, criterion: Criterion | None) -> None:
        """Record that a stage begins; `StageSwitch` calls it after installing the new head.

        Args:
            stage: Number of switches so far.
            criterion: Loss of the stage, which replaces the method's own and its batch transform; ``None`` keeps both.
        """
        self.stage = stage
        if criterion is not None:
            self.criterion, self.batch_transform, self.plain_loss = criterion, self.stage_transform, True

    def criterion_value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Criterion (scalar) of logits ``(N, K)`` and labels, in float32 or wider for any precision of the run."""
        # A loss in half precision loses the tail of the softmax; autocast does not widen every operation.
        with torch.autocast(logits.device.type, enabled=False):
            return self.criterion(at_least_float32(logits), labels)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the method prepare its step."""
        if not self.plain_loss:
            self.begin_step(batch)
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: loss, log, and training metrics if there is a classifier."""
        batch = self._checked(batch)
        check_labels(batch.label, self.num_classes)
        loss, logits = ClassificationModule.loss(self, batch) if self.plain_loss else self.loss(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch.label))
        if self.classifies:
            labels = batch.label if batch.label.ndim == 1 else batch.label.argmax(dim=-1)
            with naming_cause(self, batch.image, logits):
                self.train_state.update(logits.detach(), labels)
        if not self.plain_loss:
            self.end_step()
        self.end_learning_step()
        return loss

    def on_fit_start(self) -> None:
        """Take the class names from the data, after loading a checkpoint's."""
        self._take_class_names()

    def on_train_epoch_start(self) -> None:
        """Reset the epoch's training metrics; tell the data which epoch it is."""
        tell_epoch(self.trainer)
        self.train_state.reset()

    def on_train_epoch_end(self) -> None:
        """Compute and log the epoch's training metrics, once."""
        super().on_train_epoch_end()
        if self.classifies:
            self._log_state("train", self.train_state)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics; let the method learn from the validation."""
        super().on_validation_epoch_end()
        if self._learns and not self.plain_loss:
            self.end_validation()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser of the trainable parameters, and its scheduler."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        given = None if getattr(self, "_trainer", None) is None else self.trainer.max_epochs
        epochs = 1 if given == 0 else self.first_stage_epochs or given or -1  # 0: no training
        return with_schedule(optimizer, self.scheduler, epochs)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-describing: class, K, stage, head, training metrics of an unfinished epoch."""
        collected = {**self.epoch_rows(), **rows_of(self.criterion)}
        checkpoint[CHECKPOINT_KEY] = ModuleRecord(
            class_path=class_path_of(type(self)),
            num_classes=self.num_classes,
            stage=self.stage,
            head=self.head.spec,
            train_state=summed_state(self.train_state),
            plain_loss=self.plain_loss,
            class_names=None if self.class_names is None else list(self.class_names),
            epoch_rows={name: [part.cpu() for part in rows_by_rank(rows)] for name, rows in collected.items()},
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the head for the checkpoint's weights; Lightning calls this before loading them."""
        super().on_load_checkpoint(checkpoint)
        record = module_record(checkpoint)
        check_classes(record, self.num_classes)
        if (names := record.get("class_names")) is not None:
            self.class_names = tuple(names)
        self.stage = record["stage"]
        if not has_spec(self.head, record["head"]):
            self.head = build_head(record["head"]).to(self.device)
        was_plain = self.plain_loss
        if record["class_path"] == class_path_of(type(self)):
            self.plain_loss = record.get("plain_loss", False)
        else:
            checkpoint["state_dict"] = network_only(checkpoint["state_dict"], self.state_dict())
        restore_state(self.train_state, record["train_state"], self.global_rank)
        if getattr(self, "_trainer", None) is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_resumable(checkpoint, self.trainer.ckpt_path)
            check_has_switches(checkpoint, self.trainer)
            if was_plain and not self.plain_loss:  # back to a stage of the method's own, whose hooks `setup` left out
                self.begin_fit()
        rows = restore_rows(self.criterion, record.get("epoch_rows", {}), self.global_rank)
        if rows:
            self.restore_epoch_rows(rows)

    def epoch_rows(self) -> dict[str, Tensor]:
        """Rows ``(n, ...)`` that this process has collected in the current epoch.

        A checkpoint stores those of all processes and `restore_epoch_rows` restores them, so a method that gathers data
        over an epoch can be resumed within it.
        """
        return {}

    def restore_epoch_rows(self, rows: dict[str, Tensor]) -> None:
        """Restore this process's rows of the current epoch, as returned by `epoch_rows`; on the CPU."""
