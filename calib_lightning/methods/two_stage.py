"""Classifier re-training, the control for every two-stage comparison (Kang et al., ICLR 2020)."""

from __future__ import annotations

from typing import Unpack

from lightning.pytorch import Callback

from calib_lightning.core import ClassificationModule, ModuleOptions, StageSwitch
from calib_lightning.core.stages import own_switches
from calib_lightning.methods.cross_entropy import CrossEntropyLoss


class TwoStage(ClassificationModule):
    """Train with cross-entropy, then train a fresh linear classifier on the frozen encoder (Kang et al., ICLR 2020).

    Paper: Kang et al. 2020.
    Mechanism: a new linear head on the frozen encoder; the control for the staged methods.
    Extra cost: none; the second stage only needs the encoder's forward pass.

    A method with another head, loss or images in its second stage must gain more than this one gains from a second
    stage as such.

    Args:
        num_classes: K; the command line takes it from the data.
        switch: When and how the second stage is trained. Default: 40 more epochs, a linear head, SGD with lr 0.1,
            momentum 0.9 and weight decay 5e-4; the first stage's loss, images and batch transform.
        **options: See `ClassificationModule`; they apply to the first stage.

    Attributes:
        switch: The switch to the second stage.

    Raises:
        TypeError: If ``switch`` is not a `StageSwitch`.

    Deviations:
        The paper's classifier re-training (cRT) samples the classes uniformly in the second stage; here both stages
        see the same distribution.

    Example:
        >>> TwoStage(10, encoder="digits_cnn").switch.at_epoch
        -40
    """

    def __init__(self, num_classes: int, switch: StageSwitch | None = None, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        if switch is None:
            switch = StageSwitch(-40)
        if not isinstance(switch, StageSwitch):
            raise TypeError(f"switch of TwoStage is {switch!r}; it must be an object such as StageSwitch(-40).")
        self.switch = switch

    def configure_callbacks(self) -> list[Callback]:
        """Add the switch."""
        return own_switches(self, self.switch)
