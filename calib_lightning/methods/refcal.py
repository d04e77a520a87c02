"""RefCal: contrastive learning, then a calibrated linear classifier (Hebbalaguppe et al., 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from calib_lightning.core import ClassificationModule, Head, LinearHead, ModuleOptions
from calib_lightning.core.distributed import rows_by_rank, world_size
from calib_lightning.core.module import datamodule_in_use
from calib_lightning.core.stages import StageSwitch, StageTraining, own_switches
from calib_lightning.data.views import ContrastiveViews, ResizedCropFlip
from calib_lightning.functional import at_least_float32
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.methods.focal import FocalLoss
from calib_lightning.methods.mdca import MDCALoss
from calib_lightning.types import Batch, Views
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


class ProjectionHead(Head):
    """Embedding for contrastive learning, ``Linear(d, d), ReLU, Linear(d, D)``, normalised to length 1.

    Args:
        in_features: d, the number of features.
        width: D.

    Raises:
        ValueError: If ``width`` is below 1.

    Example:
        >>> ProjectionHead(96)(torch.ones(2, 96)).shape
        torch.Size([2, 128])
    """

    def __init__(self, in_features: int, width: int = 128) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width of the projection is {width}; it must be at least 1. The paper uses 128.")
        self.layers = nn.Sequential(nn.Linear(in_features, in_features), nn.ReLU(), nn.Linear(in_features, width))

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of features ``(N, d)``, in float32 or wider."""
        return F.normalize(at_least_float32(self.layers(features)), dim=-1)


