"""``calib fit`` up to its first step: what a command line means, and whether the run is possible."""

from __future__ import annotations

import io
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from tempfile import TemporaryDirectory
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from calib_lightning.benchmark.plan import Checked
from calib_lightning.commands.fit import CalibCLI
from calib_lightning.commands.fit_checks import check_validation
from calib_lightning.commands.fit_folder import names_of
from calib_lightning.commands.hints import plain_message
from calib_lightning.commands.running import FAULTS, find_own_modules
from calib_lightning.core.data_facts import has_test, has_validation
from calib_lightning.data import BenchmarkDataModule
from calib_lightning.utils.config_search import resolve_configs
from calib_lightning.utils.stopping import Stopped

_ON_ANY_MACHINE = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": None,
    "logger": False,
    "plugins": None,
    "profiler": None,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a trainer that only checks: where the runs will be may not be here."""


class _EndOfChecksError(BaseException):
    """Everything is built and checked, and nothing trained yet."""


class _StopBeforeTraining(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise _EndOfChecksError


class _CheckedFit(CalibCLI):
    """A fit that ends before its first step and writes nothing."""

    def __init__(self, argv: list[str], seen: dict[str, LightningDataModule]) -> None:
        self._seen = seen
        with TemporaryDirectory() as folder:
            self._folder = folder
            super().__init__(argv)

    def before_instantiate_classes(self) -> None:
        """Check what needs no data; look for no pretrained weights and start no logger."""
        config = self._command_config()
        self._check_asked(config)
        self.config_text = self._dumped()
        config.trainer.logger = None
        encoder = config.model.get("init_args.encoder")
        if isinstance(encoder, dict) and encoder.get("pretrained"):
            encoder["pretrained"] = False

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build a trainer that any machine has."""
        config = self._get(self.config_init, "trainer")
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        self.datamodule = self._seen.setdefault(str(self._command_config().data), self.datamodule)
        self.validates = has_validation(self.datamodule)
        callbacks = [*(callback for callback in given if callback is not None), _StopBeforeTraining()]
        kwargs |= _ON_ANY_MACHINE | {"callbacks": callbacks, "default_root_dir": self._folder}
        return LightningCLI.instantiate_trainer(self, **kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        self._ready_data()
        check_validation(self._command_config().select_on, self.validates)
        with suppress(_EndOfChecksError):
            self.trainer.fit(self.model, datamodule=self.datamodule)
        self.tested = self._command_config().test_after_fit and has_test(self.datamodule)


class FitChecker:
    """Checks command lines of ``calib fit``; data that several have in common is read once."""

    def __init__(self) -> None:
        self._seen: dict[str, LightningDataModule] = {}
        find_own_modules()

    def __call__(self, arguments: list[str]) -> Checked:
        """Parse, build and check all that a run needs before its first step.

        Args:
            arguments: What follows ``calib fit``.

        Returns:
            What the run is.

        Raises:
            ValueError: If the command line is wrong, files are missing or the parts do not go together.
        """
        said = io.StringIO()
        before = os.environ.get("PL_GLOBAL_SEED")
        try:
            with redirect_stderr(said), redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each run says its own
                fit = _CheckedFit(resolve_configs(["fit", *arguments]), self._seen)
        except Stopped:
            raise
        except SystemExit:
            lines = [line for line in said.getvalue().splitlines() if line.strip()]
            text = " ".join(lines).partition("error: ")[2] or " ".join(lines)
            raise ValueError(text) from None
        except (*FAULTS, MisconfigurationException) as error:
            raise ValueError(plain_message(str(error)) or type(error).__name__) from error
        finally:
            os.environ.pop("PL_GLOBAL_SEED", None)
            if before is not None:
                os.environ["PL_GLOBAL_SEED"] = before
        return _facts(fit)


def _facts(fit: _CheckedFit) -> Checked:
    data: Any = fit.datamodule
    asked = fit.asked
    encoder = fit.model.hparams.get("encoder")
    network = encoder.get("name") if isinstance(encoder, dict) else encoder
    ours = isinstance(data, BenchmarkDataModule)
    names = names_of(asked)
    return Checked(
        config=yaml.safe_load(fit.config_text),
        splits=data.splits_hash if hasattr(data, "save_splits") else None,
        data=names[0],
        method=names[1],
        network=network if isinstance(network, str) else type(fit.model.encoder).__name__,
        tested=bool(fit.tested),
        held_out="calibration" in data.set_names if ours else True,
        parameters=sum(parameter.numel() for parameter in fit.model.parameters()),
    )
