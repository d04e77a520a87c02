"""What loggers are told about a run besides its values: its configuration, and at its end its files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from calib_lightning.callbacks.guarded import attempt, guarded
from calib_lightning.callbacks.logged_keys import is_core
from calib_lightning.callbacks.record import environment
from calib_lightning.callbacks.run_logger import RunLogger
from calib_lightning.callbacks.tensorboard_run import log_hparams
from calib_lightning.callbacks.wandb_run import define_metrics, log_files, log_predictions
from calib_lightning.core.twins import is_twin
from calib_lightning.metrics import CORE, families
from calib_lightning.utils.seeding import run_seed

_RECORD = ("config*.yaml", "run.json", "splits.npz")


class LogRun(Callback):
    """Gives the trainer's loggers the run's configuration and, at its end, Weights & Biases its files.

    Every logger gets the same hyper-parameters: method, data, network, seed, hash of the splits, optimiser, schedule,
    versions, git revision, and the whole configuration below ``config``. Weights & Biases also gets metric definitions,
    the predictions (a table of the test set, and the files), the chosen checkpoint, and the record of the run;
    TensorBoard the columns of its HPARAMS tab. The loggers are `guarded`: none of this can end a run.

    Loggers other than a ``CSVLogger`` get core values alone, see `logged_keys.is_core`, unless ``log_all`` is set.

    Args:
        folder: The run's folder, whose files become artifacts; without one only the checkpoint does.
        facts: What is known of the run, by short names that replace those read from module and data; ``config`` is the
            whole configuration.
        log_all: Whether all loggers get every value.
        log_limit: Mebibytes; an artifact above that is left out, and a note says so. 0 leaves out every artifact.

    Example:
        ``Trainer(logger=WandbLogger(), callbacks=[LogRun()]).fit(module, datamodule)``
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        facts: Mapping[str, Any] | None = None,
        log_all: bool = False,
        log_limit: float = 500.0,
    ) -> None:
        if not log_limit >= 0:
            raise ValueError(f"log_limit is {log_limit}; it must be at least 0, the mebibytes of the largest artifact.")
        self.folder = None if folder is None else Path(folder)
        self.facts, self.log_all, self.log_limit = dict(facts or {}), log_all, log_limit
        self._described = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Guard the loggers; tell Lightning not to log a part of what is logged here."""
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.of_epochs = stage == "fit"
            elif not is_twin(logger, CSVLogger):
                guarded(logger).core_only = not self.log_all  # type: ignore[attr-defined]
        for part in (pl_module, getattr(trainer, "datamodule", None)):
            if part is not None:
                part._log_hyperparams = False  # as of save_hyperparameters(logger=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the configuration, with the optimiser that was built, and define the metrics of training."""
        self._describe(trainer, pl_module)
        self._define(trainer, ["train", "val"], best=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do the same for ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._describe(trainer, pl_module)
            self._define(trainer, ["val"])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the configuration."""
        self._describe(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Define the metrics of the sets, whose names the module knows by now."""
        names: list[str] = list(getattr(pl_module, "test_sets", ["test"]))
        names += [family.name for family in families(names)]
        self._define(trainer, [name for name in names if self.log_all or is_core(f"{name}/ece")])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the configuration."""
        self._describe(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Weights & Biases the chosen checkpoint and the record of the run."""
        for logger in self._wandb(trainer):
            if not logger._log_model:  # else Lightning does
                attempt(logger, "log_artifact", partial(self._log_checkpoint, trainer, logger))
            attempt(logger, "log_artifact", partial(self._log_record, logger))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Weights & Biases the predictions of ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._log_evaluation(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Weights & Biases the predictions, and the record once more: now it has results."""
        self._log_evaluation(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Weights & Biases the predictions."""
        self._log_evaluation(trainer)

    def _describe(self, trainer: Trainer, module: LightningModule) -> None:
        if self._described or not trainer.is_global_zero:
            return
        self._described = True
        for logger in trainer.loggers:
            attempt(logger, "log_hyperparams", partial(self._log_facts, trainer, module, logger))

    def _log_facts(self, trainer: Trainer, module: LightningModule, logger: Logger) -> None:
        facts = _plain(facts_of(trainer, module) | self.facts)
        if is_twin(logger, TensorBoardLogger):
            sets = ("test", "calibration", "val")
            log_hparams(logger, facts, [f"{name}/{metric}" for name in sets for metric in CORE])
        else:
            logger.log_hyperparams(facts)

    def _define(self, trainer: Trainer, sets: list[str], best: bool = False) -> None:
        for logger in self._wandb(trainer):
            attempt(logger, "define_metric", partial(define_metrics, logger.experiment, sets, best))

    def _wandb(self, trainer: Trainer) -> list[WandbLogger]:
        found = [logger for logger in trainer.loggers if is_twin(logger, WandbLogger)]
        return found if trainer.is_global_zero else []

    def _log_evaluation(self, trainer: Trainer) -> None:
        for logger in self._wandb(trainer):
            attempt(logger, "log_artifact", partial(self._log_predictions, logger))
            attempt(logger, "log_table", partial(self._log_table, trainer, logger))
            attempt(logger, "log_artifact", partial(self._log_record, logger))

    def _log_checkpoint(self, trainer: Trainer, logger: WandbLogger) -> None:
        """The checkpoint that the run's record names, else that of the first checkpoint callback."""
        path = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
        if self.folder is not None and (self.folder / "run.json").is_file():
            named = json.loads((self.folder / "run.json").read_text()).get("checkpoint", {}).get("path")
            path = self.folder / named if named else path
        if path.is_file():
            log_files(logger.experiment, "model", {path.name: path}, self.log_limit)

    def _log_predictions(self, logger: WandbLogger) -> None:
        if self.folder is not None:
            root = self.folder / "predictions"
            files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.npz"))}
            log_files(logger.experiment, "predictions", files, self.log_limit)

    def _log_table(self, trainer: Trainer, logger: WandbLogger) -> None:
        if self.folder is not None:
            log_predictions(logger, self.folder / "predictions" / "test.npz", trainer.global_step)

    def _log_record(self, logger: WandbLogger) -> None:
        if self.folder is not None:
            found = [path for name in _RECORD for path in sorted(self.folder.glob(name))]
            log_files(logger.experiment, "run", {path.name: path for path in found}, self.log_limit)


def facts_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Say what a trainer is about to run, by short names.

    Args:
        trainer: The trainer, which has been set up.
        module: Its module.

    Returns:
        Plain values, and the hyper-parameters of module and data below ``config``.
    """
    data: Any = getattr(trainer, "datamodule", None)
    encoder = module.hparams.get("encoder")
    facts: dict[str, Any] = {
        "method": _spelled(type(module).__name__),
        "data": None if data is None else _spelled(type(data).__name__.removesuffix("DataModule")),
        "network": encoder.get("name") if isinstance(encoder, dict) else encoder,
        "splits": getattr(data, "splits_hash", None),
        "batch_size": getattr(data, "batch_size", None),
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "method_class": _path_of(module),
        "data_class": None if data is None else _path_of(data),
        "config": {"model": dict(module.hparams), "data": dict(getattr(data, "hparams", {}))},
    }
    if trainer.optimizers:
        settings = trainer.optimizers[0].defaults
        facts |= {"optimizer": type(trainer.optimizers[0]).__name__, "learning_rate": settings.get("lr")}
        facts |= {name: settings[name] for name in ("weight_decay", "momentum") if name in settings}
        schedules = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        facts["scheduler"] = schedules[0] if schedules else None
    return facts | environment(trainer) | {"seed": run_seed()}


def _plain(value: Any) -> Any:
    """What any logger can write; objects in their own words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _spelled(name: str) -> str:
    """The name of a class as configurations spell it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _path_of(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
