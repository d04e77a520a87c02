"""Where a run's files go: a folder that is made for the run and never one that exists already."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from calib_lightning.utils.files import numbered_folder, remove_leftovers, write_text
from calib_lightning.utils.run_lock import RunLock

_ENVIRONMENT = "CALIB_RUN_FOLDER"
_locks: list[RunLock] = []  # of this process's run, if it leads one


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
    return use_run_folder(numbered_folder(wanted))


def use_run_folder(folder: Path, patience: float = 0.0) -> Path:
    """Use a folder that exists (a resumed run goes on in its own) and tell it to processes started from here.

    Rank zero holds a lock on it until `leave_run_folder`, and removes what killed writers left in it.

    Args:
        folder: The folder.
        patience: Seconds to wait for another process that writes to it and is about to end.

    Returns:
        The folder.

    Raises:
        RuntimeError: If another process writes to it.
    """
    if _is_rank_zero():
        leave_run_folder()
        _locks.append(RunLock(folder, patience))
        remove_leftovers(folder.rglob("*.tmp"))
        os.environ[_ENVIRONMENT] = str(folder)
    return folder


def leave_run_folder() -> None:
    """Let other processes write to the folder of this process's run."""
    while _locks:
        _locks.pop().release()


def job_id() -> str | None:
    """Return the number of this job, which it keeps when it is started again: torchrun's id, else SLURM's number."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    return os.environ.get("SLURM_JOB_ID") or None if job in (None, "", "none") else job  # "none": no id was given


def current_run_folder() -> Path | None:
    """Return the folder that this process's run uses, None before there is one."""
    folder = os.environ.get(_ENVIRONMENT)
    return Path(folder) if folder else None


def forget_run_folder() -> None:
    """Begin without a folder; a process that was started by rank zero keeps what it was told."""
    if _is_rank_zero():
        os.environ.pop(_ENVIRONMENT, None)


def run_of(path: str | Path) -> Path | None:
    """Return the run folder that a file belongs to: one of the four folders above it that has a ``run.json``."""
    for folder in Path(path).resolve().parents[:4]:
        if (folder / "run.json").is_file():
            return folder
    return None


def calibrators_of(run: Path) -> dict[str, Path]:
    """Return the newest file of each calibrator that `calib calibrate` has fitted to a run, by the name of the file."""
    found = sorted(run.glob("calibrate*/*.pt"), key=lambda path: (path.parent.stat().st_mtime, path.name))
    return {path.stem: path for path in found}


def newest_config(folder: Path) -> Path | None:
    """Return the configuration of a run's last fit: ``config.yaml``, or that of a resume, ``config-2.yaml``, ..."""
    found = [*folder.glob("config.yaml"), *folder.glob("config-[0-9]*.yaml")]
    return max(found, key=lambda path: int(path.stem.removeprefix("config").strip("-") or 1), default=None)


def _is_rank_zero() -> bool:
    """Whether this process leads, as Lightning reads it from the environment before a process group exists."""
    from lightning.pytorch.utilities import rank_zero_only  # here: it takes seconds, and `run_of` needs none of it

    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that readers never see half a file; undefined numbers become null, as JSON has no NaN."""
    text = json.dumps(_plain(content), indent=2, default=str, allow_nan=False, ensure_ascii=False) + "\n"
    # names of files that are not UTF-8 have characters that cannot be written as they are
    write_text(path, re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing, damaged or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
