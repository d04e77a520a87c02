"""The run folders of a benchmark: which run each of them holds, and how far it has come."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from calib_lightning.benchmark.identity import content_of, digest
from calib_lightning.utils.files import file_sha256
from calib_lightning.utils.run_folder import read_json
from calib_lightning.utils.run_lock import NAME as LOCK
from calib_lightning.utils.run_lock import RunLock

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Found:
    """A run folder.

    Args:
        path: The folder.
        content: Hash of the configuration of the run, see `content_of`.
        record: What its ``run.json`` says; empty without one.
    """

    path: Path
    content: str
    record: dict[str, Any]

    def holds(self, content: str, splits: str | None) -> bool:
        """Whether it is this run; the splits of one that ended before it had read its data are not known."""
        return self.content == content and self.record.get("splits") in (None, splits)

    @property
    def last(self) -> Path | None:
        """The checkpoint from which the run goes on."""
        path = self.path / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    @property
    def seconds(self) -> float:
        """How long its stages took."""
        return float(sum(stage.get("seconds") or 0.0 for stage in self.record.get("stages", [])))

    def is_trained(self, tested: bool) -> bool:
        """Whether training and test, if there is one, have come to their ends."""
        last = self.record["stages"][-1] if self.record.get("stages") else {}
        return last.get("status") == "finished" and (last.get("stage") == "test" or not tested)

    def calibration(self, calibrators: Iterable[str]) -> str | None:
        """The newest folder in it with a report of these calibrators, fitted to its predictions."""
        saved = self.path / "predictions" / "calibration.npz"
        reports = sorted(self.path.glob("calibrate*/report.json"), key=lambda path: -path.stat().st_mtime)
        for path in reports:
            found = read_json(path)
            files = (found.get("calibration") or {}).get("files") or [{}]
            fitted = set(calibrators) <= set(found.get("calibrators", {}))
            if fitted and saved.is_file() and files[0].get("sha256") == file_sha256(saved):
                return path.parent.name
        return None


def runs_in(folder: Path) -> list[Found]:
    """Read the run folders of a benchmark.

    Args:
        folder: The folder of the benchmark, which need not exist.

    Returns:
        Those whose configurations are all of the same run.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        configs = [*path.glob("config.yaml"), *path.glob("config-[0-9]*.yaml")]
        contents = {_content_in(config) for config in configs}
        if len(contents) == 1:
            found.append(Found(path, contents.pop(), read_json(path / "run.json")))
    return found


def best_of(found: Iterable[Found], tested: bool) -> Found | None:
    """The run folder that has come furthest."""
    return max(found, key=lambda one: (one.is_trained(tested), _epochs(one), str(one.path)), default=None)


def wait_for(folder: Path, patience: float) -> None:
    """Wait until no other process writes to a run.

    Args:
        folder: The run folder, which need not exist.
        patience: Seconds to wait.

    Raises:
        RuntimeError: If another process still writes to it.
    """
    if folder.is_dir():
        RunLock(folder, patience).release()


def remove_remains(folder: Path) -> None:
    """Remove a run folder that has no checkpoint and no predictions: nothing goes on from there."""
    if not any((folder / name).is_dir() and any((folder / name).iterdir()) for name in ("checkpoints", "predictions")):
        shutil.rmtree(folder, ignore_errors=True)


def remove_unbegun(folder: Path) -> None:
    """Remove folders in which a killed process has begun nothing."""
    for path in folder.iterdir() if folder.is_dir() else []:
        if path.is_dir() and {other.name for other in path.iterdir()} == {LOCK}:
            with suppress(RuntimeError):  # another process begins a run there
                wait_for(path, 60.0)
                if not any(path.iterdir()):
                    path.rmdir()


def free_name(folder: Path, name: str) -> Path:
    """A new folder's path: ``name``, or ``name-2``, ``name-3``, ... where that exists."""
    path, number = folder / name, 2
    while path.exists():
        path, number = folder / f"{name}-{number}", number + 1
    return path


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(os.lstat(path).st_size for path in folder.rglob("*") if path.is_file())


def _epochs(found: Found) -> int:
    return max((stage.get("epochs") or 0 for stage in found.record.get("stages", [])), default=0)


def _content_in(config: Path) -> str:
    try:
        content = yaml.load(config.read_text(encoding="utf-8"), Loader=_Loader)  # a safe one
        return digest(content_of(content))
    except (yaml.YAMLError, OSError, AttributeError, TypeError):
        return f"unreadable {config}"
