"""RefCal: contrastive learning, then a calibrated linear classifier (Hebbalaguppe et al., 2026).

The losses of the first stage are in `parts.refcal_loss`. Here are its head, and the method.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from calib_lightning.core import ClassificationModule, Head, LinearHead, ModuleOptions
from calib_lightning.core.data_in_use import staged_data
from calib_lightning.core.stages import StageSwitch, StageTraining, own_switches
from calib_lightning.data.views import ContrastiveViews, ResizedCropFlip
from calib_lightning.functional import at_least_float32
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.methods.focal import FocalLoss
from calib_lightning.methods.mdca import MDCALoss
from calib_lightning.methods.parts.refcal_loss import SimCLRLoss as SimCLRLoss  # recorded runs name it by this module
from calib_lightning.methods.parts.refcal_loss import SupConLoss
from calib_lightning.types import Batch, Views


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
        **options: See `ClassificationModule`; they apply to the first stage. No batch transform. The authors' first
            stage is ``recipe/refcal`` with the configuration's SGD (lr 0.5, weight decay 1e-4) and
            ``WarmupCosine(epochs=1000)``: the defaults are those of the base, for runs of any length.

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
        data = staged_data(self.trainer)
        if self.stage == 0 and data is not None:
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
