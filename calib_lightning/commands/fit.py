"""The command line ``calib fit | validate | test | predict``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from calib_lightning.callbacks import LogFigures, RunCheckpoint, RunLogger, RunRecord, SavePredictions
from calib_lightning.commands import help as texts
from calib_lightning.commands.fit_checks import (
    FromLinkError,
    check_select_on,
    check_validation,
    is_same_method,
    ready_data,
    set_batch_size,
    told_by_data,
)
from calib_lightning.commands.fit_devices import check_device
from calib_lightning.commands.fit_folder import (
    checkpoint_of_run,
    default_folder,
    folder_of_restarted_job,
    is_numbered,
    save_config,
    with_whole_paths,
)
from calib_lightning.commands.fit_parser import CalibParser, data_begins_anew
from calib_lightning.commands.fit_report import EpochLines, beginning, print_results
from calib_lightning.commands.fit_resumed import checked_checkpoint
from calib_lightning.commands.loggers import ending_loggers, run_log, start_loggers
from calib_lightning.commands.quiet import be_quiet, without_noise
from calib_lightning.core import AtomicCheckpointIO, ClassificationModule, Preemption, StepSeed, load_checkpoint
from calib_lightning.core.data_facts import has_test, has_validation
from calib_lightning.core.module_record import module_record
from calib_lightning.metrics import METRICS
from calib_lightning.utils.run_folder import create_run_folder, run_of, use_run_folder
from calib_lightning.utils.stopping import ending_launched


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
        self.resumed_step, self.same_class = 0, True
        self.checkpoint_classes: int | None = None
        self.saved_encoder: Any = None
        self._named = args[0] if isinstance(args, list) and args else None
        with without_noise(), ending_launched(self), ending_loggers(self):
            super().__init__(
                model_class=ClassificationModule,
                datamodule_class=LightningDataModule,
                save_config_callback=None,
                trainer_defaults={"log_every_n_steps": 50},
                seed_everything_default=0,
                parser_class=CalibParser,
                parser_kwargs={"prog": "calib"},
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=args,
                auto_configure_optimizers=False,
                # Checkpoints hold plain hyper-parameters; load_module rebuilds the class from them.
                load_from_checkpoint_support=False,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method in Lightning
        """The trainer's commands and the arguments that they do not offer; if one is named, only that one.

        ``weights_only=False`` would execute what a checkpoint holds; the trainer's own table repeats ours.
        """
        skipped = {"weights_only", "verbose", "return_predictions"}
        every = {name: arguments | skipped for name, arguments in LightningCLI.subcommands().items()}
        # a parser takes a tenth of a second, and a run needs that of its command alone
        return {self._named: every[self._named]} if self._named in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run and tell the model how many classes the data has."""
        parser.add_argument("--run_dir", type=str | None, default=None, help=texts.RUN_DIR)
        parser.add_argument("--select_on", type=str | None, default=None, help=texts.SELECT_ON)
        parser.add_argument("--num_classes", type=int | None, default=None, help=texts.NUM_CLASSES)
        parser.add_argument("--test_after_fit", type=bool, default=True, help=texts.TEST_AFTER_FIT)
        parser.add_argument("--batch_size", type=int | None, default=None, help=texts.BATCH_SIZE)
        parser.add_argument("--quiet", type=bool, nargs="?", const=True, default=False, help=texts.QUIET)
        parser.add_argument("--log_all", type=bool, nargs="?", const=True, default=False, help=texts.LOG_ALL)
        parser.add_argument("--log_limit", type=float, default=500.0, help=texts.LOG_LIMIT)
        data_begins_anew(parser)
        parser.link_arguments(
            "data", "model.init_args.num_classes", compute_fn=self._num_classes, apply_on="instantiate"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; arguments given from Python do not clash with those of the process."""
        words = args if isinstance(args, list) else []
        self.own_run_dir = any(word.split("=")[0] == "--run_dir" for word in words)
        self.own_batch_size = any(re.match(r"--data\.(init_args\.)?batch_size\b", word) for word in words)
        self.config = parser.parse_object(args) if isinstance(args, dict | Namespace) else parser.parse_args(args)
        if self._command_config().quiet:
            be_quiet()

    def _parse_ckpt_path(self) -> None:
        """Check a checkpoint before anything is built; its hyper-parameters never replace the configuration."""
        config = self._command_config()
        if self.config.subcommand != "fit" and config.ckpt_path is None:
            config.ckpt_path = checkpoint_of_run(config.get("config") or [], self.config.subcommand)
        if config.ckpt_path is None:
            return
        checkpoint = checked_checkpoint(config, self.config.subcommand)
        record = module_record(checkpoint)
        self.checkpoint_classes = record["num_classes"]
        self.saved_encoder = checkpoint.get("hyper_parameters", {}).get("encoder", "")
        self.resumed_step = int(checkpoint.get("global_step", 0))
        self.same_class = is_same_method(config.model, checkpoint, record, config.ckpt_path)

    def _num_classes(self, datamodule: LightningDataModule) -> int:
        """K of the data or of the option; the encoder, too, learns from the data."""
        return told_by_data(datamodule, self._command_config(), self.config.subcommand, self.saved_encoder)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what is wrong with the data is said as it is."""
        try:
            super().instantiate_classes()
        except FromLinkError as carrier:
            if carrier.error is not None:
                raise carrier.error from None
            super().instantiate_classes()

    def _command_config(self) -> Namespace:
        return self.config[self.config.subcommand]  # type: ignore[no-any-return]

    def before_instantiate_classes(self) -> None:
        """Check what can be checked, then make the folder of the run."""
        config = self._command_config()
        self._check_asked(config)
        self.run_folder = self._make_folder(config)
        self.loggers = start_loggers(config, self.run_folder, self.config.subcommand, self.trained_in)
        encoder = config.model.get("init_args.encoder")
        if config.ckpt_path and isinstance(encoder, dict) and encoder.get("pretrained"):
            encoder["pretrained"] = False  # the weights come from the checkpoint: nothing is downloaded

    def _check_asked(self, config: Namespace) -> None:
        """Check what needs no data and no network, and remember what was asked for."""
        check_device(config.trainer)
        if config.select_on is not None:
            check_select_on(config.select_on)
        if config.batch_size is not None and not self.own_batch_size:
            set_batch_size(config)
        # What is saved is what was asked for: not where this run's files went, nor where it was resumed.
        self.asked = with_whole_paths(config.clone())
        self.asked.ckpt_path = None

    def _make_folder(self, config: Namespace) -> Path:
        wanted = Path(config.run_dir or default_folder(config))
        run = run_of(config.ckpt_path) if config.ckpt_path else None
        self.trained_in = run
        if self.config.subcommand != "fit":
            return create_run_folder(run / self.config.subcommand if run and not self.own_run_dir else wanted)
        # A resumed run goes on where it was; other methods and names begin a run of their own from its weights.
        if run is not None and self.same_class and (config.run_dir is None or is_numbered(run, wanted)):
            return use_run_folder(run)
        restarted = folder_of_restarted_job(wanted, self._dumped())
        if restarted is None:
            return create_run_folder(wanted)
        use_run_folder(restarted, patience=60.0)  # what is left of this job may take a while to end, and to save
        last = restarted / "checkpoints" / "last.ckpt"
        if last.is_file():
            config.ckpt_path, self.resumed_step = str(last), int(load_checkpoint(last).get("global_step", 0))
        rank_zero_info(f"This job was started before: it goes on in {restarted}, from step {self.resumed_step}.")
        return restarted

    def _dumped(self) -> str:
        """What was asked for, as YAML."""
        text: str = self._parser(self.config.subcommand).dump(self.asked, skip_unset=False)
        return text

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the callbacks, the loggers and the checkpoint writer that every run has."""
        command = self._command_config()
        config = self._get(self.config_init, "trainer")
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        self.validates = self.config.subcommand != "fit" or has_validation(self.datamodule)
        if not self.validates:
            kwargs["limit_val_batches"] = 0  # Lightning takes no loader that is None
        if command.quiet:
            kwargs |= {"enable_progress_bar": False, "enable_model_summary": False}
        elif config.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # the run's first line says what matters of it
        return super().instantiate_trainer(
            default_root_dir=str(self.run_folder),
            logger=[RunLogger(self.run_folder, self.resumed_step), *self.loggers],
            plugins=[*plugins, AtomicCheckpointIO()],
            callbacks=[*(c for c in callbacks if c is not None), *self._callbacks(command)],
            **kwargs,
        )

    def _callbacks(self, command: Namespace) -> list[Callback]:
        saved = SavePredictions(self.run_folder / "predictions")
        logged = [saved, LogFigures(), run_log(command, self._dumped(), self.run_folder, self.trained_in)]
        if self.config.subcommand != "fit":
            return [RunRecord(self.run_folder, None, self.trained_in), *logged, Preemption()]
        folder = self.run_folder / "checkpoints"
        self.keeper = last = RunCheckpoint(folder, "last")
        if command.select_on is None and self.model.select_on != "last" and not self.validates:
            command.select_on = "last"
            rank_zero_warn("The data has no validation set: the last checkpoint is kept.")
        if command.trainer.max_epochs == 0:
            command.select_on = "last"  # nothing is trained: the network as it is
        command.select_on = command.select_on or self.model.select_on
        if command.select_on != "last":
            mode = "max" if METRICS[command.select_on.rpartition("/")[2]].better == "higher" else "min"
            self.keeper = RunCheckpoint(folder, "best", command.select_on, mode)
        return [
            StepSeed(),
            EpochLines(command.quiet),
            RunRecord(self.run_folder, self.keeper, self.trained_in),
            *logged,
            Preemption(folder),
            *dict.fromkeys([self.keeper, last]),  # in this order: the last checkpoint knows the best score of its epoch
        ]

    # --- the commands ------------------------------------------------------------------------------------------------

    def _ready_data(self) -> None:
        ready_data(self.trainer, self.model, self.datamodule, self.checkpoint_classes, self.trained_in)

    def before_validate(self) -> None:
        """Look at the data."""
        self._ready_data()

    before_test = before_predict = before_validate

    def before_fit(self) -> None:
        """Look at the data; check that the checkpoint can be chosen as asked; write down the configuration."""
        command = self._command_config()
        self._ready_data()
        check_validation(command.select_on, self.validates)
        if self.trainer.is_global_zero:
            save_config(self._dumped(), self.run_folder)
            if not command.quiet:
                print(beginning(self.model, self.trainer, self.run_folder))

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
        how = "the last epoch" if command.select_on == "last" else f"chosen by {command.select_on}"
        title = f"{self.run_folder} ({Path(chosen).name}, {how})"
        print_results(self.trainer, self.datamodule, title)

    def fit(self, **kwargs: Any) -> None:
        """Train."""
        self.trainer.fit(weights_only=True, **kwargs | {"ckpt_path": self._command_config().ckpt_path})

    def validate(self, **kwargs: Any) -> None:
        """Evaluate the validation split."""
        self.trainer.validate(verbose=False, weights_only=True, **kwargs)
        self._report_evaluation()

    def test(self, **kwargs: Any) -> None:
        """Evaluate every test set and the calibration split."""
        self.trainer.test(verbose=False, weights_only=True, **kwargs)
        self._report_evaluation()

    def predict(self, **kwargs: Any) -> None:
        """Save the predictions."""
        self.trainer.predict(return_predictions=False, weights_only=True, **kwargs)
        if self.trainer.is_global_zero:
            print(f"Predictions are in {self.run_folder / 'predictions'}.")

    def _report_evaluation(self) -> None:
        name = Path(self._command_config().ckpt_path).name
        print_results(self.trainer, self.datamodule, f"{self.run_folder} ({name})")
