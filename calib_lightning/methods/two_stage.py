"""Retraining of the classifier alone, the control of every two-stage comparison (Kang et al., ICLR 2020)."""

from __future__ import annotations

from typing import Unpack

from lightning.pytorch import Callback

from calib_lightning.core import ClassificationModule, ModuleOptions, StageSwitch
from calib_lightning.core.stages import own_switches
from calib_lightning.methods.cross_entropy import CrossEntropyLoss


class TwoStage(ClassificationModule):
    """Train with cross-entropy, then train a fresh linear classifier on the frozen encoder (Kang et al., ICLR 2020).

    Paper: Kang et al. 2020.
    Mechanism: a new linear head on the frozen encoder; the control of the staged methods.
    Extra cost: none; in the second stage only the forward pass through the encoder.

    Whatever a method with a new head, another loss or other images gains in its second stage has to be more than this
    one gains from a second stage as such.

    Args:
        num_classes: K; the command line takes it from the data.
        switch: When and how the second stage is trained. Default: 40 more epochs, a linear head, SGD with lr 0.1,
            momentum 0.9 and weight decay 5e-4; loss, images and batch transform of the first stage.
        **options: See `ClassificationModule`; they are those of the first stage.

    Attributes:
        switch: The switch to the second stage.

    Raises:
        TypeError: If ``switch`` is no `StageSwitch`.

    Deviations:
        The paper's classifier re-training (cRT) draws the images of the second stage evenly from all classes; here they
        are drawn as in the first stage, so that the two stages see the same distribution.

    Example:
        >>> TwoStage(10, encoder="digits_cnn").switch.at_epoch
        -40
    """

    def __init__(self, num_classes: int, switch: StageSwitch | None = None, **options: Unpack[ModuleOptions]) -> None:
        super().__init__(num_classes, criterion=CrossEntropyLoss(), **options)
        if switch is None:
            switch = StageSwitch(-40)
        if not isinstance(switch, StageSwitch):
            raise TypeError(f"The switch of TwoStage is {switch!r}; it must be an object such as StageSwitch(-40).")
        self.switch = switch

    def configure_callbacks(self) -> list[Callback]:
        """Bring the switch."""
        return own_switches(self, self.switch)
