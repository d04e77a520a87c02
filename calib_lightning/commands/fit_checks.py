"""What is looked at before a run of the trainer begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from calib_lightning.callbacks.record import check_data_of_run
from calib_lightning.commands.fit_channels import is_but_for_channels, take_channels
from calib_lightning.core import ClassificationModule
from calib_lightning.core.data_facts import declared_classes, lacks_class_counts, num_classes_of
from calib_lightning.data import BenchmarkDataModule
from calib_lightning.metrics import CORE, METRICS
from calib_lightning.utils.described import is_spec
from calib_lightning.utils.registry import class_path_of, find_class


class FromLinkError(BaseException):
    """Carries an error past the parser, which would print the data module, and that asks the data for its loaders.

    Without an error it says that the configuration has changed, by which model and data are to be built.
    """

    def __init__(self, error: Exception | None) -> None:
        super().__init__(error)
        self.error = error


_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


def check_select_on(key: str) -> None:
    """Refuse a metric by which no checkpoint can be chosen.

    Args:
        key: ``last``, or the key of a metric.

    Raises:
        ValueError: If it is anything but ``last`` and what validation logs.
    """
    if key == "last":
        return
    prefix, _, name = key.rpartition("/")
    usable = [metric for metric in CORE if METRICS[metric].better != "zero"]  # what validation logs
    if prefix != "val" or name not in usable:
        reason = " Choosing by a test metric would fit the test set." if prefix.startswith("test") else ""
        allowed = ", ".join(f"val/{metric}" for metric in usable)
        raise ValueError(f"select_on is {key!r}; it must be 'last' or one of {allowed}.{reason}")


def check_validation(key: str | None, validates: bool) -> None:
    """Refuse to choose a checkpoint by a metric of a set that is not there.

    Args:
        key: The metric; None leaves the choice to the method.
        validates: Whether there is a validation set.

    Raises:
        ValueError: If the metric is of a set that is not there.
    """
    if key not in (None, "last") and not validates:
        raise ValueError(
            f"select_on is {key!r}, but the data has no validation split. Set data.init_args.split.val to a size above "
            "0 (or give your data module a val_dataloader), or select_on: last."
        )


def set_batch_size(config: Namespace) -> None:
    """Give the data the batches that a recipe asks for.

    Args:
        config: Configuration of the command, which is changed.

    Raises:
        ValueError: If the size is below 1.
    """
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}; it must be at least 1.")
    if "batch_size" not in config.data.get("init_args", {}):
        name = config.data.class_path.rpartition(".")[2]
        rank_zero_warn(
            f"The recipe asks for batches of {config.batch_size}, but {name} has no batch_size: its own are used."
        )
        return
    config.data.init_args.batch_size = config.batch_size


def checked_num_classes(datamodule: LightningDataModule, config: Namespace, command: str) -> int:
    """Refuse at once all that the data lacks for the command.

    Args:
        datamodule: The data.
        config: Configuration of the command.
        command: Name of the command.

    Returns:
        K of the data or of the option.

    Raises:
        ValueError: If something is missing, or data and option do not agree.
    """
    asked, name = config.num_classes, type(datamodule).__name__
    found = num_classes_of(datamodule) if asked is None else declared_classes(datamodule)
    if asked is not None and found is not None and asked != found:
        raise ValueError(
            f"num_classes is {asked}, but {name} says that it has {found} classes; both must be the same. Leave "
            "num_classes out, or set it to the number of the data."
        )
    missing = [] if asked or found else ["the number of classes (--num_classes=K, or an attribute num_classes)"]
    wanted = f"{_LOADERS[command]}_dataloader"
    if not is_overridden(wanted, datamodule):
        missing.append(f"a method {wanted}()")
    counts = config.model.get("init_args.class_counts", "not asked for")
    if counts is None and command == "fit" and lacks_class_counts(datamodule):
        missing.append("class counts (--model.class_counts=[...], or a data set that has its labels as targets)")
    if missing:
        raise ValueError(f"{name} lacks what calib {command} needs: {'; '.join(missing)}.")
    return int(asked or found or 0)


def told_by_data(datamodule: LightningDataModule, config: Namespace, command: str, saved_encoder: Any) -> int:
    """Take from the data what the model is to be built with.

    Args:
        datamodule: The data.
        config: Configuration of the command, which gets the encoder's channels.
        command: Name of the command.
        saved_encoder: The encoder in the checkpoint from which the weights come; ``None`` without one.

    Returns:
        K.

    Raises:
        FromLinkError: If data and configuration do not agree, or the configuration was changed.
    """
    try:
        classes = checked_num_classes(datamodule, config, command)
        changed = take_channels(config.model, datamodule, saved_encoder)
    except Exception as error:
        raise FromLinkError(error) from error
    if changed:
        raise FromLinkError(None)
    return classes


def is_same_method(model: Namespace, checkpoint: dict[str, Any], record: Any, path: str) -> bool:
    """Compare a checkpoint with the configuration, which decides; a difference is said in a warning.

    Args:
        model: Configuration of the model.
        checkpoint: The checkpoint.
        record: What it says about its module.
        path: Its file, for the message.

    Returns:
        Whether it is of the same class.
    """
    same: bool = class_path_of(find_class(model.class_path, ClassificationModule)) == record["class_path"]
    if not same:
        rank_zero_warn(
            f"The checkpoint {path} holds a {record['class_path']}, but the configuration asks for "
            f"{model.class_path}: its weights are loaded into the latter.",
        )
    saved = checkpoint.get("hyper_parameters", {})
    asked = {**(model.get("init_args") or {}), **(model.get("dict_kwargs") or {})}
    for name in sorted(set(saved) & set(asked) - {"num_classes"}):  # K comes from the data
        if name == "encoder" and is_but_for_channels(asked[name], saved[name]):
            continue
        if saved[name] != asked[name] and not is_spec(saved[name]):  # criteria are written differently there
            rank_zero_warn(
                f"The checkpoint {path} was trained with {name}={saved[name]!r}; the configuration says "
                f"{name}={asked[name]!r}, which is used.",
            )
    return same


def ready_data(
    trainer: Trainer,
    model: ClassificationModule,
    datamodule: LightningDataModule,
    classes: int | None,
    trained_in: Path | None,
) -> None:
    """Find out what is wrong with the data before anything is written.

    Args:
        trainer: The trainer.
        model: The model.
        datamodule: The data; nothing is looked at in data that is not of this package.
        classes: K of the checkpoint, ``None`` without one.
        trained_in: Folder of the run that has trained the network, ``None`` without one.

    Raises:
        ValueError: If the data is not what network and checkpoint need.
    """
    if classes not in (None, model.num_classes):
        raise ValueError(
            f"The checkpoint was trained on {classes} classes, the data has {model.num_classes}. Use data with the "
            "classes that the checkpoint was trained on."
        )
    if not isinstance(datamodule, BenchmarkDataModule):
        return
    if trainer.local_rank == 0:
        datamodule.prepare_data()
    if trainer.is_global_zero:
        datamodule.setup()
        model.check_images(datamodule.image_facts["shape"])
        if trained_in is not None and (trained_in / "run.json").is_file():
            check_data_of_run(trained_in, datamodule)
