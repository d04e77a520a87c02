"""Callbacks that end the run as a scheduler or a user would."""

import os
import signal
import time

from lightning.pytorch import Callback, Trainer


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


class SignalIn(Callback):
    """Send a signal to this process in the first call of a hook.

    Args:
        hook: Name of the hook.
        signum: Name of the signal.
        again: Seconds after which it is sent once more.
        rank: The process that it is sent to; each one by default.
    """

    def __init__(self, hook: str, signum: str = "SIGTERM", again: float | None = None, rank: int | None = None) -> None:
        self.signum, self.again, self.sent = signal.Signals[signum], again, False
        self.rank = rank
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *_: object, **__: object) -> None:
        if self.sent or self.rank not in (None, trainer.global_rank):
            return
        self.sent = True
        os.kill(os.getpid(), self.signum)
        if self.again is not None:
            time.sleep(self.again)
            os.kill(os.getpid(), self.signum)
