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
from calib_lightning.core.batch_transform import attached
from calib_lightning.core.data_in_use import viewed_data
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
            letters use ``flip=False`` here and in the switch's views. A plain ``DataLoader`` needs a `ViewedDataset`
            and a switch without ``batch_size``; a data module from outside this package must return images
            ``(N, V, C, H, W)`` itself.
        switch: When and how the second stage is trained. Default, from the authors' example: 100 more epochs, a
            linear head, focal loss with gamma 2 and ten times the MDCA penalty, `ResizedCropFlip`, batches of 512, SGD
            with lr 5 (x 0.2 after 60, 75 and 90 epochs), momentum 0.9, no weight decay. Any criterion of this package
            may take the place of that loss, also `CRLLoss` and `AdaFocalLoss`, which learn within the stage.
        joint: Weight ``w`` of the contrastive loss in training by one stage; ``None`` means two stages. The linear
            classifier and the projection then share the features of both views, ``L = mean_v criterion(view v) + w
            contrast``, with the criterion of ``switch``, which does not take place.
        **options: See `ClassificationModule`; they apply to the first stage, except ``batch_transform``, which applies
            to the second (the authors' optional mixup). The authors' first stage is ``recipe/refcal`` with the
            configuration's SGD (lr 0.5, weight decay 1e-4) and ``WarmupCosine(epochs=1000)``: the defaults are those
            of the base, for runs of any length.

    Attributes:
        switch: The switch to the second stage; ``None`` if there is only one.

    Raises:
        TypeError: If ``refinement_loss``, ``views``, ``switch`` or the batch transform has the wrong type.
        ValueError: If ``projection`` is below 1, ``joint`` is not above 0, or ``joint`` comes with a batch transform.

    Deviations:
        The authors select the checkpoint by test accuracy; here it is selected on held-out images. Their code trains in
        two stages; ``joint`` is our reading of the abstract, which speaks of training end to end. In their code CRL and
        AdaFocal do not learn: its CRL is cross-entropy, its AdaFocal a focal loss with gamma 1.

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
        joint: float | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        transform = options.pop("batch_transform", None)
        if joint is not None and not 0 < joint < float("inf"):
            raise ValueError(f"joint is {joint}; it must be above 0 and finite, or None for two stages.")
        if joint is not None and transform is not None:
            raise ValueError(
                f"joint is {joint} and batch_transform is a {type(transform).__name__}, which would mix what is "
                "contrasted. Omit one of them."
            )
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        self.stage_transform = attached(transform, self)
        self.joint = joint
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
        if transform is not None and switch.training.criterion is None:
            raise ValueError(
                f"RefCal has a batch_transform ({type(transform).__name__}) for its second stage, whose training has "
                "no criterion for it to wrap. Give the switch's training one, such as CrossEntropyLoss()."
            )
        contrast = ProjectionHead(self.encoder.num_features, projection)
        self.switch = switch if joint is None else None
        if joint is None:
            self.head = contrast
        else:
            self.projection = contrast
            given = switch.training.criterion
            self.criterion = self.criterion if given is None else given
        self._no_validation = _NoValidation()

    def configure_callbacks(self) -> list[Callback]:
        """Add the switch, and disable validation in the first stage."""
        if self.switch is None:
            return []
        trainer: Any = getattr(self, "_trainer", None)
        there = () if trainer is None else trainer.callbacks
        return [*own_switches(self, self.switch), *(() if self._no_validation in there else (self._no_validation,))]

    @property
    def classifies(self) -> bool:
        """Whether there is a classifier: the first stage is over, or it is the only one."""
        return self.stage > 0 or self.joint is not None

    def setup(self, stage: str) -> None:
        """Request the views of the first stage from a data module of this package, or a `ViewedDataset`."""
        super().setup(stage)
        if stage == "fit":
            self._ask_for_views()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the head; a checkpoint may return to the first stage and its views."""
        super().on_load_checkpoint(checkpoint)
        if getattr(self, "_trainer", None) is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._ask_for_views()

    def _ask_for_views(self) -> None:
        data = viewed_data(self.trainer)
        if self.stage == 0 and data is not None:
            data.stage_views = self.views

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(N, K)`` of images ``(N, C, H, W)``.

        Raises:
            RuntimeError: In the first stage, which has no classifier.
        """
        if not self.classifies:
            raise RuntimeError(
                "This RefCal network has no classifier yet: it is in its first stage, contrastive learning. Train it "
                "through its switch; until then only module.features(image) can be used."
            )
        return super().forward(image)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and logits ``(N, K)`` of one batch; without a classifier embeddings ``(N, V, D)``.

        Raises:
            ValueError: In the first stage, if there are fewer than two rows or fewer than two views.
        """
        if self.stage > 0:
            return super().loss(batch)
        image = batch.image
        if image.ndim != 5 or image.shape[1] < 2:
            raise ValueError(
                f"The images have shape {tuple(image.shape)}; the first stage of RefCal needs two views of each, (N, "
                "2, C, H, W). Data modules of calib_lightning make them during a fit of the module; for a plain loader "
                "wrap the data set: DataLoader(ViewedDataset(dataset), ...). Of a data set that you divide, wrap each "
                "part, not the whole: ViewedDataset(part) after random_split."
            )
        if len(image) < 2:
            raise ValueError(
                f"A training batch has {len(image)} image; a contrastive loss needs at least two. Use larger batches, "
                "and drop a smaller last one (drop_last)."
            )
        features = self.features(image.flatten(0, 1))
        contrast = self.head if self.joint is None else self.projection
        embeddings = contrast(features).view(*image.shape[:2], -1)
        with torch.autocast(image.device.type, enabled=False):
            loss: Tensor = self.refinement_loss(embeddings, batch.label)
        if self.joint is None:
            return loss, embeddings
        logits = self.head(features).view(*image.shape[:2], -1).unbind(dim=1)
        classification = torch.stack([self.criterion_value(view, batch.label) for view in logits]).mean()
        return classification + self.joint * loss, logits[0]


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
