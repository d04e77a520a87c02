"""The LightningModule under every training-time method, and loading it from a checkpoint."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TypedDict, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import collect_init_args
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD

from calib_lightning.core.batch_transform import BatchTransform
from calib_lightning.core.checkpoint_io import AtomicCheckpointIO
from calib_lightning.core.data_facts import class_names_of
from calib_lightning.core.distributed import own_rows, rows_by_rank
from calib_lightning.core.encoders import Encoder, TimmEncoder, build_encoder
from calib_lightning.core.heads import Head, LinearHead, build_head
from calib_lightning.core.own_data import Positioned, as_batch, with_positions
from calib_lightning.core.schedules import with_schedule
from calib_lightning.functional import at_least_float32
from calib_lightning.metrics import CORE, REPORT, EvaluationState, SoftLabelScores
from calib_lightning.types import Batch, Criterion, EncoderSpec, Prediction
from calib_lightning.utils.described import Described, Spec, is_data, rebuilt, storable, stored
from calib_lightning.utils.registry import class_path_of, find_class

CHECKPOINT_KEY = "calib_lightning"
UNLABELLED = "ood/"
"""Prefix of sets whose images belong to no class: their predictions are saved but not scored."""
OVO_CLASSES = 200
"""Maximum number of classes for `ovo_auroc`, which keeps all scores of a test set: 80 MB for 50,000 rows."""


class ModuleOptions(TypedDict, total=False):
    """Options that every method forwards to `ClassificationModule`, typed once."""

    encoder: EncoderSpec
    optimizer: OptimizerCallable
    scheduler: LRSchedulerCallable | None
    batch_transform: BatchTransform | None


def with_transform(options: ModuleOptions, transform: BatchTransform) -> ModuleOptions:
    """Add a method's own batch transform to its options; reject a second one."""
    if options.get("batch_transform") is not None:
        raise ValueError(
            f"batch_transform cannot be set: this method already has {type(transform).__name__}. Pass yours to a "
            "method without one, such as CrossEntropy or Focal."
        )
    return {**options, "batch_transform": transform}


class _ModuleRecord(TypedDict):
    class_path: str
    num_classes: int
    stage: int
    head: Spec
    train_state: dict[str, Tensor]


class ModuleRecord(_ModuleRecord, total=False):
    """What a checkpoint stores about its module; plain data. Older files lack the keys listed here."""

    epoch_rows: dict[str, list[Tensor]]
    plain_loss: bool
    class_names: list[str] | None


