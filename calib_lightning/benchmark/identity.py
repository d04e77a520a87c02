"""What a run is: the part of its configuration that changes results, and how its first stage is trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_NO_RESULT = {
    "": ("run_dir", "ckpt_path", "quiet", "log_all", "log_limit"),
    "trainer": (
        *("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "log_every_n_steps"),
        *("profiler", "default_root_dir", "barebones", "enable_autolog_hparams", "model_registry"),
    ),
    "data.init_args": ("download", "num_workers"),
}
"""Settings that change no result."""

OWN_FILES = {"FolderDataModule": "root", "ArraysDataModule": "file"}
"""Data of ours whose place says what it is; the files of the others are those of their benchmark, wherever they are."""

_STAGED = ("TwoStage", "TST", "VTST", "MaCCal", "ConfidNet")
"""Methods whose first stage is a training with cross-entropy, step for step."""

_BASE = "calib_lightning.methods.CrossEntropy"
_BASE_ARGUMENTS = ("encoder", "optimizer", "scheduler", "batch_transform")
_SWITCHES = ("StageSwitch", "MaskedClassifier")


def content_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that changes results.

    Args:
        config: The content of its ``config.yaml``.

    Returns:
        The configuration without the rest, and without what is null: an option that a later version of this package
        adds does not make every run another one.

    Example:
        >>> content_of({"seed_everything": 0, "quiet": True, "trainer": {"logger": None, "max_epochs": 3}})
        {'seed_everything': 0, 'trainer': {'max_epochs': 3}}
    """
    found = _said(json.loads(json.dumps(config, default=str)))
    for place, names in _NO_RESULT.items():
        part = found
        for key in filter(None, place.split(".")):
            part = part.get(key) or {}
        for name in names:
            part.pop(name, None)
    package, _, name = str((found.get("data") or {}).get("class_path", "")).rpartition(".")
    if package == "calib_lightning.data":
        settings, own = found["data"].get("init_args") or {}, OWN_FILES.get(name)
        if own is None:
            settings.pop("root", None)
        elif own in settings:  # as runs write it down, and as their command lines do
            settings[own] = str(Path(settings[own]).expanduser().resolve())
    return dict(found)


def _said(value: Any) -> Any:
    """Plain data without the keys that are null."""
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items() if item is not None}
    return [_said(item) for item in value] if isinstance(value, list) else value


def digest(*parts: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def first_stage(content: dict[str, Any]) -> tuple[str, bool] | None:
    """How the first stage of a run is trained.

    Args:
        content: What `content_of` returns.

    Returns:
        A hash that is equal for runs whose first stages are equal, bit for bit, and whether another stage follows; None
        if this is not known of the run.
    """
    model, trainer = content.get("model") or {}, dict(content.get("trainer") or {})
    arguments = dict(model.get("init_args") or {})
    callbacks = trainer.pop("callbacks", None) or []
    epochs = trainer.get("max_epochs")
    if not isinstance(epochs, int) or epochs < 1 or trainer.get("max_steps", -1) != -1 or trainer.get("max_time"):
        return None
    own = model.get("class_path") in {f"calib_lightning.methods.{name}" for name in _STAGED}
    if own:
        if callbacks or arguments.get("switch") is None:
            return None
        switches = [arguments[name] for name in ("switch", "tuning") if arguments.get(name) is not None]
        model = {"class_path": _BASE, "init_args": {key: arguments[key] for key in _BASE_ARGUMENTS if key in arguments}}
    else:
        if not str(model.get("class_path")).startswith("calib_lightning.methods.") or "switch" in arguments:
            return None  # another module may have stages of its own
        switches = callbacks if isinstance(callbacks, list) else [callbacks]
        if any(str(switch.get("class_path")).rpartition(".")[2] not in _SWITCHES for switch in switches):
            return None  # another callback may end the training
    for switch in switches:
        settings = switch.get("init_args") or {}
        if settings.get("at_epoch", 0) >= 0 or settings.get("init_from"):
            return None  # the stage does not follow the whole of the first
    rest = {name: value for name, value in content.items() if name not in ("model", "trainer", "select_on")}
    rest.pop("test_after_fit", None)
    return digest(model, trainer, rest), bool(switches)
