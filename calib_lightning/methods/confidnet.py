"""Learning the confidence of a trained classifier, ConfidNet (Corbiere et al., NeurIPS 2019)."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Adam

from calib_lightning.core import (
    CachedFeatures,
    ClassificationModule,
    Encoder,
    Head,
    LinearHead,
    ModuleOptions,
    StageSwitch,
    StageTraining,
    SwitchOptions,
    build_head,
)
from calib_lightning.core.stages import own_switches
from calib_lightning.functional import at_least_float32, checked_batch
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.types import Batch, Prediction


def tcp_loss(confidence: Tensor, logits: Tensor, labels: Tensor, *, error_weight: float = 1.0) -> Tensor:
    """Squared distance of a confidence from the true class probability, TCP (Corbiere et al., 2019).

    ``L = mean_n w_n (c_n - p_{n, y_n})^2`` with ``p = softmax(logits)``, ``w_n = error_weight`` where the prediction is
    wrong and 1 where it is right. No gradient flows through ``p``.

    Args:
        confidence: ``c``, ``(N,)`` in ``[0, 1]``.
        logits: ``(N, K)`` of the classifier.
        labels: ``(N,)`` int64, or soft targets ``(N, K)``: then the expected TCP ``sum_k t_nk p_nk``, and a prediction
            is right where it is the largest of the targets.
        error_weight: Weight of a misclassified row, above 0.

    Returns:
        Scalar, without unit.

    Raises:
        TypeError: If a dtype is wrong (see `calib_lightning.functional.checked_batch`).
        ValueError: If shapes do not fit, there is no row, or a label is outside ``0..K-1``.

    Example:
        >>> tcp_loss(torch.tensor([1.0]), torch.zeros(1, 2), torch.tensor([0])).item()
        0.25
    """
    logits, labels = checked_batch(logits.detach(), labels, soft=True)
    if confidence.shape != logits.shape[:1]:
        raise ValueError(
            f"The confidence has the shape {tuple(confidence.shape)}; it must be one number a row, ({len(logits)},)."
        )
    probs = logits.softmax(dim=-1)
    if labels.ndim == 2:
        target, winner = (labels * probs).sum(dim=-1), labels.argmax(dim=-1)
    else:
        target, winner = probs.gather(1, labels.unsqueeze(1)).squeeze(1), labels
    weight = torch.where(logits.argmax(dim=-1) == winner, 1.0, error_weight)
    return (weight * (at_least_float32(confidence) - target).square()).mean()


class ConfidenceHead(Head):
    """A trained classifier that stays as it is, and a branch that says how far to trust it.

    Logits are those of the classifier; the confidence is
    ``sigmoid(Linear(400, 1)(f(f(f(f(h))))))`` with ``f = relu(Linear(., 400))``.

    Args:
        in_features: d, the number of features.
        num_classes: K.
        classifier: The trained classifier. Default: a new `LinearHead`.
        width: Width of the layers of the branch.

    Raises:
        ValueError: If ``width`` is below 1.

    Example:
        >>> head = ConfidenceHead(96, 10)
        >>> head(torch.zeros(2, 96)).shape, head.confidence(torch.zeros(2, 96)).shape
        (torch.Size([2, 10]), torch.Size([2]))
    """

    def __init__(self, in_features: int, num_classes: int, classifier: Head | None = None, width: int = 400) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1 (400 in the paper).")
        self.classifier = LinearHead(in_features, num_classes) if classifier is None else classifier
        layers: list[nn.Module] = []
        for inputs in (in_features, width, width, width):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        self.branch = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``; those of evaluation, also in training."""
        if self.classifier.training:  # a stage puts all of its head into training mode
            self.classifier.eval()
        logits: Tensor = self.classifier(features)
        return logits

    def confidence(self, features: Tensor) -> Tensor:
        """Confidence ``(N,)`` in ``[0, 1]``, float32 or wider, of features ``(N, d)``."""
        return at_least_float32(self.branch(features)).sigmoid().squeeze(1)


def _adam(learning_rate: float) -> StageTraining:
    return StageTraining(lambda params: Adam(params, lr=learning_rate), batch_size=128)


def _checked_module(switch: StageSwitch, module: LightningModule) -> ConfidNet:
    if not isinstance(module, ConfidNet):
        raise TypeError(
            f"{type(switch).__name__} trains a branch with a loss of its own, which {type(module).__name__} does not "
            "have: give it to a ConfidNet."
        )
    return module


