"""Log figures of every evaluated set with the run's loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from calib_lightning.core import ClassificationModule
from calib_lightning.core.data_in_use import datamodule_in_use
from calib_lightning.metrics import EvaluationState, families, values_by_severity
from calib_lightning.plots import figures, log_figure, robustness_curves
from calib_lightning.plots.saving import takes_figures


def shows_figures(trainer: Trainer) -> bool:
    """Whether a logger of the trainer takes figures; the same on all processes, as drawing gathers their rows."""
    shown: bool = trainer.strategy.broadcast(not trainer.fast_dev_run and takes_figures(trainer.loggers))  # type: ignore[attr-defined]
    return shown


def title_of(trainer: Trainer, module: LightningModule, loaders: object, name: str) -> str:
    """Method, data and set, such as ``Focal, Digits, test``; without a data module the data are a data set's class."""
    data = type(datamodule_in_use(trainer)).__name__.removesuffix("DataModule")
    if data == "NoneType":
        first = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
        data = type(getattr(first, "dataset", first)).__name__
    return f"{type(module).__name__}, {data}, {name}"


class LogFigures(Callback):
    """Logs reliability diagram, confidence histogram and risk-coverage curve of each test set.

    Of corruptions in several severities it logs one curve of metrics over severity for all.

    Weights & Biases and TensorBoard show images; for a CSV logger, PNG files are written to its folder ``figures``.
    They are drawn from the metrics' state, without a second pass, and only where a logger takes them.

    Example:
        ``Trainer(callbacks=[LogFigures()]).test(module, datamodule)``
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and log the figures of every set."""
        if not isinstance(pl_module, ClassificationModule) or not shows_figures(trainer):
            return
        corrupted = {name for family in families(pl_module.test_sets) if family.severities for name in family.members}
        for name, state in zip(pl_module.test_sets, pl_module.test_states, strict=True):
            assert isinstance(state, EvaluationState)
            if state.count and name not in corrupted:  # unlabelled images of other classes have none
                title = title_of(trainer, pl_module, trainer.test_dataloaders, name)
                self._log(trainer, name, partial(figures, state, title=title))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and log the curves over the severities of corruptions, whose values are known by now."""
        values: dict[str, dict[str, float]] = getattr(pl_module, "test_values", {})
        for family in families(values):
            if len(family.severities) > 1 and trainer.is_global_zero and takes_figures(trainer.loggers):
                by_severity = values_by_severity(family, values)
                title = title_of(trainer, pl_module, trainer.test_dataloaders, family.name)
                rows = trainer.callback_metrics.get(f"{next(iter(family.members))}/n")
                self._log(trainer, family.name, partial(_curves, by_severity, title, rows))

    def _log(self, trainer: Trainer, name: str, draw: Callable[[], Mapping[str, Figure]]) -> None:
        try:
            drawn = draw()
        except Exception as error:  # a failed figure must not prevent the metrics that follow
            warnings.warn(f"no figures of {name}: {error}", stacklevel=2)
            return
        for kind, figure in drawn.items():
            log_figure(trainer.loggers, f"{name}/{kind}", figure, trainer.global_step)


def _curves(values: Mapping[int, Sequence[Mapping[str, float]]], title: str, rows: Tensor | None) -> dict[str, Figure]:
    return {"robustness": robustness_curves(values, title=title, rows=None if rows is None else int(rows))}
