"""What a checkpoint says about its module, so that it can be rebuilt from the file alone; plain data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor

from calib_lightning.core.checkpoint_io import AtomicCheckpointIO
from calib_lightning.metrics import EvaluationState
from calib_lightning.utils.described import Described, Spec, is_data, storable, stored

CHECKPOINT_KEY = "calib_lightning"

_PARTS: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "fit_loop": dict,
}
"""What Lightning writes into a checkpoint, the last one into its loops."""
_RESUME = (
    "go on with its training. Give a checkpoint that was saved whole, without save_weights_only, or start a new fit "
    "from its weights: load_module(path)"
)


class _ModuleRecord(TypedDict):
    class_path: str
    num_classes: int
    stage: int
    head: Spec
    train_state: dict[str, Tensor]


class ModuleRecord(_ModuleRecord, total=False):
    """What a checkpoint stores about its module; plain data. Older files lack the keys listed here."""

    epoch_rows: dict[str, list[Tensor]]
    plain_loss: bool
    class_names: list[str] | None


_RECORD = {"class_path": str, "num_classes": int, "stage": int, "head": dict, "train_state": dict}
"""The keys that every `ModuleRecord` has, and what they hold."""


@contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Put the name of a checkpoint before what is wrong with what it holds."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        kind = next(kind for kind in (TypeError, ValueError, RuntimeError) if isinstance(error, kind))
        raise kind(f"{path}: {error}") from error


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: nothing in it is executed.

    Args:
        path: The file.
        map_location: Device of the tensors.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If the file does not exist.
        pickle.UnpicklingError: If it holds anything but tensors and plain data.
        RuntimeError: If it is damaged or incomplete.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist.")
    found = AtomicCheckpointIO().load_checkpoint(path, map_location)  # type: ignore[arg-type]
    check_has(found, ["state_dict"], path, "hold the weights of a network. Give a file that a trainer has saved")
    return found


def check_has(checkpoint: Mapping[str, Any], keys: Iterable[str], path: str | Path | None, to: str) -> None:
    """Reject a checkpoint that lacks what it is needed for.

    Args:
        checkpoint: The checkpoint.
        keys: Names of its parts.
        path: Its file, for the message.
        to: What it must have them for, and what to do, without a full stop.

    Raises:
        RuntimeError: If a part is missing or of another type than Lightning's.
    """
    for key in keys:
        kind, where = _PARTS[key], path or "The checkpoint"
        if key not in checkpoint:
            raise RuntimeError(f"{where} has no {key!r}; it must have one to {to}.")
        if not isinstance(checkpoint[key], kind):
            held = type(checkpoint[key]).__name__
            raise RuntimeError(f"{where} has a {held} as {key!r}; it must be of type {kind.__name__} to {to}.")


def check_resumable(checkpoint: Mapping[str, Any], path: str | Path | None) -> None:
    """Reject a checkpoint with which a fit cannot go on, such as one of weights alone."""
    keys = [key for key in _PARTS if key not in ("hyper_parameters", "fit_loop")]
    for part, wanted in ((checkpoint, keys), (checkpoint.get("loops", {}), ["fit_loop"])):
        check_has(part, wanted, path, _RESUME)


def epochs_of(checkpoint: Mapping[str, Any]) -> int:
    """Return how many epochs a checkpoint has been trained for, those of its stages among them."""
    progress: Any = checkpoint["loops"]["fit_loop"].get("epoch_progress", {})
    return int(progress.get("current", {}).get("processed", 0))


def epochs_asked(checkpoint: Mapping[str, Any], epochs: int) -> int:
    """Return how many epochs a trainer of ``epochs`` trains, with the stages that a checkpoint says it appends."""
    states = [state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith("StageSwitch[")]
    added = [state for state in states if state["at_epoch"] < 0]
    from_trained = any(state["first_epoch"] == 0 for state in added)  # init_from was the first stage
    return (0 if from_trained else epochs) - sum(int(state["at_epoch"]) for state in added)


def module_record(checkpoint: Mapping[str, Any], path: str | Path = "This checkpoint") -> ModuleRecord:
    """Return what a loaded checkpoint says about its module; reject other checkpoints, by the name of their file."""
    record = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in _RECORD.items()):
        raise ValueError(
            f"{path} does not name its calib_lightning module; only checkpoints of a ClassificationModule do. "
            "Load other weights with torch.load and load_state_dict, and those of your own modules that a StageSwitch "
            "has trained with load_stages."
        )
    return cast(ModuleRecord, record)


def stage_of(checkpoint: Mapping[str, Any]) -> int:
    """Return how many switches a loaded checkpoint's module had behind it."""
    record = checkpoint.get(CHECKPOINT_KEY)
    if isinstance(record, dict):
        return int(record.get("stage", 0))
    states = checkpoint.get("callbacks", {}).items()
    return sum(bool(state["active"]) for key, state in states if key.startswith("StageSwitch["))


