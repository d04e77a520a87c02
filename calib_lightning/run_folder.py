"""Where a run's files go: a folder that is made for the run and never one that exists already."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

_ENVIRONMENT = "CALIB_RUN_FOLDER"


def create_run_folder(wanted: str | Path) -> Path:
    """Make a new folder: ``wanted``, or ``wanted-2``, ``wanted-3``, ... where that exists.

    Only rank zero makes folders. Processes that it starts learn the path from the environment; ranks started by
    another launcher get ``wanted`` itself, into which they never write.

    Args:
        wanted: Path of the folder.

    Returns:
        Path of the folder that was made.

    Raises:
        OSError: If the folder cannot be made (read-only parent, no space).
    """
    wanted = Path(wanted)
    if not _is_rank_zero():
        return Path(os.environ.get(_ENVIRONMENT, wanted))
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return use_run_folder(folder)


def use_run_folder(folder: Path) -> Path:
    """Use a folder that exists (a resumed run goes on in its own) and tell it to processes started from here."""
    if _is_rank_zero():
        os.environ[_ENVIRONMENT] = str(folder)
    return folder


def current_run_folder() -> Path | None:
    """Return the folder that this process's run uses, None before there is one."""
    folder = os.environ.get(_ENVIRONMENT)
    return Path(folder) if folder else None


def forget_run_folder() -> None:
    """Begin without a folder; a process that was started by rank zero keeps what it was told."""
    if _is_rank_zero():
        os.environ.pop(_ENVIRONMENT, None)


def run_of(path: str | Path) -> Path | None:
    """Return the run folder that a file belongs to: the nearest parent with a ``run.json``, if there is one."""
    for folder in Path(path).resolve().parents:
        if (folder / "run.json").is_file():
            return folder
    return None


def _is_rank_zero() -> bool:
    """Whether this process leads, as Lightning reads it from the environment before a process group exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON under a temporary name in the same folder, then rename, so that readers never see half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=False, default=str) + "\n")
    temporary.replace(path)
