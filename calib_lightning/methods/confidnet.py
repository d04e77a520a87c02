"""Learning the confidence of a trained classifier, ConfidNet (Corbiere et al., NeurIPS 2019).

The branch that learns it, and its loss, are in `parts.confidnet_branch`. Here are the two stages, and the method.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Adam

from calib_lightning.core import (
    ClassificationModule,
    Encoder,
    Head,
    ModuleOptions,
    StageSwitch,
    StageTraining,
    SwitchOptions,
    build_head,
)
from calib_lightning.core.stages import own_switches
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.methods.parts.confidnet_branch import ConfidenceHead, tcp_loss
from calib_lightning.types import Batch, Prediction


def _adam(learning_rate: float) -> StageTraining:
    return StageTraining(lambda params: Adam(params, lr=learning_rate), batch_size=128)


def _checked_module(switch: StageSwitch, module: LightningModule) -> ConfidNet:
    if not isinstance(module, ConfidNet):
        raise TypeError(
            f"The module is a {type(module).__name__}; {type(switch).__name__} only works with ConfidNet, which has "
            "the loss of the branch."
        )
    return module


class ConfidenceSwitch(StageSwitch):
    """Freezes the classifier and trains the branch of a `ConfidenceHead` (Corbiere et al., 2019).

    Args:
        at_epoch: First epoch of the stage; -T appends a stage of T epochs.
        width: Width of the branch's layers.
        **options: See `StageSwitch`; the default of ``training`` is Adam with lr 1e-4 and batches of 128.

    Raises:
        TypeError: Before training starts, if the module is not a `ConfidNet`.
        ValueError: If ``width`` is below 1; before training starts, if ``init_from`` holds another classifier.

    Example:
        >>> ConfidenceSwitch(-200).at_epoch
        -200
    """

    def __init__(self, at_epoch: int, width: int = 400, **options: Unpack[SwitchOptions]) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1. The paper uses 400.")
        if options.get("training") is None:
            options["training"] = _adam(1e-4)
        super().__init__(at_epoch, **options)
        self.width = width

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reject an ``init_from`` whose classifier does not fit this module."""
        super().setup(trainer, pl_module, stage)
        starts = stage == "fit" and not self.active and trainer.ckpt_path is None
        if starts and self.init_from is not None and not self.head_loaded:
            raise ValueError(
                f"init_from is {self.init_from!r}, whose classifier does not fit this module, but the branch learns "
                "the confidence of a trained classifier. Use the checkpoint of a linear classifier for "
                f"{_checked_module(self, pl_module).num_classes} classes."
            )

    def new_head(self, module: LightningModule, old: nn.Module) -> nn.Module:
        """Add the branch to the trained classifier."""
        if isinstance(old, ConfidenceHead):
            return old
        module = _checked_module(self, module)
        assert isinstance(old, Head)
        head = ConfidenceHead(module.encoder.num_features, module.num_classes, build_head(old.spec), self.width)
        head.classifier.load_state_dict(old.state_dict())
        return head

    def freeze(self, module: LightningModule, head: nn.Module) -> None:
        """Train only the branch."""
        assert isinstance(head, ConfidenceHead)
        module.requires_grad_(False)
        head.branch.requires_grad_(True)


class ConfidenceTuning(StageSwitch):
    """Continues training the branch with a copy of the frozen encoder (Corbiere et al., 2019).

    Args:
        at_epoch: First epoch of the stage, after that of the `ConfidenceSwitch`; -T appends a stage of T epochs.
        **options: See `StageSwitch`; the default of ``training`` is Adam with lr 1e-7 and batches of 128.

    Raises:
        TypeError: Before training starts, if the module is not a `ConfidNet`.
        ValueError: Before training starts, if it precedes the `ConfidenceSwitch`.

    Example:
        >>> ConfidenceTuning(-20).at_epoch
        -20
    """

    def __init__(self, at_epoch: int, **options: Unpack[SwitchOptions]) -> None:
        if options.get("training") is None:
            options["training"] = _adam(1e-7)
        super().__init__(at_epoch, **options)

    def new_head(self, module: LightningModule, old: nn.Module) -> nn.Module:
        """Keep the head."""
        _checked_module(self, module)
        if not isinstance(old, ConfidenceHead):
            raise ValueError(
                f"at_epoch of ConfidenceTuning is {self.at_epoch}; it must be later than that of the ConfidenceSwitch, "
                "which creates the branch."
            )
        return old

    def freeze(self, module: LightningModule, head: nn.Module) -> None:
        """Copy the encoder for the branch and train both; BatchNorm statistics stay fixed."""
        assert isinstance(head, ConfidenceHead)
        module = _checked_module(self, module)
        if module.confidence_encoder is None:
            module.copy_encoder()
        module.requires_grad_(False)
        head.branch.requires_grad_(True)
        assert module.confidence_encoder is not None
        module.confidence_encoder.requires_grad_(True)