class RefCal(ClassificationModule):
    """Contrastive learning with labels, then a calibrated linear classifier on the frozen encoder (RefCal, 2026).

    Paper: Hebbalaguppe et al. 2026; Khosla et al. 2020.
    Mechanism: pulls two views of each image towards those of its class; then a linear head on the frozen encoder.
    Extra cost: 2 x the forward and backward passes; the second stage only needs the encoder's forward pass.

    In the first stage the module has a `ProjectionHead` and no classifier: the only metric is ``train/loss``, there is
    no validation, and evaluating such a network is an error. After the switch it behaves like any other method. The
    paper's tables report ``ovo_auroc`` as refinement; ``correctness_auroc`` measures how well confidence separates
    correct from wrong predictions. Reports have both.

    Args:
        num_classes: K; the command line takes it from the data.
        projection: D, size of an embedding.
        refinement_loss: Loss of the first stage: maps ``(embeddings (N, V, D) of length 1, labels (N,))`` to a scalar.
            Default: `SupConLoss`; `SimCLRLoss` ignores labels. Checkpoints do not store it.
        views: Views of the training images in the first stage. Default: `ContrastiveViews`; for digits and
            letters use ``flip=False`` here and in the switch's views. A data module from outside this package must
            return images ``(N, V, C, H, W)`` itself.
        switch: When and how the second stage is trained. Default, from the authors' example: 100 more epochs, a
            linear head, focal loss with gamma 2 and ten times the MDCA penalty, `ResizedCropFlip`, batches of 512, SGD
            with lr 5 (x 0.2 after 60, 75 and 90 epochs), momentum 0.9, no weight decay.
        **options: See `ClassificationModule`; they apply to the first stage. No batch transform.

    Attributes:
        switch: The switch to the second stage.

    Raises:
        TypeError: If ``refinement_loss``, ``views`` or ``switch`` has the wrong type.
        ValueError: If ``projection`` is below 1 or a batch transform is given.

    Deviations:
        The authors select the checkpoint by test accuracy; here it is selected on held-out images.

    Example:
        >>> RefCal(10, encoder="digits_cnn").switch.at_epoch
        -100
    """

    def __init__(
        self,
        num_classes: int,
        projection: int = 128,
        refinement_loss: nn.Module | None = None,
        views: Views | None = None,
        switch: StageSwitch | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        transform = options.get("batch_transform")
        if transform is not None:
            raise ValueError(
                f"RefCal does not support batch_transform ({type(transform).__name__}): its first stage has neither "
                "logits nor a criterion to wrap. Use it with a method such as CrossEntropy or Focal."
            )
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        self.head = ProjectionHead(self.encoder.num_features, projection)
        self.refinement_loss = SupConLoss() if refinement_loss is None else refinement_loss
        self.views = ContrastiveViews() if views is None else views
        if switch is None:
            training = StageTraining(
                lambda params: SGD(params, lr=5.0, momentum=0.9),
                lambda optimizer: MultiStepLR(optimizer, [60, 75, 90], gamma=0.2),
                criterion=MDCALoss(FocalLoss(2.0), strength=10.0),
                views=ResizedCropFlip(),
                batch_size=512,
            )
            switch = StageSwitch(-100, LinearHead, training)
        for name, value, kind, example in (
            ("refinement_loss", self.refinement_loss, nn.Module, "SupConLoss()"),
            ("views", self.views, Views, "ContrastiveViews()"),
            ("switch", switch, StageSwitch, "StageSwitch(-100)"),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} of RefCal is {value!r}; it must be an object such as {example}.")
        self.switch = switch
        self._no_validation = _NoValidation()

    def configure_callbacks(self) -> list[Callback]:
        """Add the switch, and disable validation in the first stage."""
        trainer: Any = getattr(self, "_trainer", None)
        there = () if trainer is None else trainer.callbacks
        return [*own_switches(self, self.switch), *(() if self._no_validation in there else (self._no_validation,))]

    @property
    def classifies(self) -> bool:
        """Whether the first stage is over."""
        return self.stage > 0

    def setup(self, stage: str) -> None:
        """Request the views of the first stage from a data module of this package."""
        super().setup(stage)
        if stage == "fit":
            self._ask_for_views()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the head; a checkpoint may return to the first stage and its views."""
        super().on_load_checkpoint(checkpoint)
        if getattr(self, "_trainer", None) is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._ask_for_views()

    def _ask_for_views(self) -> None:
        data: Any = datamodule_in_use(self.trainer)
        if self.stage == 0 and hasattr(data, "stage_views"):
            data.stage_views = self.views

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``.

        Raises:
            RuntimeError: In the first stage, which has no classifier.
        """
        if self.stage == 0:
            raise RuntimeError(
                "This RefCal network has no classifier yet: it is in its first stage, contrastive learning. Train it "
                "through its switch; until then only module.features(image) can be used."
            )
        return super().forward(image)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and logits ``(N, K)`` of one batch; in the first stage embeddings ``(N, V, D)``.

        Raises:
            ValueError: In the first stage, if there are fewer than two rows or fewer than two views.
        """
        if self.stage > 0:
            return super().loss(batch)
        image = batch.image
        if image.ndim != 5 or image.shape[1] < 2:
            raise ValueError(
                f"The images have shape {tuple(image.shape)}; the first stage of RefCal needs two views of each, (N, "
                "2, C, H, W). Data modules of calib_lightning make them during a fit of the module; your own data set "
                "must return (2, C, H, W)."
            )
        if len(image) < 2:
            raise ValueError(
                f"A training batch has {len(image)} image; a contrastive loss needs at least two. Use larger batches, "
                "and drop a smaller last one (drop_last)."
            )
        embeddings = self.head(self.features(image.flatten(0, 1))).view(*image.shape[:2], -1)
        with torch.autocast(image.device.type, enabled=False):
            return self.refinement_loss(embeddings, batch.label), embeddings

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step: loss and log; training metrics once there is a classifier."""
        if self.stage > 0:
            return super().training_step(batch, batch_idx)
        batch = self._checked(batch)
        self._check_labels(batch.label)
        loss, _ = self.loss(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch.label))
        return loss

    def on_train_epoch_end(self) -> None:
        """Compute and log the epoch's training metrics, once there is a classifier."""
        if self.stage > 0:
            super().on_train_epoch_end()


class _NoValidation(Callback):
    """Skips validation while there is no classifier: callbacks would miss the metric that they monitor."""

    def __init__(self) -> None:
        self._limit: int | float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RefCal)
        if pl_module.stage == 0:
            self._limit, trainer.limit_val_batches = trainer.limit_val_batches, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RefCal)
        if pl_module.stage > 0:
            self._give_back(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._give_back(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_back(trainer)

    def _give_back(self, trainer: Trainer) -> None:
        if self._limit is not None:
            trainer.limit_val_batches, self._limit = self._limit, None
