"""Fitted calibrators as plain data and as files; nothing in a file is executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from calib_lightning.posthoc.base import Calibrator
from calib_lightning.utils.described import Spec, build
from calib_lightning.utils.files import write_whole

FILE_KEY = "calib_lightning.calibrator"
"""What a file of `save_calibrator` holds the record under."""


class CalibratorRecord(TypedDict):
    """A calibrator as plain data, for checkpoints.

    Attributes:
        spec: How to build it.
        state: Its state dict.
    """

    spec: Spec
    state: dict[str, Any]


def calibrator_record(calibrator: Calibrator) -> CalibratorRecord:
    """Write a calibrator down as plain data and tensors on the CPU.

    Args:
        calibrator: Fitted or not.

    Returns:
        What `calibrator_of` turns back into an equal one.
    """
    state = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in calibrator.state_dict().items()
    }
    return CalibratorRecord(spec=calibrator.spec, state=state)


def calibrator_of(record: Mapping[str, Any], where: str = "The record") -> Calibrator:
    """Build the calibrator that a record describes, in evaluation mode.

    Args:
        record: Of `calibrator_record`.
        where: Whose record it is, for messages.

    Returns:
        An equal calibrator.

    Raises:
        ValueError: It is no record, or one that is damaged or of a class that is not known.
    """
    if not isinstance(record, Mapping) or not {"spec", "state"} <= set(record):
        raise ValueError(f"{where} is not that of a calibrator; save one with save_calibrator(calibrator, path).")
    try:
        found = build(record["spec"], Calibrator)  # type: ignore[type-abstract]
        found.load_state_dict(record["state"])
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where} of a calibrator is damaged or of another version: {error}") from error
    return found.eval()


def save_calibrator(calibrator: Calibrator, path: str | Path) -> None:
    """Write a fitted calibrator to a file, whole or not at all.

    Args:
        calibrator: The calibrator.
        path: The file to write or replace; ``.pt`` is customary.

    Raises:
        RuntimeError: It is not fitted.
        OSError: The file cannot be written; an older one is then as it was.
    """
    if not calibrator.fitted:
        raise RuntimeError(f"{type(calibrator).__name__} is not fitted: there is nothing to save; call fit first.")
    content = {FILE_KEY: dict(calibrator_record(calibrator))}
    write_whole(Path(path), lambda file: torch.save(content, file))


def load_calibrator(path: str | Path) -> Calibrator:
    """Read a calibrator; the file is loaded with ``weights_only=True``, so nothing in it is executed.

    Args:
        path: A file of `save_calibrator`, or a checkpoint of a training with `PostHocCalibrate`.

    Returns:
        The fitted calibrator in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a file of a calibrator, is damaged, or holds more than tensors and plain data.
    """
    found = calibrator_of(_read(Path(path)), f"{path}: the record")
    if not found.fitted:
        raise ValueError(f"{path}: holds a calibrator that is not fitted.")
    return found


def _read(path: Path) -> Any:
    """The record in a file of ours, or that of the first callback of a checkpoint that has one."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no calibrator {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and plain data, or is no file of torch.save, and is not read; give a "
            "file of save_calibrator"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: is damaged or no file of save_calibrator: {error}") from error
    content = content if isinstance(content, Mapping) else {}
    if FILE_KEY in content:
        return content[FILE_KEY]
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else []
    record = next((state[FILE_KEY] for state in states if isinstance(state, Mapping) and FILE_KEY in state), None)
    if record is None:
        raise ValueError(
            f"{path}: holds no calibrator; save one with save_calibrator(calibrator, path), or train with the callback "
            "PostHocCalibrate."
        )
    return record
