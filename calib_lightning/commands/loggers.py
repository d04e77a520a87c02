"""The loggers that a user asks for beside the run's CSV file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.loggers import Logger, WandbLogger

from calib_lightning.callbacks import LogRun
from calib_lightning.callbacks.guarded import attempt, guarded
from calib_lightning.commands.run_labels import id_of, keep, label, short_facts


def start_loggers(config: Namespace, folder: Path, command: str, trained_in: Path | None) -> list[Logger]:
    """Build and start the loggers before data is read or anything trained; afterwards their failures end nothing.

    They write into the run's folder unless they were told another place.

    Args:
        config: Configuration of the command, whose trainer keeps no logger.
        folder: The run's folder.
        command: The command, such as ``fit``.
        trained_in: Folder of the run that trained the network.

    Returns:
        The loggers, guarded.

    Raises:
        RuntimeError: If one cannot start (a package, a key or the network is missing).
    """
    trainer = config.trainer
    asked = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    trainer.logger = None
    if trainer.fast_dev_run:
        return []  # Lightning lets none log
    # W&B first: it must be there before a TensorBoard writer whose values it takes over
    found = sorted(
        (_built(one, folder) for one in asked if isinstance(one, Namespace | Logger)),
        key=lambda logger: not isinstance(logger, WandbLogger),
    )
    for logger in found:
        try:
            if isinstance(logger, WandbLogger):
                facts = short_facts(config, folder, trained_in)
                label(logger, config, command, folder, facts)
                keep(logger, config, folder, facts)
            else:
                getattr(logger, "experiment", None)
        except Exception as error:
            raise RuntimeError(_cannot_start(type(logger).__name__, error)) from error
    return [guarded(logger) for logger in found]


@contextmanager
def ending_loggers(owner: object) -> Iterator[None]:
    """End the runs of Weights & Biases of ``owner.loggers``: the next run of this process is another one."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in getattr(owner, "loggers", []):
            if isinstance(logger, WandbLogger):
                attempt(logger, "finish", partial(_finish, logger, int(failed)))


def _finish(logger: WandbLogger, exit_code: int) -> None:
    if hasattr(logger.experiment, "finish"):  # only the first process has a run
        logger.experiment.finish(exit_code=exit_code)


def run_log(config: Namespace, asked: str, folder: Path, trained_in: Path | None) -> LogRun:
    """Build the callback that tells loggers what is run.

    Args:
        config: Configuration of the command.
        asked: What was asked for, as YAML.
        folder: The run's folder.
        trained_in: Folder of the run that trained the network.

    Returns:
        The callback.
    """
    facts = short_facts(config, folder, trained_in) | {"run_dir": str(folder), "config": yaml.safe_load(asked)}
    if trained_in is not None and trained_in.resolve() != folder.resolve():
        facts |= {"trained_in": str(trained_in), "trained_in_wandb": id_of(trained_in)}
    return LogRun(folder, facts, config.log_all, config.log_limit)


def _built(asked: Namespace | Logger, folder: Path) -> Logger:
    if isinstance(asked, Logger):
        return asked
    if asked.get("init_args.save_dir", "elsewhere") in (None, "", "."):
        # absolute: Weights & Biases writes from a process of its own, which may have begun in another folder
        asked["init_args.save_dir"] = str(folder.resolve())
    parser = ArgumentParser()
    parser.add_argument("--logger", type=Logger)
    try:
        found: Logger = parser.instantiate(Namespace(logger=asked)).logger  # type: ignore[no-untyped-call]
    except Exception as error:
        raise RuntimeError(_cannot_start(asked.class_path.rpartition(".")[2], error)) from error
    return found


def _cannot_start(name: str, error: BaseException) -> str:
    error = error.__cause__ or error  # the parser's own error tells more of the parser
    if isinstance(error, ImportError):
        remedy = "Install the package"
    elif name == "WandbLogger":
        remedy = (
            "Log in with `wandb login`, or keep what is logged on this machine with "
            "--trainer.logger.init_args.offline=true"
        )
    else:
        remedy = "Mend that"
    why = " ".join(str(error).split()).rstrip(".")
    return (
        f"trainer.logger is {name}, which cannot start: {why}. {remedy}, or leave the logger out; metrics.csv and "
        "run.json have every value without it."
    )