class ConfidNet(ClassificationModule):
    """Learn how far to trust a trained classifier, ConfidNet (Corbiere et al., NeurIPS 2019).

    Paper: Corbiere et al. 2019.
    Mechanism: a branch on the frozen encoder learns the probability of the true class.
    Extra cost: none; stage 2 only needs the forward pass and five small layers, stage 3 a copy of the encoder.

    The first stage is cross-entropy. In the second the encoder and the classifier are frozen, and a branch of five
    layers learns the probability that the classifier assigns to the true class (`tcp_loss`, `ConfidenceHead`). The
    optional third stage continues with a copy of the encoder for the branch (`ConfidenceTuning`). The classifier's
    predictions stay bit-identical after the first stage. The confidence of the branch replaces the largest softmax
    probability in all evaluation metrics that need a confidence.

    Few training images are misclassified, so the probability of the true class is near 1 for most of them and the
    branch learns slowly. The command line selects the last checkpoint by default (``val/correctness_auroc`` is an
    alternative): ``val/nll`` does not change after the first stage.

    Args:
        num_classes: K; the command line takes it from the data.
        error_weight: Weight of a misclassified row in the loss of the branch, above 0.
        switch: When and how the branch is trained. Default: 200 more epochs, Adam with lr 1e-4, batches of 128.
        tuning: When and how the branch and its copy of the encoder are trained. Default: never.
        **options: See `ClassificationModule`; they apply to the first stage. No batch transform.

    Attributes:
        switch: The switch to the second stage.
        tuning: The switch to the third stage, or ``None``.
        confidence_encoder: The branch's encoder in the third stage; ``None`` if it shares the classifier's.

    Raises:
        TypeError: If ``switch`` is not a `ConfidenceSwitch` or ``tuning`` is not a `ConfidenceTuning`.
        ValueError: If ``error_weight`` is not above 0 and finite, there is a batch transform, or the training of a
            switch has a criterion, updates BatchNorm statistics, or stores features that the third stage changes.

    Deviations:
        Dropout of the frozen network is always off; the authors leave it on in the second stage, which makes the target
        random. Their second stage may last 500 epochs. With soft targets, which the paper does not consider, the branch
        learns the expected probability of the true class. Training metrics only describe the classifier.

    Example:
        >>> module = ConfidNet(10, encoder="digits_cnn", tuning=ConfidenceTuning(-20))
        >>> module.switch.at_epoch, module.tuning.at_epoch
        (-200, -20)
    """

    select_on: str = "last"
    confidence_encoder: Encoder | None

    def __init__(
        self,
        num_classes: int,
        error_weight: float = 1.0,
        switch: ConfidenceSwitch | None = None,
        tuning: ConfidenceTuning | None = None,
        **options: Unpack[ModuleOptions],
    ) -> None:
        if not 0 < error_weight < math.inf:
            raise ValueError(f"error_weight is {error_weight}; it must be above 0 and finite. The paper uses 1.")
        if options.get("batch_transform") is not None:
            raise ValueError(
                "ConfidNet does not support batch_transform: the loss of its branch is not a criterion on logits that "
                "a transform could mix. Train the classifier with the transform in a separate run, and pass its "
                "checkpoint as ConfidenceSwitch(0, init_from=...)."
            )
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        self.error_weight = error_weight
        self.switch = ConfidenceSwitch(-200) if switch is None else switch
        self.tuning = tuning
        self.confidence_encoder = None
        for name, given, wanted in (("switch", self.switch, ConfidenceSwitch), ("tuning", tuning, ConfidenceTuning)):
            if given is not None:
                _check_switch(name, given, wanted)

    def configure_callbacks(self) -> list[Callback]:
        """Add the switches."""
        return own_switches(self, self.switch, *(() if self.tuning is None else (self.tuning,)))

    def copy_encoder(self) -> None:
        """Give the branch a copy of the classifier's encoder."""
        self.confidence_encoder = copy.deepcopy(self.encoder)

    def outputs(self, image: Tensor) -> Prediction:
        """Logits ``(N, K)`` of the classifier and, from the second stage on, the branch's confidence ``(N,)``."""
        if not isinstance(self.head, ConfidenceHead):
            return super().outputs(image)
        features = self.features(image)
        return Prediction(self.head(features), self.head.confidence(self._branch_features(image, features)))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar) and logits ``(N, K)`` of one batch; from the second stage on, the branch's loss."""
        if not isinstance(self.head, ConfidenceHead):
            return super().loss(batch)
        features = self.features(batch.image)
        logits = self.head(features)
        confidence = self.head.confidence(self._branch_features(batch.image, features))
        with torch.autocast(logits.device.type, enabled=False):
            return tcp_loss(confidence, logits, batch.label, error_weight=self.error_weight), logits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Create the branch's encoder if the checkpoint has one, before the weights are loaded."""
        super().on_load_checkpoint(checkpoint)
        if any(name.startswith("confidence_encoder.") for name in checkpoint["state_dict"]):
            if self.confidence_encoder is None:
                self.copy_encoder()
        else:
            self.confidence_encoder = None

    def _branch_features(self, image: Tensor, features: Tensor) -> Tensor:
        """Features ``(N, d)`` for the branch; ``features`` are the classifier's."""
        if self.confidence_encoder is None:
            return features
        own: Tensor = self.confidence_encoder(image)
        return own


def _check_switch(name: str, switch: StageSwitch, wanted: type[StageSwitch]) -> None:
    if not isinstance(switch, wanted):
        raise TypeError(f"{name} of ConfidNet is {switch!r}; it must be an object such as {wanted.__name__}(-20).")
    training = switch.training
    if training.criterion is not None:
        raise ValueError(
            f"The {name} of ConfidNet has the criterion {training.criterion!r}; it must have none, because the branch "
            "has its own loss. Omit the criterion."
        )
    if training.frozen_bn != "eval":
        raise ValueError(
            f"frozen_bn of ConfidNet's {name} is {training.frozen_bn!r}; it must be 'eval', or the classifier's "
            "predictions would change."
        )
    if wanted is ConfidenceTuning and training.views is not None and training.views.stores_features:
        raise ValueError(
            "The tuning of ConfidNet is incompatible with CachedFeatures, because it changes the encoder of the "
            "branch. Use the cache in the switch only."
        )
