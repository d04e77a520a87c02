"""Log figures of every evaluated set with the run's loggers."""

from __future__ import annotations

import warnings

from lightning.pytorch import Callback, LightningModule, Trainer

from calib_lightning.core import ClassificationModule
from calib_lightning.metrics import EvaluationState
from calib_lightning.plots import figures, log_figure


class LogFigures(Callback):
    """Logs reliability diagram, confidence histogram and risk-coverage curve of each test set.

    Weights & Biases and TensorBoard show images; for a CSV logger, PNG files are written to its folder ``figures``.
    They are drawn from the metrics' state, without a second pass.

    Example:
        ``Trainer(callbacks=[LogFigures()]).test(module, datamodule)``
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and log the figures of every set."""
        if not isinstance(pl_module, ClassificationModule):
            return
        for name, state in zip(pl_module.test_sets, pl_module.test_states, strict=True):
            assert isinstance(state, EvaluationState)
            if not state.count:
                continue  # unlabelled images of other classes
            try:
                drawn = figures(state, title=name)
            except Exception as error:  # a failed figure must not prevent the metrics that follow
                warnings.warn(f"no figures of {name}: {error}", stacklevel=2)
                continue
            for kind, figure in drawn.items():
                log_figure(trainer.loggers, f"{name}/{kind}", figure, trainer.global_step)
