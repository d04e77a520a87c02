"""A callback that ends the run as a scheduler would."""

import os
import signal

from lightning.pytorch import Callback


class Terminate(Callback):
    """Send SIGTERM to this process after a step.

    Args:
        step: Optimiser steps before the signal.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