class ConfidenceSwitch(StageSwitch):
    """Keeps the classifier, frozen, and trains the branch of a `ConfidenceHead` (Corbiere et al., 2019).

    Args:
        at_epoch: First epoch of the stage; -T adds T epochs to the trainer's, for this stage.
        width: Width of the layers of the branch.
        **options: See `StageSwitch`; the default of ``training`` is Adam with lr 1e-4 and batches of 128.

    Raises:
        TypeError: Before training starts, if the module is no `ConfidNet`.
        ValueError: If ``width`` is below 1; before training starts, if ``init_from`` holds another classifier.

    Example:
        >>> ConfidenceSwitch(-200).at_epoch
        -200
    """

    def __init__(self, at_epoch: int, width: int = 400, **options: Unpack[SwitchOptions]) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; it must be at least 1 (400 in the paper).")
        if options.get("training") is None:
            options["training"] = _adam(1e-4)
        super().__init__(at_epoch, **options)
        self.width = width

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a start from a checkpoint that has no classifier for this module."""
        super().setup(trainer, pl_module, stage)
        starts = stage == "fit" and not self.active and trainer.ckpt_path is None
        if starts and self.init_from is not None and not self.head_loaded:
            raise ValueError(
                f"init_from is {self.init_from!r}, but the classifier in it does not fit that of this module, and the "
                "branch learns the confidence of a trained classifier: give the checkpoint of a linear classifier for "
                f"{_checked_module(self, pl_module).num_classes} classes."
            )

    def new_head(self, module: LightningModule, old: nn.Module) -> nn.Module:
        """Put the branch beside the classifier, with its weights."""
        if isinstance(old, ConfidenceHead):
            return old
        module = _checked_module(self, module)
        assert isinstance(old, Head)
        head = ConfidenceHead(module.encoder.num_features, module.num_classes, build_head(old.spec), self.width)
        head.classifier.load_state_dict(old.state_dict())
        return head

    def freeze(self, module: LightningModule, head: nn.Module) -> None:
        """Leave only the branch to be trained."""
        assert isinstance(head, ConfidenceHead)
        module.requires_grad_(False)
        head.branch.requires_grad_(True)


class ConfidenceTuning(StageSwitch):
    """Goes on with the branch and an encoder of its own, a copy of the frozen one (Corbiere et al., 2019).

    Args:
        at_epoch: First epoch of the stage, after that of the `ConfidenceSwitch`; -T adds T epochs to the run.
        **options: See `StageSwitch`; the default of ``training`` is Adam with lr 1e-7 and batches of 128.

    Raises:
        TypeError: Before training starts, if the module is no `ConfidNet`.
        ValueError: Before training starts, if it comes before the `ConfidenceSwitch`.

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
                f"at_epoch of ConfidenceTuning is {self.at_epoch}, before there is a branch to go on with: it must be "
                "later than that of the ConfidenceSwitch."
            )
        return old

    def freeze(self, module: LightningModule, head: nn.Module) -> None:
        """Give the branch its encoder, and leave the two to be trained; the statistics of BatchNorm stay."""
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
    Extra cost: none; in the second stage the forward pass and five small layers, in the third a copy of the encoder.

    The first stage is cross-entropy. In the second the encoder and the classifier are frozen, and a branch of five
    layers learns the probability that the classifier gives to the true class (`tcp_loss`, `ConfidenceHead`). The third,
    which is optional, goes on with a copy of the encoder for the branch (`ConfidenceTuning`). What the classifier
    predicts stays as it was after the first stage, bit for bit. The confidence of the branch takes the place of the
    largest softmax probability in all metrics of an evaluation that need one.

    Few training images are misclassified, so the probability of the true class is near 1 for most of them and the
    branch learns slowly. The command line takes the last checkpoint unless told otherwise (``val/correctness_auroc``,
    say): ``val/nll`` does not change after the first stage.

    Args:
        num_classes: K; the command line takes it from the data.
        error_weight: Weight of a misclassified row in the loss of the branch, above 0.
        switch: When and how the branch is trained. Default: 200 more epochs, Adam with lr 1e-4, batches of 128.
        tuning: When and how the branch and its copy of the encoder are trained. Default: never.
        **options: See `ClassificationModule`; they are those of the first stage. No batch transform.

    Attributes:
        switch: The switch to the second stage.
        tuning: The switch to the third stage, or ``None``.
        confidence_encoder: The encoder of the branch in the third stage, else ``None``: then it is that of the
            classifier.

    Raises:
        TypeError: If ``switch`` is no `ConfidenceSwitch` or ``tuning`` no `ConfidenceTuning`.
        ValueError: If ``error_weight`` is not above 0 and finite, there is a batch transform, or the training of a
            switch has a criterion, lets BatchNorm statistics go on, or stores features that the third stage is to
            change.

    Deviations:
        Dropout of the frozen network is off in all of its stages; the authors leave it on in the second, where the
        target is then a draw itself. Their second stage may last 500 epochs. With soft targets, which the paper does
        not have, the branch learns the expected probability of the true class. The training metrics are those of the
        classifier alone.

    Example:
        >>> module = ConfidNet(10, encoder="digits_cnn", tuning=ConfidenceTuning(-20))
        >>> module.switch.at_epoch, module.tuning.at_epoch
        (-200, -20)
    """

    select_on: ClassVar[str] = "last"
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
            raise ValueError(f"error_weight is {error_weight}; it must be above 0 and finite (1 in the paper).")
        if options.get("batch_transform") is not None:
            raise ValueError(
                "ConfidNet takes no batch_transform: the loss of its branch is no criterion on logits that a transform "
                "could mix. Train the classifier with the transform in a run of its own, and give its checkpoint as "
                "ConfidenceSwitch(0, init_from=...)."
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
        """Bring the switches."""
        return own_switches(self, self.switch, *(() if self.tuning is None else (self.tuning,)))

    def copy_encoder(self) -> None:
        """Give the branch an encoder of its own, equal to that of the classifier."""
        self.confidence_encoder = copy.deepcopy(self.encoder)

    def outputs(self, image: Tensor) -> Prediction:
        """Logits ``(N, K)`` of the classifier and, from the second stage on, the branch's confidence ``(N,)``."""
        if not isinstance(self.head, ConfidenceHead):
            return super().outputs(image)
        features = self.features(image)
        return Prediction(self.head(features), self.head.confidence(self._branch_features(image, features)))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss (scalar), from the second stage on that of the branch, and logits ``(N, K)`` of one batch."""
        if not isinstance(self.head, ConfidenceHead):
            return super().loss(batch)
        features = self.features(batch.image)
        logits = self.head(features)
        confidence = self.head.confidence(self._branch_features(batch.image, features))
        with torch.autocast(logits.device.type, enabled=False):
            return tcp_loss(confidence, logits, batch.label, error_weight=self.error_weight), logits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have an encoder of the branch if the checkpoint has one; before its weights arrive."""
        super().on_load_checkpoint(checkpoint)
        if any(name.startswith("confidence_encoder.") for name in checkpoint["state_dict"]):
            if self.confidence_encoder is None:
                self.copy_encoder()
        else:
            self.confidence_encoder = None

    def _branch_features(self, image: Tensor, features: Tensor) -> Tensor:
        """Features ``(N, d)`` for the branch, given those of the classifier."""
        if self.confidence_encoder is None:
            return features
        own: Tensor = self.confidence_encoder(image)
        return own


def _check_switch(name: str, switch: StageSwitch, wanted: type[StageSwitch]) -> None:
    if not isinstance(switch, wanted):
        raise TypeError(f"The {name} of ConfidNet is {switch!r}; it must be an object such as {wanted.__name__}(-20).")
    training = switch.training
    if training.criterion is not None:
        raise ValueError(
            f"The {name} of ConfidNet has the criterion {training.criterion!r}, but the branch has a loss of its own: "
            "leave the criterion out."
        )
    if training.frozen_bn != "eval":
        raise ValueError(
            f"frozen_bn of ConfidNet's {name} is {training.frozen_bn!r}, which would change what the classifier "
            "predicts: leave it at 'eval'."
        )
    if wanted is ConfidenceTuning and isinstance(training.views, CachedFeatures):
        raise ValueError(
            "The tuning of ConfidNet has CachedFeatures, but it changes the encoder of the branch, and with it the "
            "features: leave the cache to the switch."
        )
