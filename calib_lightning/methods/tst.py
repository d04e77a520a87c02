"""Two-stage training, TST (Jordahn and Olmos, ICML 2024)."""

from __future__ import annotations

from typing import Unpack

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Adam

from calib_lightning.core import ClassificationModule, Head, ModuleOptions, StageSwitch, StageTraining
from calib_lightning.core.stages import own_switches
from calib_lightning.methods.cross_entropy import CrossEntropyLoss


def bottleneck(in_features: int, width: int) -> nn.Sequential:
    """Build the layers below the classifier of TST, ``Linear(d, 3 Z), ReLU, Linear(3 Z, Z)`` with Z = ``width``."""
    if width < 1:
        raise ValueError(f"width is {width}; it must be at least 1. The authors' code uses 128.")
    return nn.Sequential(nn.Linear(in_features, 3 * width), nn.ReLU(), nn.Linear(3 * width, width))


class TSTHead(Head):
    """Classifier of the second stage of TST, ``Linear(d, 3 Z), ReLU, Linear(3 Z, Z), Linear(Z, K)``.

    Args:
        in_features: d, the number of features.
        num_classes: K.
        width: Z.

    Raises:
        ValueError: If ``width`` is below 1.

    Example:
        >>> TSTHead(96, 10)(torch.zeros(2, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_features: int, num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.bottleneck = bottleneck(in_features, width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, d)``."""
        logits: Tensor = self.classifier(self.bottleneck(features))
        return logits


def checked_switch(module: ClassificationModule, switch: StageSwitch, head: type[Head]) -> StageSwitch:
    """Return the switch; raise a TypeError unless it is a `StageSwitch` that builds the method's ``head``."""
    method = type(module).__name__
    wanted = f"StageSwitch(-40, {head.__name__})"
    if not isinstance(switch, StageSwitch):
        raise TypeError(f"switch of {method} is {switch!r}; it must be an object such as {wanted}.")
    # without memory or random numbers: the weights are not used
    with torch.device("meta"):
        built = switch.new_head(module, module.head)
    if not isinstance(built, head):
        raise TypeError(
            f"switch of {method} builds a {type(built).__name__}; it must build a {head.__name__}. Use {wanted}, or "
            "TwoStage for another head."
        )
    return switch


class TST(ClassificationModule):
    """Two-stage training (Jordahn and Olmos, ICML 2024): cross-entropy, then a new head on the frozen encoder.

    Paper: Jordahn and Olmos 2024.
    Mechanism: a new three-layer head on the frozen encoder.
    Extra cost: none; the second stage only needs the encoder's forward pass and three small layers.

    Select the checkpoint of the second stage by ``val/nll``, like the authors.

    Args:
        num_classes: K; the command line takes it from the data.
        switch: When and how the second stage is trained. Default: 40 more epochs, a `TSTHead`, Adam with lr 1e-4,
            batches of 256; the first stage's loss, augmentation and batch transform.
        **options: See `ClassificationModule`; they apply to the first stage, which the authors train by ``recipe/tst``
            (Adam, lr 1e-4, 600 epochs): the defaults are those of the base.

    Attributes:
        switch: The switch to the second stage.

    Raises:
        TypeError: If ``switch`` is not a `StageSwitch` or builds another head.

    Deviations:
        In the authors' code the frozen encoder's BatchNorm stays in training mode, so its statistics drift; use
        ``StageTraining(frozen_bn="train")`` for that. Their training images are not shuffled and their validation
        images are augmented; here it is the opposite. The second stage starts from the last weights of the first; the
        paper's starts from those with the smallest validation loss: for that, train the first stage in a separate run
        and pass its selected checkpoint as ``StageSwitch(0, TSTHead, init_from=...)``.

    Example:
        >>> TST(10, encoder="digits_cnn").switch.at_epoch
        -40
    """

    def __init__(self, num_classes: int, switch: StageSwitch | None = None, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        if switch is None:
            training = StageTraining(lambda params: Adam(params, lr=1e-4), batch_size=256)
            switch = StageSwitch(-40, TSTHead, training)
        self.switch = checked_switch(self, switch, TSTHead)

    def configure_callbacks(self) -> list[Callback]:
        """Add the switch."""
        return own_switches(self, self.switch)
