"""Fitted calibrators as plain data and as files; loading executes nothing."""

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
from calib_lightning.utils.stored import load_torch

FILE_KEY = "calib_lightning.calibrator"
"""Key of the record in a file of `save_calibrator`."""


class CalibratorRecord(TypedDict):
    """A calibrator as plain data, for checkpoints.

    Attributes:
        spec: How to build the calibrator.
        state: Its state dict.
    """

    spec: Spec
    state: dict[str, Any]


def calibrator_record(calibrator: Calibrator) -> CalibratorRecord:
    """Convert a calibrator to plain data and tensors on the CPU.

    Args:
        calibrator: Fitted or not.

    Returns:
        The record, which `calibrator_of` converts back.

    Example:
        >>> from calib_lightning.posthoc import FixedTemperature
        >>> calibrator_of(calibrator_record(FixedTemperature(2.0))).name
        'FixedTemperature(temperature=2.0)'
    """
    state = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in calibrator.state_dict().items()
    }
    return CalibratorRecord(spec=calibrator.spec, state=state)


def calibrator_of(record: Mapping[str, Any], where: str = "The record") -> Calibrator:
    """Build the calibrator of a record, in evaluation mode.

    Args:
        record: Result of `calibrator_record`, of this version or 0.1.
        where: Origin of the record, for messages.

    Returns:
        An equal calibrator.

    Raises:
        ValueError: Not a record, a damaged record, or one of an unknown class.

    Example:
        >>> from calib_lightning.posthoc import FixedTemperature
        >>> calibrator_of(calibrator_record(FixedTemperature(2.0))).fitted
        False
    """
    if not isinstance(record, Mapping) or not {"spec", "state"} <= set(record):
        raise ValueError(f"{where} is not that of a calibrator. Save one with save_calibrator(calibrator, path).")
    try:
        found = build(record["spec"], Calibrator)  # type: ignore[type-abstract]
        found.load_state_dict(record["state"])
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where} of a calibrator is damaged or of another version: {error}") from error
    return found.eval()


def save_calibrator(calibrator: Calibrator, path: str | Path) -> None:
    """Write a fitted calibrator to a file, completely or not at all.

    Args:
        calibrator: The calibrator.
        path: The file to write or replace; usually ``.pt``.

    Raises:
        RuntimeError: The calibrator is not fitted.
        OSError: The file cannot be written; an existing one stays unchanged.

    Example:
        >>> from calib_lightning.posthoc import FixedTemperature
        >>> calibrator = FixedTemperature(1.5).fit(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
        >>> save_calibrator(calibrator, "calibrator.pt")  # doctest: +SKIP
    """
    if not calibrator.fitted:
        raise RuntimeError(f"{type(calibrator).__name__} is not fitted, so there is nothing to save. Call fit first.")
    content = {FILE_KEY: dict(calibrator_record(calibrator))}
    write_whole(Path(path), lambda file: torch.save(content, file))


def load_calibrator(path: str | Path) -> Calibrator:
    """Read a calibrator; the file is loaded with ``weights_only=True``, so nothing in it is executed.

    Args:
        path: A file of `save_calibrator`, of this version or 0.1, or a checkpoint of a run with `PostHocCalibrate`.

    Returns:
        The fitted calibrator in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no calibrator, is damaged, or holds more than tensors and plain data.

    Example:
        >>> load_calibrator("calibrator.pt").temperature  # doctest: +SKIP
        1.5
    """
    found = calibrator_of(_read(Path(path)), f"{path}: the record")
    if not found.fitted:
        raise ValueError(f"{path}: the calibrator is not fitted. Fit it before saving.")
    return found


def _read(path: Path) -> Any:
    """Return the record in a file of `save_calibrator`, or the first one among the callbacks of a checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no calibrator {path}. Save one with save_calibrator(calibrator, path).")
    try:
        content = load_torch(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {error}. It is not read. Pass a file of save_calibrator.") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: is damaged or not a file of save_calibrator: {error}") from error
    content = content if isinstance(content, Mapping) else {}
    if FILE_KEY in content:
        return content[FILE_KEY]
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else []
    record = next((state[FILE_KEY] for state in states if isinstance(state, Mapping) and FILE_KEY in state), None)
    if record is None:
        raise ValueError(
            f"{path}: holds no calibrator. Save one with save_calibrator(calibrator, path), or train with the callback "
            "PostHocCalibrate, which warns where it cannot fit."
        )
    return record