class ClassificationModule(LightningModule):
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
    select_on: ClassVar[str] = "val/nll"
    """The validation metric by which the command line selects a checkpoint by default."""
    first_stage_epochs: int | None = None
    """Epochs before the first stage switch of the current fit; ``None`` without one."""
    pretrained_head: bool
    """Whether the first head has the weights of a pretrained encoder's classifier."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes that it was trained on, in logit order; ``None`` if unknown."""

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
        self.save_hyperparameters(_stored_arguments(inspect.currentframe()))
        self.num_classes = num_classes
        self.encoder = build_encoder(encoder)
        head = LinearHead(self.encoder.num_features, num_classes)
        self.pretrained_head = isinstance(self.encoder, TimmEncoder) and self.encoder.hand_over_classifier(head.linear)
        self.head: Head = head
        self.criterion: Criterion = nn.CrossEntropyLoss() if criterion is None else criterion
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batch_transform = batch_transform
        # whether a stage's criterion has replaced the method's own training, whose hooks then stand back
        self.plain_loss = False
        if batch_transform is not None:
            if not isinstance(batch_transform, BatchTransform):
                raise TypeError(
                    f"batch_transform is {batch_transform!r}; it must be an object such as MixupTransform()."
                )
            batch_transform.attach(self)
        self.train_state = EvaluationState([key for key in CORE if key != "correctness_auroc"])
        self.val_state = EvaluationState()
        self.test_states = nn.ModuleList()
        self.test_sets: list[str] = []
        self._image_shape: tuple[int, ...] = ()
        self._soft: dict[str, tuple[Tensor, SoftLabelScores]] = {}

    # --- the network -------------------------------------------------------------------------------------------------

    def features(self, image: Tensor) -> Tensor:
        """Features ``(N, d)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.encoder(image)
        return features

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``."""
        return ClassificationModule.logits(self, image) if self.plain_loss else self.logits(image)

    def outputs(self, image: Tensor) -> Prediction:
        """Logits and, if the method defines its own, confidences; one pass through the network."""
        return Prediction(self(image))

    def confidence(self, image: Tensor) -> Tensor:
        """Confidence ``(N,)`` in the predicted class: the method's own, or the largest softmax probability."""
        logits, confidence = self.outputs(image)
        return at_least_float32(logits).softmax(dim=-1).amax(dim=-1) if confidence is None else confidence

    # --- data --------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the image size, and make foreign loaders report each sample's position; subclasses must call it."""
        facts = getattr(datamodule_in_use(self.trainer), "image_facts", None)
        if isinstance(facts, dict):
            self.check_images(facts["shape"])
        # called with every loader of every stage, after Lightning has set its distributed sampler
        strategy = self.trainer.strategy
        vars(strategy)["process_dataloader"] = partial(_process_dataloader, self.trainer)
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

    def _call_batch_hook(self, hook_name: str, *args: Any) -> Any:
        """Pass hooks the loader's original batch; the samples' positions are added after the last hook."""
        batch, *rest = args
        if not isinstance(batch, Positioned):
            return super()._call_batch_hook(hook_name, *args)
        batch = Positioned(super()._call_batch_hook(hook_name, batch.batch, *rest), batch.index)
        return batch.attached() if hook_name == "on_after_batch_transfer" else batch

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
            batch: The batch as the loader made it.
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
            self.criterion, self.batch_transform, self.plain_loss = criterion, None, True

    def criterion_value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Criterion (scalar) of logits ``(N, K)`` and labels, in float32 or wider for any precision of the run."""
        # A loss in half precision loses the tail of the softmax; autocast does not widen every operation.
        with torch.autocast(logits.device.type, enabled=False):
            return self.criterion(at_least_float32(logits), labels)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let the method prepare its step."""
        if not self.plain_loss:
            self.begin_step(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: loss, log, training metrics."""
        batch = self._checked(batch)
        self._check_labels(batch.label)
        loss, logits = ClassificationModule.loss(self, batch) if self.plain_loss else self.loss(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch.label))
        labels = batch.label if batch.label.ndim == 1 else batch.label.argmax(dim=-1)
        try:
            self.train_state.update(logits.detach(), labels)
        except ValueError as error:
            raise ValueError(f"In training, at step {self.global_step}: {error}") from error
        if not self.plain_loss:
            self.end_step()
        return loss

    def on_fit_start(self) -> None:
        """Take the class names from the data, after loading a checkpoint's."""
        self._take_class_names()

    def on_train_epoch_start(self) -> None:
        """Reset the epoch's training metrics."""
        self.train_state.reset()

    def on_train_epoch_end(self) -> None:
        """Compute and log the epoch's training metrics, once."""
        self._log_state("train", self.train_state)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser of the trainable parameters, and its scheduler."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        trainer: Trainer | None = getattr(self, "_trainer", None)
        given = None if trainer is None else trainer.max_epochs
        epochs = 1 if given == 0 else self.first_stage_epochs or given or -1  # 0: no training
        return with_schedule(optimizer, self.scheduler, epochs)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Reset the validation metrics; the sanity check leaves no trace."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._take_class_names()
        self.val_state.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> Prediction:  # type: ignore[override]
        """Add one batch to the validation metrics; return its prediction for callbacks."""
        return self._evaluate(self._checked(batch), self.val_state)

    def on_validation_epoch_end(self) -> None:
        """Compute and log the validation metrics, once."""
        if not self.trainer.sanity_checking:
            self._log_state("val", self.val_state)
            if self.trainer.state.fn == TrainerFn.FITTING and not self.plain_loss:
                self.end_validation()

    def on_test_start(self) -> None:
        """Make one accumulator per test set, and another one if the set has label distributions."""
        self._take_class_names()
        data = datamodule_in_use(self.trainer)
        loaders = self.trainer.test_dataloaders
        count = len(loaders) if isinstance(loaders, list | tuple) else 1
        self.test_sets = _set_names(getattr(data, "evaluation_names", None), count)
        found = {name: label_distributions_of(data, name) for name in self.test_sets if not _is_unlabelled(name)}
        self._soft = {
            name: (labels.to(self.device), SoftLabelScores().to(self.device))
            for name, labels in found.items()
            if labels is not None
        }
        report = (*REPORT, "ovo_auroc") if self.num_classes <= OVO_CLASSES else REPORT
        self.test_states = nn.ModuleList(EvaluationState(report) for _ in range(count)).to(self.device)

    def test_step(  # type: ignore[override]
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction:
        """Add one batch to the metrics of its set; return its prediction for callbacks."""
        state, name, batch = self.test_states[dataloader_idx], self.test_sets[dataloader_idx], self._checked(batch)
        assert isinstance(state, EvaluationState)
        if _is_unlabelled(name):
            return self.outputs(batch.image)
        prediction = self._evaluate(batch, state)
        if name in self._soft:
            labels, scores = self._soft[name]
            if bool((batch.index < 0).any()):
                raise ValueError(
                    f"The batches of {name!r} have no index, which label_distributions({name!r}) needs. Let the data "
                    "set return (image, label, index)."
                )
            scores.update(prediction.logits, labels[batch.index])
        return prediction

    def on_test_epoch_end(self) -> None:
        """Compute and log the metrics of every test set, once."""
        for name, state in zip(self.test_sets, self.test_states, strict=True):
            assert isinstance(state, EvaluationState)
            if _is_unlabelled(name):
                continue
            self._log_state(name, state)
            if name in self._soft:
                self._log_state(name, self._soft[name][1])
            rows: Tensor = self.trainer.strategy.reduce(state.count.clone(), reduce_op="sum")
            self.log(f"{name}/n", rows.float(), add_dataloader_idx=False, sync_dist=True, reduce_fx="max")

    def on_predict_start(self) -> None:
        """Compare the class names with those of the data."""
        self._take_class_names()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """Logits and confidence of one batch; labels are ignored."""
        return self.outputs(as_batch(batch, type(self).__name__, labelled=False).image)

    def _evaluate(self, batch: Batch, state: EvaluationState) -> Prediction:
        prediction = self.outputs(batch.image)
        state.update(prediction.logits, batch.label, prediction.confidence)
        return prediction

    def _log_state(self, prefix: str, state: EvaluationState | SoftLabelScores) -> None:
        # compute() has already summed over the ranks. Lightning asks to synchronise them: their largest is exact, while
        # their mean would round.
        values = {f"{prefix}/{name}": value.float() for name, value in state.compute().items()}
        self.log_dict(values, add_dataloader_idx=False, sync_dist=True, reduce_fx="max")

    def _take_class_names(self) -> None:
        names, known = class_names_of(datamodule_in_use(self.trainer)), self.class_names
        if names is None or names == known:
            return
        if len(names) != self.num_classes:
            raise ValueError(
                f"The data has {len(names)} class names; it must have one for each of the module's {self.num_classes} "
                "classes. Give the names in label order, or use a module with as many classes."
            )
        if known is not None and self.global_rank == 0:
            first = next(k for k in range(len(names)) if names[k] != known[k])
            warnings.warn(
                f"Class {first} of the data is {names[first]!r}, but {known[first]!r} in the network. If the order of "
                "the classes differs, every prediction is wrong. Use data with the classes of the training.",
                stacklevel=2,
            )
        if known is None or self.trainer.state.fn == TrainerFn.FITTING:
            self.class_names = names

    def _checked(self, batch: Any) -> Batch:
        return as_batch(batch, type(self).__name__)

    def _check_labels(self, labels: Tensor) -> None:
        # On a GPU this would synchronise every step; data modules check their labels on loading.
        if labels.device.type != "cpu" or labels.ndim != 1 or len(labels) == 0:
            return
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise ValueError(
                f"A training batch holds the label {wrong}; labels must be in 0..{self.num_classes - 1}. Map the "
                "labels where they are loaded, or set num_classes to the number of classes."
            )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint self-describing: class, K, stage, head, training metrics of an unfinished epoch."""
        # summed over all ranks; Lightning calls this hook on every rank
        with self.train_state.sync_context():
            train_state = {
                name: torch.as_tensor(value).clone() for name, value in self.train_state.metric_state.items()
            }
        checkpoint[CHECKPOINT_KEY] = ModuleRecord(
            class_path=class_path_of(type(self)),
            num_classes=self.num_classes,
            stage=self.stage,
            head=self.head.spec,
            train_state=train_state,
            plain_loss=self.plain_loss,
            class_names=None if self.class_names is None else list(self.class_names),
            epoch_rows={name: [part.cpu() for part in rows_by_rank(rows)] for name, rows in self.epoch_rows().items()},
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the head for the checkpoint's weights; Lightning calls this before loading them."""
        record = module_record(checkpoint)
        if record["num_classes"] != self.num_classes:
            raise ValueError(
                f"The checkpoint was trained on {record['num_classes']} classes, but this module has "
                f"{self.num_classes}. Use the data that the checkpoint was trained on, or a module with as many "
                "classes."
            )
        names = record.get("class_names")
        self.class_names = self.class_names if names is None else tuple(names)
        self.stage = record["stage"]
        if record["head"] != self.head.spec:
            self.head = build_head(record["head"]).to(self.device)
        if record["class_path"] == class_path_of(type(self)):
            self.plain_loss = record.get("plain_loss", False)
        else:
            # The network of another method: load encoder, head and shared state, keep our own.
            state, network = checkpoint["state_dict"], ("encoder.", "head.")
            own = {name: value for name, value in self.state_dict().items() if not name.startswith(network)}
            wanted = {name: value for name, value in state.items() if name.startswith(network) or name in own}
            checkpoint["state_dict"] = own | wanted
        self.train_state.reset()
        kept = record["train_state"]
        if kept.keys() != self.train_state.metric_state.keys():
            warnings.warn(
                "The checkpoint holds the training metrics in another version's format: those of the current epoch are "
                "reset. Weights and everything else are unaffected.",
                stacklevel=2,
            )
        elif self.global_rank == 0:
            device = self.train_state.count.device
            self.train_state.merge_state({name: value.to(device) for name, value in kept.items()})
        if getattr(self, "_trainer", None) is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._check_switches(checkpoint)
        parts = record.get("epoch_rows", {})
        mine = {name: own_rows(rows, self.global_rank) for name, rows in parts.items()}
        if mine:
            self.restore_epoch_rows(mine)

    def _check_switches(self, checkpoint: dict[str, Any]) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
        have = {callback.state_key for callback in callbacks}
        for key, state in checkpoint.get("callbacks", {}).items():
            if key.startswith("StageSwitch[") and state["active"] and key not in have:
                raise ValueError(
                    f"The checkpoint is in a stage begun by a {state['class_path']}, but this trainer has no such "
                    "switch, so its optimiser would not fit. Resume with the switches of the training, or start a new "
                    "fit from load_module(path)."
                )

    def epoch_rows(self) -> dict[str, Tensor]:
        """Rows ``(n, ...)`` that this process has collected in the current epoch.

        A checkpoint stores those of all processes and `restore_epoch_rows` restores them, so a method that gathers data
        over an epoch can be resumed within it.
        """
        return {}

    def restore_epoch_rows(self, rows: dict[str, Tensor]) -> None:
        """Restore this process's rows of the current epoch, as returned by `epoch_rows`; on the CPU."""


def _process_dataloader(trainer: Trainer, loader: object) -> object:
    """The strategy's version of a loader; for our modules, of one that reports positions."""
    ours = isinstance(trainer.lightning_module, ClassificationModule)
    strategy = trainer.strategy
    return type(strategy).process_dataloader(strategy, with_positions(loader) if ours else loader)


def datamodule_in_use(trainer: Trainer) -> LightningDataModule | None:
    """Return the data module whose loaders the trainer is reading, ``None`` for plain loaders.

    ``trainer.datamodule`` is no substitute: it persists after a fit, even when other loaders are evaluated.
    """
    loops: dict[TrainerFn, Any] = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    loop = None if trainer.state.fn is None else loops.get(trainer.state.fn)
    source = None if loop is None else loop._data_source.instance
    return source if isinstance(source, LightningDataModule) else None


def label_distributions_of(data: LightningDataModule | None, name: str) -> Tensor | None:
    """Return the class distributions ``(N, K)`` of a set, such as annotators' votes; ``None`` if there are none.

    They come from the method ``label_distributions(name)`` of the data module; row i belongs to ``Batch.index`` i.
    """
    find: Any = getattr(data, "label_distributions", None)
    found: Tensor | None = None if find is None else find(name)
    if found is None:
        return None
    source_rows: Any = getattr(data, "source_rows", None)
    rows = len(found) if source_rows is None else len(source_rows(name))
    if found.ndim != 2 or len(found) != rows:
        raise ValueError(
            f"label_distributions({name!r}) has shape {tuple(found.shape)}; it must be ({rows}, K). Return one row per "
            "image of the set, in index order."
        )
    return found.float()


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: nothing in it is executed.

    Args:
        path: The file.
        map_location: Device of the tensors.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
        pickle.UnpicklingError: If it holds anything but tensors and plain data.
        RuntimeError: If it is damaged or incomplete.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    return AtomicCheckpointIO().load_checkpoint(path, map_location)  # type: ignore[arg-type]


def module_record(checkpoint: Mapping[str, Any]) -> ModuleRecord:
    """Return what a loaded checkpoint says about its module; reject other checkpoints."""
    record = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(record, dict) or not ModuleRecord.__required_keys__ <= set(record):
        raise ValueError(
            "This checkpoint does not name its calib_lightning module; only checkpoints of a ClassificationModule do. "
            "Load other weights with torch.load and load_state_dict, and those of your own modules that a StageSwitch "
            "has trained with load_stages."
        )
    return cast(ModuleRecord, record)


def load_module(path: str | Path, map_location: str | torch.device = "cpu") -> ClassificationModule:
    """Rebuild the trained module from a checkpoint: class, head and weights, in evaluation mode.

    The file is read with ``weights_only=True``: nothing in it is executed, and classes are only looked up in this
    package and in modules that are already imported.

    Args:
        path: A checkpoint written by any method of this package.
        map_location: Device of the tensors.

    Returns:
        The module in ``eval()`` mode.

    Raises:
        FileNotFoundError: If the file does not exist.
        pickle.UnpicklingError: If it holds anything but tensors and plain data.
        RuntimeError: If it is damaged or incomplete, or its weights do not fit the module that it describes.
        TypeError: If it describes a head with arguments that its class does not take.
        ValueError: If it was not written by a `ClassificationModule` or names an unknown class.

    Example:
        ``module = load_module("runs/digits-focal-0/checkpoints/best.ckpt")``
    """
    return module_of(load_checkpoint(path, map_location)).to(map_location)


def module_of(checkpoint: dict[str, Any]) -> ClassificationModule:
    """Rebuild the trained module, in ``eval()`` mode, from a loaded checkpoint; see `load_module`."""
    record = module_record(checkpoint)
    cls = find_class(record["class_path"], ClassificationModule)
    hyper_parameters = dict(checkpoint.get("hyper_parameters", {}))
    encoder = hyper_parameters.get("encoder")
    if isinstance(encoder, dict) and encoder.get("pretrained"):
        # the checkpoint provides the weights: download nothing
        hyper_parameters["encoder"] = {**encoder, "pretrained": False}
    module = cls(**_accepted(cls, rebuilt(hyper_parameters)))
    module.on_load_checkpoint(checkpoint)
    # A loss that does not remember how it was built is not rebuilt, so its state (class weights, say) is dropped. A
    # loss that a later stage has replaced keeps its initial state.
    losses, known = ("criterion.", "refinement_loss."), module.state_dict()
    state = {k: v for k, v in checkpoint["state_dict"].items() if k in known or not k.startswith(losses)}
    state |= {k: v for k, v in known.items() if k.startswith(losses) and k not in state}
    module.load_state_dict(state)
    return module.eval()


def _stored_arguments(frame: FrameType | None) -> dict[str, Any]:
    """The constructor's storable arguments as plain data, including those of base classes.

    Described objects are stored as specs if they were passed to the class itself; it recreates those of its bases.
    """
    assert frame is not None
    *bases, own = collect_init_args(frame, [], classes=(HyperparametersMixin,))
    given = {name: value for arguments in bases for name, value in arguments.items()}
    plain = {name: value for name, value in given.items() if not isinstance(value, Described | None)}
    arguments = {**plain, **own}
    data = {name: value for name, value in arguments.items() if is_data(value)}
    return data | {name: stored(value) for name, value in arguments.items() if storable(value)}


def _accepted(cls: type[ClassificationModule], hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """Keep only the constructor's arguments: base classes add theirs to the saved hyper-parameters."""
    parameters = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return hyper_parameters
    names = {p.name for p in parameters}
    return {key: value for key, value in hyper_parameters.items() if key in names}


def _is_unlabelled(name: str) -> bool:
    return name.startswith(UNLABELLED)


def _set_names(names: list[str] | None, count: int) -> list[str]:
    """Names of the evaluated sets, the prefixes of their metrics; plain loaders are numbered."""
    if names is None:
        names = ["test"] if count == 1 else [f"test/{i}" for i in range(count)]
    if len(names) != count:
        raise ValueError(
            f"The data module names {len(names)} sets ({', '.join(names)}); it must name as many as it has test "
            f"loaders ({count})."
        )
    return names
