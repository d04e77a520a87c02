"""What is looked at in the checkpoint that a run of the trainer begins with."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback

from calib_lightning.core import ClassificationModule, load_checkpoint
from calib_lightning.core.module_record import check_has, check_resumable, epochs_asked, epochs_of, module_record
from calib_lightning.core.stage_base import Stage
from calib_lightning.utils.registry import class_path_of, find_class
from calib_lightning.utils.run_folder import read_json, run_of


def checked_checkpoint(config: Namespace, command: str) -> dict[str, Any]:
    """Read the checkpoint of a command; refuse one with which the command can do nothing.

    Args:
        config: Configuration of the command, with ``ckpt_path``.
        command: Name of the command.

    Returns:
        The checkpoint.

    Raises:
        RuntimeError: If it is damaged, or lacks what the command needs.
        ValueError: If it is no checkpoint of this package, or a fit has nothing left to train.
    """
    checkpoint = load_checkpoint(config.ckpt_path)
    module_record(checkpoint, config.ckpt_path)
    if command == "fit":
        check_resumable(checkpoint, config.ckpt_path)
        _check_unfinished(checkpoint, config)
    check_has(
        checkpoint, ["pytorch-lightning_version"], config.ckpt_path, "be loaded. Give a file that a trainer saved"
    )
    return checkpoint


def _check_unfinished(checkpoint: dict[str, Any], config: Namespace) -> None:
    """Refuse to train what is trained; a run that was stopped before its test may go on to it."""
    asked, steps, trained = config.trainer.max_epochs, config.trainer.max_steps, epochs_of(checkpoint)
    if asked == 0:
        raise ValueError(
            "trainer.max_epochs is 0; it must be above 0 to go on from a checkpoint. To evaluate it use calib test."
        )
    run = run_of(config.ckpt_path)
    if _begins_stage(checkpoint, config):
        return
    last = {} if run is None else (read_json(run / "run.json").get("stages") or [{}])[-1]
    if last and (last.get("status") != "finished" or (last.get("stage") == "fit" and config.test_after_fit)):
        return
    whole = epochs_asked(checkpoint, asked) if asked is not None and asked > 0 else 0
    if 0 < whole <= trained:
        stages = f" beside {whole - asked} of later stages" if whole > asked else ""
        done = f"{trained} epochs, and trainer.max_epochs is {asked}{stages}"
        more = f"--trainer.max_epochs={2 * asked + trained - whole}"
    elif 0 < steps <= checkpoint["global_step"]:
        done, more = f"{steps} steps, which is trainer.max_steps", f"--trainer.max_steps={2 * steps}"
    else:
        return
    test = f"-c {run / 'config.yaml'}" if run is not None and (run / "config.yaml").is_file() else "..."
    raise ValueError(
        f"{config.ckpt_path} has been trained for {done}: the run is finished, and nothing is left to train. To "
        f"train on, ask for more, such as {more}. To evaluate it, use "
        f"`calib test {test} --ckpt_path {config.ckpt_path}`."
    )


def _begins_stage(checkpoint: dict[str, Any], config: Namespace) -> bool:
    """Whether another method, or a switch that the checkpoint does not know, may go on with what is trained."""
    if (
        class_path_of(find_class(config.model.class_path, ClassificationModule))
        != module_record(checkpoint)["class_path"]
    ):
        return True
    asked = config.trainer.callbacks if isinstance(config.trainer.callbacks, list) else [config.trainer.callbacks]
    switches = [
        one for one in asked if isinstance(one, Namespace) and issubclass(find_class(one.class_path, Callback), Stage)
    ]
    return bool(len(switches) > sum(key.startswith("StageSwitch[") for key in checkpoint["callbacks"]))
