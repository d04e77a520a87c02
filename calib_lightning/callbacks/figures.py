"""Figures of every evaluated set, given to the loggers of the run."""

from __future__ import annotations

import warnings

from lightning.pytorch import Callback, LightningModule, Trainer

from calib_lightning.core import ClassificationModule
from calib_lightning.metrics import EvaluationState
from calib_lightning.plots import figures, log_figure


class LogFigures(Callback):
    """Gives reliability diagram, confidence histogram and risk-coverage curve of each test set to the active loggers.

    Weights & Biases and TensorBoard show them as images; a CSV logger gets PNG files in its folder ``figures``. They
    are drawn from the state of the metrics, so they cost no second pass.

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
                continue  # images of other classes, which have no labels
            try:
                drawn = figures(state, title=name)
            except Exception as error:  # the figures of metrics come after this; a picture must not cost them
                warnings.warn(f"no figures of {name}: {error}", stacklevel=2)
                continue
            for kind, figure in drawn.items():
                log_figure(trainer.loggers, f"{name}/{kind}", figure, trainer.global_step)
