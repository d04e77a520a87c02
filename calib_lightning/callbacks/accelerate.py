"""Faster training of the same network: memory format and compilation of the encoder."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from calib_lightning.core.submodules import submodule_of


class Accelerate(Callback):
    """Speeds up an encoder without changing its function: channels-last memory format, compilation.

    Convolutions in half precision are faster if the channels of a pixel are adjacent, on GPUs and on CPUs with matrix
    units. Parameters keep their names and shapes, so checkpoints are compatible with runs without this callback;
    results differ by rounding.

    Args:
        channels_last: Whether convolutions use the channels-last memory format.
        compile: Whether to compile the encoder with ``torch.compile``; the first steps then take minutes.
        encoder: Name of the submodule; ``""`` for the whole module.

    Raises:
        ValueError: At the start of a fit or an evaluation, if the module has no such submodule.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(precision="bf16-mixed", callbacks=[Accelerate()], logger=False)
    """

    def __init__(self, channels_last: bool = True, compile: bool = False, encoder: str = "encoder") -> None:
        self.channels_last, self.compile, self.encoder = channels_last, compile, encoder
        self._done: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the encoder, once."""
        encoder = submodule_of(pl_module, self.encoder, "encoder")
        if encoder is self._done:
            return
        if self.channels_last:
            encoder.to(memory_format=torch.channels_last)
        if self.compile:
            encoder.compile()
        self._done = encoder
