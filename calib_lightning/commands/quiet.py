"""What Lightning says in a run that helps nobody, and is left out.

Only what Lightning's own files say is looked at. Warnings of this package and whatever other modules say stay, even in
a quiet run, which leaves out the progress reports of this package as well. How a run was made is in ``run.json`` and
``config.yaml``.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning

_LIGHTNING = str(Path(lightning.__file__).parent)
_OURS = str(Path(__file__).parents[1])

_LOGGERS = (
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.distributed",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
"""Those that Lightning's messages go to; a filter of a logger does not see what its children log."""

_MESSAGES = re.compile(
    # advertisements for packages of the makers
    "💡 Tip"
    # the line of `run_line` says seed, device and number of processes
    r"|(\[rank: \d+\] )?Seed set to|(GPU|TPU|HPU) available|LOCAL_RANK: \d+ - CUDA_VISIBLE_DEVICES"
    r"|Initializing distributed|-+\ndistributed_backend"
    # the usual end of a training
    r"|`Trainer\.fit` stopped: `max_epochs="
    # how Lightning writes a checkpoint by default
    "|`weights_only` was not set, defaulting"
    # the table's title names the checkpoint
    "|Restoring states from|Loaded model weights from"
)

_WARNINGS = {
    # Lightning's use of torch, which no user can change
    "lightning.pytorch.utilities._pytree": r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # the loss of every 50th step is logged over the borders of epochs; what an epoch has is logged at its end
    "lightning.pytorch.loops.fit_loop": r"The number of training batches \(\d+\) is smaller than the logging interval",
    # a test keeps no checkpoints; only where nothing else is missing than the callbacks that kept those of the training
    "lightning.pytorch.trainer.call": r"Be aware .* the following callbacks: \[(\"RunCheckpoint\{[^\"]*\}\"(, )?)+\]",
    # values that are the same on every process; callbacks log them where one process may be alone in reading them, and
    # would then wait for the others for ever
    "lightning.pytorch.trainer.connectors.logger_connector.result": r"It is recommended to use `self\.log\("
    r"'(train/clipped|train/lambda|mac_cal/\w+)'",
    # a resumed run goes on in its own folder
    "lightning.pytorch.callbacks.model_checkpoint": r"Checkpoint directory .* exists and is not empty",
}
"""Beginnings of warnings by the module that gives them."""


class _Noise(logging.Filter):
    """Refuses what Lightning's files log if it is in the list; in a quiet run all that they and ours report."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return True
        if record.pathname.startswith(_LIGHTNING):
            return not self.quiet and _MESSAGES.match(record.getMessage()) is None
        # that a signal ends the run, and where it goes on, is the end of a quiet run, too
        progress = record.pathname.startswith(_OURS) and "requested: wrote" not in record.getMessage()
        return not (self.quiet and progress)


_noise = _Noise()


def _plainly(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning without the place in Lightning's files or ours, which is none of the user's."""
    if filename.startswith((_LIGHTNING, _OURS)):
        return f"calib: warning: {message}\n"
    return _before(message, category, filename, lineno, line)


_before = warnings.formatwarning


@contextmanager
def without_noise() -> Iterator[None]:
    """Leave out what is in the lists, until the context ends."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    with warnings.catch_warnings():
        for module, message in _WARNINGS.items():
            warnings.filterwarnings("ignore", message, module=re.escape(module) + "$")
        for logger in loggers:
            logger.addFilter(_noise)
        warnings.formatwarning = _plainly
        try:
            yield
        finally:
            warnings.formatwarning = _before
            _noise.quiet = False
            for logger in loggers:
                logger.removeFilter(_noise)


def be_quiet() -> None:
    """Leave out progress reports and all warnings of Lightning and torch, until the context of `without_noise` ends."""
    _noise.quiet = True
    warnings.filterwarnings("ignore", module=r"(lightning|torch)\.")
