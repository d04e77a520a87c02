"""The command line ``calib fit | validate | test | predict``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from calib_lightning import data
from calib_lightning.callbacks import LogFigures, RunCheckpoint, RunLogger, RunRecord, SavePredictions
from calib_lightning.callbacks.record import check_data_of_run, uses_calibration
from calib_lightning.commands.fit_parser import CalibParser, NamedData
from calib_lightning.core import AtomicCheckpointIO, ClassificationModule, Preemption, StepSeed, load_checkpoint
from calib_lightning.core.data_facts import (
    declared_classes,
    has_test,
    has_validation,
    lacks_class_counts,
    num_classes_of,
)
from calib_lightning.core.module import module_record
from calib_lightning.metrics import CORE, METRICS
from calib_lightning.predictions.report import SHARED, print_table
from calib_lightning.utils.registry import class_path_of, find_class
from calib_lightning.utils.run_folder import create_run_folder, folder_of_restarted_job, run_of, use_run_folder

EVALUATION = ("validate", "test", "predict")
_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


class _FromLink(BaseException):
    """Carries an error past the parser, which would print the data module, and that asks the data for its loaders."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class CalibCLI(LightningCLI):
    """LightningCLI with a folder for every run, exact evaluation and nothing lost.

    ``model``, ``data``, recipe (``-c``) and ``trainer`` are separate parts of a configuration that compose. See
    ``calib fit --help``.

    Args:
        args: Arguments of the command line; those of the process by default.
    """

    def __init__(self, args: ArgsType = None) -> None:
        self.run_folder = Path()
        self.trained_in: Path | None = None
        self.resumed_step = 0
        self.same_class = True
        self.checkpoint_classes: int | None = None
        super().__init__(
            model_class=ClassificationModule,
            datamodule_class=LightningDataModule,
            save_config_callback=None,
            trainer_defaults={"log_every_n_steps": 50},
            seed_everything_default=0,
            parser_class=CalibParser,
            parser_kwargs={
                "description": "Train and evaluate classifiers whose confidence can be trusted. Beside the subcommands "
                "below, 'calib score FILE...' scores saved predictions, 'calib calibrate RUN' fits calibrators to "
                "held-out predictions, 'calib paper' prints or runs the commands of a published table, and 'calib "
                "predict --images DIR --model FILE' labels images with a calibrated classifier; see 'calib score "
                "--help', 'calib calibrate --help', 'calib paper --help' and 'calib predict --images --help'."
            },
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
            # Checkpoints hold plain hyper-parameters; load_module rebuilds the class from them.
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's commands and the arguments that they do not offer.

        ``weights_only=False`` would execute what a checkpoint holds; the trainer's own table repeats ours.
        """
        skipped = {"weights_only", "verbose", "return_predictions"}
        return {name: arguments | skipped for name, arguments in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run and tell the model how many classes the data has."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run; a number is added where it exists. Default: runs/DATA-METHOD.",
        )
        parser.add_argument(
            "--select_on",
            type=str | None,
            default=None,
            help="Validation metric that chooses the checkpoint (val/nll, val/accuracy, val/ece, ...), or 'last'. "
            "Default: the method's own, which is val/nll for most; 'last' where the data has no validation set.",
        )
        parser.add_argument(
            "--num_classes",
            type=int | None,
            default=None,
            help="Number of classes K, for data that does not say it. Data of your own is named by its path, "
            "--data=my_module.MyDataModule; modules are also looked for in the working directory.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="After fit, test the chosen checkpoint, save all predictions and print the table.",
        )
        for action in parser._actions:
            if action.dest == "data":
                action.__class__ = NamedData
        parser.add_argument(
            "--batch_size",
            type=int | None,
            default=None,
            help="Rows of one batch of one process, as a recipe asks for; --data.batch_size on the command line wins.",
        )
        parser.add_argument("--quiet", type=bool, default=False, help="No progress bar and no model summary.")
        parser.link_arguments(
            "data", "model.init_args.num_classes", compute_fn=self._num_classes, apply_on="instantiate"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; arguments given from Python do not clash with those of the process."""
        words = args if isinstance(args, list) else []
        self.own_run_dir = any(word.split("=")[0] == "--run_dir" for word in words)
        self.own_batch_size = any(re.match(r"--data\.(init_args\.)?batch_size\b", word) for word in words)
        self.config = parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Check a checkpoint before anything is built; its hyper-parameters never replace the configuration."""
        config = self._command_config()
        if self.config.subcommand in EVALUATION and config.ckpt_path is None:
            config.ckpt_path = self._checkpoint_of_run(config)
        if config.ckpt_path is None:
            return
        checkpoint = load_checkpoint(config.ckpt_path)
        record = module_record(checkpoint)
        self.checkpoint_classes = record["num_classes"]
        self.resumed_step = int(checkpoint.get("global_step", 0))
        model = config.model
        self.same_class = class_path_of(find_class(model.class_path, ClassificationModule)) == record["class_path"]
        if not self.same_class:
            rank_zero_warn(
                f"The checkpoint {config.ckpt_path} holds a {record['class_path']}, but the configuration asks for "
                f"{model.class_path}: its weights are loaded into the latter.",
            )
        saved = checkpoint.get("hyper_parameters", {})
        asked = {**(model.get("init_args") or {}), **(model.get("dict_kwargs") or {})}
        for name in sorted(set(saved) & set(asked) - {"num_classes"}):  # K comes from the data
            if saved[name] != asked[name]:
                rank_zero_warn(
                    f"The checkpoint {config.ckpt_path} was trained with {name}={saved[name]!r}; the configuration "
                    f"says {name}={asked[name]!r}, which is used.",
                )

    def _num_classes(self, datamodule: LightningDataModule) -> int:
        """K of the data or of the option."""
        try:
            return self._checked_num_classes(datamodule)
        except Exception as error:
            raise _FromLink(error) from error

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what is wrong with the data is said as it is."""
        try:
            super().instantiate_classes()
        except _FromLink as carrier:
            raise carrier.error from None

    def _checked_num_classes(self, datamodule: LightningDataModule) -> int:
        """Refuse at once all that the data lacks for the command."""
        command, name = self._command_config(), type(datamodule).__name__
        asked = command.num_classes
        found = num_classes_of(datamodule) if asked is None else declared_classes(datamodule)
        if asked is not None and found is not None and asked != found:
            raise ValueError(
                f"num_classes is {asked}, but {name} says that it has {found} classes; both must be the same. Leave "
                "num_classes out, or set it to the number of the data."
            )
        missing = [] if asked or found else ["the number of classes (--num_classes=K, or an attribute num_classes)"]
        wanted = f"{_LOADERS[self.config.subcommand]}_dataloader"
        if not is_overridden(wanted, datamodule):
            missing.append(f"a method {wanted}()")
        counts = command.model.get("init_args.class_counts", "not asked for")
        if counts is None and self.config.subcommand == "fit" and lacks_class_counts(datamodule):
            missing.append("class counts (--model.class_counts=[...], or a data set that has its labels as targets)")
        if missing:
            raise ValueError(f"{name} lacks what calib {self.config.subcommand} needs: {'; '.join(missing)}.")
        return int(asked or found or 0)

    def _command_config(self) -> Namespace:
        return self.config[self.config.subcommand]  # type: ignore[no-any-return]

    def _checkpoint_of_run(self, config: Namespace) -> str:
        """The chosen checkpoint of the run whose ``config.yaml`` was given."""
        for path in reversed(config.get("config") or []):
            run = run_of(str(path))
            if run is not None:
                chosen = json.loads((run / "run.json").read_text()).get("checkpoint", {}).get("path")
                if chosen and (run / chosen).is_file():
                    return str(run / chosen)
        raise ValueError(
            f"calib {self.config.subcommand} needs a trained network: give --ckpt_path FILE, or -c RUN/config.yaml of "
            "a finished run, whose chosen checkpoint is then used."
        )

    def before_instantiate_classes(self) -> None:
        """Check what can be checked, then make the folder of the run."""
        config = self._command_config()
        if self.config.subcommand == "fit" and config.trainer.max_epochs == 0 and config.ckpt_path is not None:
            raise ValueError(
                "trainer.max_epochs is 0; it must be above 0 to go on from a checkpoint. To evaluate it use calib test."
            )
        if config.select_on is not None:
            _check_select_on(config.select_on)
        if config.batch_size is not None and not self.own_batch_size:
            self._set_batch_size(config)
        # What is saved is what was asked for: not where this run's files went, nor where it was resumed.
        self.asked = config.clone()
        self.asked.ckpt_path = None
        self.run_folder = self._make_folder(config)
        for logger in _configured_loggers(config.trainer):
            # Loggers write into the run's folder unless they were told another place.
            if logger.get("init_args.save_dir", "elsewhere") in (None, "", "."):
                logger["init_args.save_dir"] = str(self.run_folder)
        encoder = config.model.get("init_args.encoder")
        if config.ckpt_path and isinstance(encoder, dict) and encoder.get("pretrained"):
            encoder["pretrained"] = False  # the weights come from the checkpoint: nothing is downloaded

    def _set_batch_size(self, config: Namespace) -> None:
        """Give the data the batches that a recipe asks for."""
        if config.batch_size < 1:
            raise ValueError(f"batch_size is {config.batch_size}; it must be at least 1.")
        if "batch_size" not in config.data.get("init_args", {}):
            name = config.data.class_path.rpartition(".")[2]
            rank_zero_warn(
                f"The recipe asks for batches of {config.batch_size}, but {name} has no batch_size: its own are used."
            )
            return
        config.data.init_args.batch_size = config.batch_size

    def _make_folder(self, config: Namespace) -> Path:
        default = Path("runs") / f"{_slug(config.data.class_path, 'DataModule')}-{_slug(config.model.class_path)}"
        wanted = Path(config.run_dir or default)
        run = run_of(config.ckpt_path) if config.ckpt_path else None
        self.trained_in = run
        if self.config.subcommand != "fit":
            return create_run_folder(run / self.config.subcommand if run and not self.own_run_dir else wanted)
        # A resumed run goes on where it was; other methods and names begin a run of their own from its weights.
        if run is not None and self.same_class and (config.run_dir is None or _is_numbered(run, wanted)):
            return use_run_folder(run)
        restarted = folder_of_restarted_job(wanted) if config.ckpt_path is None else None
        if restarted is not None:
            last = restarted / "checkpoints" / "last.ckpt"
            config.ckpt_path = str(last) if last.is_file() else None
            self.resumed_step = load_checkpoint(last)["global_step"] if last.is_file() else 0
            return use_run_folder(restarted)
        return create_run_folder(wanted)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the callbacks, the loggers and the checkpoint writer that every run has."""
        command = self._command_config()
        config = self._get(self.config_init, "trainer")
        loggers: list[Logger] = [RunLogger(self.run_folder, self.resumed_step)]
        if isinstance(config.logger, Logger):
            loggers.append(config.logger)
        elif isinstance(config.logger, list | tuple):
            loggers.extend(config.logger)
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        self.validates = self.config.subcommand != "fit" or has_validation(self.datamodule)
        if not self.validates:
            kwargs["limit_val_batches"] = 0  # Lightning takes no loader that is None
        if command.quiet:
            kwargs |= {"enable_progress_bar": False, "enable_model_summary": False}
        return super().instantiate_trainer(
            default_root_dir=str(self.run_folder),
            logger=loggers,
            plugins=[*plugins, AtomicCheckpointIO()],
            callbacks=[*(c for c in callbacks if c is not None), *self._callbacks(command)],
            **kwargs,
        )

    def _callbacks(self, command: Namespace) -> list[Callback]:
        saved = SavePredictions(self.run_folder / "predictions")
        if self.config.subcommand != "fit":
            return [RunRecord(self.run_folder, None, self.trained_in), saved, LogFigures()]
        folder = self.run_folder / "checkpoints"
        self.keeper = last = RunCheckpoint(folder, "last")
        keepers = [last]
        if command.select_on is None and self.model.select_on != "last" and not self.validates:
            command.select_on = "last"
            rank_zero_warn("The data has no validation set: the last checkpoint is kept.")
        if command.trainer.max_epochs == 0:
            command.select_on = "last"  # nothing is trained: the network as it is
        command.select_on = command.select_on or self.model.select_on
        if command.select_on != "last":
            mode = "max" if METRICS[command.select_on.rpartition("/")[2]].better == "higher" else "min"
            self.keeper = RunCheckpoint(folder, "best", command.select_on, mode)
            keepers = [self.keeper, last]  # in this order: the last checkpoint knows the best score of its epoch
        return [
            StepSeed(),
            RunRecord(self.run_folder, self.keeper, self.trained_in),
            saved,
            LogFigures(),
            Preemption(folder),
            *keepers,
        ]

    # --- the commands ------------------------------------------------------------------------------------------------

    def _ready_data(self) -> None:
        """Find out what is wrong with the data before anything is written."""
        if self.checkpoint_classes not in (None, self.model.num_classes):
            raise ValueError(
                f"The checkpoint was trained on {self.checkpoint_classes} classes, the data has"
                f" {self.model.num_classes}. Use data with the classes that the checkpoint was trained on."
            )
        if not isinstance(self.datamodule, data.BenchmarkDataModule):
            return
        if self.trainer.local_rank == 0:
            self.datamodule.prepare_data()
        if self.trainer.is_global_zero:
            self.datamodule.setup()
            self.model.check_images(self.datamodule.image_facts["shape"])
            if self.trained_in is not None and (self.trained_in / "run.json").is_file():
                check_data_of_run(self.trained_in, self.datamodule)

    def before_validate(self) -> None:
        """Look at the data."""
        self._ready_data()

    before_test = before_predict = before_validate

    def before_fit(self) -> None:
        """Look at the data; check that the checkpoint can be chosen as asked; write down the configuration."""
        command = self._command_config()
        self._ready_data()
        if command.select_on != "last" and not self.validates:
            raise ValueError(
                f"select_on is {command.select_on!r}, but the data has no validation split. Set "
                "data.init_args.split.val to a size above 0 (or give your data module a val_dataloader), or select_on: "
                "last."
            )
        if self.trainer.is_global_zero:
            path, number = self.run_folder / "config.yaml", 2
            while path.exists():
                path, number = self.run_folder / f"config-{number}.yaml", number + 1
            self._parser("fit").save(self.asked, path, skip_unset=False, multifile=False)

    def after_fit(self) -> None:
        """Test the chosen checkpoint, once."""
        command = self._command_config()
        if command.trainer.fast_dev_run or not command.test_after_fit:
            return
        if not has_test(self.datamodule):
            if self.trainer.is_global_zero:
                print(f"{type(self.datamodule).__name__} has no test set: nothing was tested. {self.run_folder}")
            return
        chosen = self.keeper.best_model_path
        if not chosen:
            rank_zero_warn(
                f"No epoch was trained to its end with {command.select_on!r}, so no checkpoint was chosen and none is "
                "tested. Train longer, or use --select_on=last."
            )
            return
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=chosen, verbose=False, weights_only=True)
        self._report(f"{self.run_folder} ({Path(chosen).name}, chosen by {command.select_on})")

    def fit(self, **kwargs: Any) -> None:
        """Train."""
        self.trainer.fit(weights_only=True, **kwargs | {"ckpt_path": self._command_config().ckpt_path})

    def validate(self, **kwargs: Any) -> None:
        """Evaluate the validation split."""
        self.trainer.validate(verbose=False, weights_only=True, **kwargs)
        self._report(str(self.run_folder))

    def test(self, **kwargs: Any) -> None:
        """Evaluate every test set and the calibration split."""
        self.trainer.test(verbose=False, weights_only=True, **kwargs)
        self._report(str(self.run_folder))

    def predict(self, **kwargs: Any) -> None:
        """Save the predictions."""
        self.trainer.predict(return_predictions=False, weights_only=True, **kwargs)
        if self.trainer.is_global_zero:
            print(f"Predictions are in {self.run_folder / 'predictions'}.")

    def _report(self, title: str) -> None:
        if self.trainer.is_global_zero:
            if getattr(getattr(self.datamodule, "split", None), "share", False):
                title += f"; {SHARED}"
            print_table({key: float(value) for key, value in self.trainer.callback_metrics.items()}, title)
            for name in uses_calibration(self.trainer):
                print(f"{name} was trained with the calibration split: figures and fits on it are not independent.")


def _check_select_on(key: str) -> None:
    if key == "last":
        return
    prefix, _, name = key.rpartition("/")
    usable = [metric for metric in CORE if METRICS[metric].better != "zero"]  # what validation logs
    if prefix != "val" or name not in usable:
        reason = " Choosing by a test metric would fit the test set." if prefix.startswith("test") else ""
        allowed = ", ".join(f"val/{metric}" for metric in usable)
        raise ValueError(f"select_on is {key!r}; it must be 'last' or one of {allowed}.{reason}")


def _is_numbered(folder: Path, wanted: Path) -> bool:
    """Whether a folder is the wanted one or one that was numbered because it existed."""
    return re.fullmatch(re.escape(str(wanted.resolve())) + r"(-\d+)?", str(folder.resolve())) is not None


def _configured_loggers(trainer: Namespace) -> list[Namespace]:
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    return [logger for logger in loggers if isinstance(logger, Namespace)]


def _slug(class_path: str, suffix: str = "") -> str:
    """``calib_lightning.methods.LabelSmoothing`` -> ``label_smoothing``."""
    name = class_path.rpartition(".")[2].removesuffix(suffix)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
