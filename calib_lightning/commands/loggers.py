"""The loggers that a user asks for beside the run's CSV file."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.loggers import Logger, WandbLogger

from calib_lightning.callbacks.guarded import guarded


def start_loggers(trainer: Namespace, folder: Path) -> list[Logger]:
    """Build and start the loggers before data is read or anything trained; afterwards their failures end nothing.

    They write into the run's folder unless they were told another place.

    Args:
        trainer: Configuration of the trainer, which keeps no logger.
        folder: The run's folder.

    Returns:
        The loggers, guarded.

    Raises:
        RuntimeError: If one cannot start (a package, a key or the network is missing).
    """
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
            getattr(logger, "experiment", None)
        except Exception as error:
            raise RuntimeError(_cannot_start(type(logger).__name__, error)) from error
    return [guarded(logger) for logger in found]


def _built(asked: Namespace | Logger, folder: Path) -> Logger:
    if isinstance(asked, Logger):
        return asked
    if asked.get("init_args.save_dir", "elsewhere") in (None, "", "."):
        asked["init_args.save_dir"] = str(folder)
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
        f"trainer.logger is {name}, which cannot start: {why}. {remedy}, or leave the logger out; metrics.csv has "
        "every value without it."
    )