def equal_weights(weights: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two states are equal bit for bit, wherever their tensors are."""
    if weights.keys() != others.keys():
        return False
    tensors = ((value, others[name]) for name, value in weights.items() if isinstance(value, Tensor))
    return all(torch.equal(value.cpu(), other.cpu()) for value, other in tensors)


def check_classes(record: ModuleRecord, num_classes: int) -> None:
    """Reject a checkpoint of another number of classes."""
    if record["num_classes"] != num_classes:
        raise ValueError(
            f"The checkpoint was trained on {record['num_classes']} classes, but this module has "
            f"{num_classes}. Use the data that the checkpoint was trained on, or a module with as many "
            "classes."
        )


def stored_arguments(frame: FrameType | None) -> dict[str, Any]:
    """The constructor's storable arguments as plain data, including those of base classes.

    Described objects are stored as specs if they were passed to the class itself; it recreates those of its bases.
    """
    assert frame is not None
    *bases, own = collect_init_args(frame, [], classes=(HyperparametersMixin,))
    given = {name: value for arguments in bases for name, value in arguments.items()}
    plain = {name: value for name, value in given.items() if not isinstance(value, Described | None)}
    arguments = {**plain, **own}
    data = {name: value for name, value in arguments.items() if is_data(value)}
    return data | {name: stored(value) for name, value in arguments.items() if storable(value)}


def summed_state(state: EvaluationState) -> dict[str, Tensor]:
    """The metrics of all processes, as a checkpoint holds them; collective."""
    with state.sync_context():
        return {name: torch.as_tensor(value).clone() for name, value in state.metric_state.items()}


def restore_state(state: EvaluationState, kept: dict[str, Tensor], rank: int) -> None:
    """Restore what `summed_state` returned, on the first process; a state of another version is dropped."""
    state.reset()
    if kept.keys() != state.metric_state.keys():
        warnings.warn(
            "The checkpoint holds the training metrics in another version's format: those of the current epoch are "
            "reset. Weights and everything else are unaffected.",
            stacklevel=3,
        )
    elif rank == 0:
        device = state.count.device
        state.merge_state({name: value.to(device) for name, value in kept.items()})


def network_only(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of another method's state, take encoder, head and what both have; keep the rest of our own."""
    network = ("encoder.", "head.")
    mine = {name: value for name, value in own.items() if not name.startswith(network)}
    return mine | {name: value for name, value in state.items() if name.startswith(network) or name in mine}


def check_has_switches(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Reject a fit from within a stage if the trainer lacks its switch."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
    have = {callback.state_key for callback in callbacks}
    for key, state in checkpoint.get("callbacks", {}).items():
        if key.startswith("StageSwitch[") and state["active"] and key not in have:
            raise ValueError(
                f"The checkpoint is in a stage begun by a {state['class_path']}, but this trainer has no such "
                "switch, so its optimiser would not fit. Resume with the switches of the training, or start a new "
                "fit from load_module(path)."
            )
