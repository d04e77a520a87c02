"""Cost and environment of a run, in ``run.json``."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from calib_lightning.core.data_facts import class_names_of
from calib_lightning.core.own_data import rows_in
from calib_lightning.utils.run_folder import job_id, newest_config, write_json
from calib_lightning.utils.seeding import run_seed
from calib_lightning.utils.stopping import Stopped

_PACKAGES = ("calib-lightning", "torch", "lightning", "torchmetrics", "torchvision", "timm", "numpy", "scikit-learn")


def uses_calibration(trainer: Trainer) -> list[str]:
    """Names of the callbacks that train on the calibration split, which is then not independent of the network."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
    return [type(callback).__name__ for callback in callbacks if getattr(callback, "uses_calibration", False)]


class RunRecord(Callback):
    """Writes ``run.json``: seconds per stage, images per second, peak memory, versions, revision, results.

    The file is written at the start of the run and after every epoch and stage, so an aborted run leaves one too; a
    resumed run appends its stages.

    Args:
        folder: The run folder.
        keeper: The callback that selects the checkpoint of a fit.
        trained_in: Folder of the run that trained the network; its splits must equal those of the data.
    """

    def __init__(
        self, folder: str | Path, keeper: ModelCheckpoint | None = None, trained_in: Path | None = None
    ) -> None:
        self.path = Path(folder) / "run.json"
        self.keeper, self.trained_in = keeper, trained_in
        self._record: dict[str, Any] = {}
        self._started = 0.0
        self._images = 0
        self._training_seconds = 0.0
        self._clock = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record what is known before the stage begins."""
        if not self._record:
            # Only the first rank knows the folder if another program than Lightning has started the ranks.
            older = json.loads(self.path.read_text()) if trainer.is_global_zero and self.path.is_file() else None
            self._record = trainer.strategy.broadcast(older or {}) or {"job": job_id(), "stages": []}
        self._record_splits(trainer)
        names = class_names_of(getattr(trainer, "datamodule", None))
        if names is not None:
            self._record["class_names"] = list(names)
        begun = {"stage": str(getattr(stage, "value", stage)), "status": "started"}
        config = newest_config(self.path.parent)
        if config is not None:
            begun["config"] = config.name
        self._record["stages"].append(begun | environment(trainer))
        self._started = time.perf_counter()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        self._write(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the training clock."""
        self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += rows_in(batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the training clock: validation is not training."""
        self._stop_clock()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the training clock, or record the results of ``validate``."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._finish_evaluation(trainer)
        else:
            self._clock = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the progress of the run."""
        self._stop_clock()
        self._finish_stage(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the fit's cost and the selected checkpoint."""
        if self.keeper is not None and self.keeper.best_model_path:
            self._record["checkpoint"] = {
                "select_on": self.keeper.monitor or "last",
                "path": self._relative(self.keeper.best_model_path),
            }
        used = uses_calibration(trainer)
        if used:
            self._record["calibration_used_by"] = used
        self._finish_stage(trainer, "finished")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the results of ``test``."""
        self._finish_evaluation(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the stage's cost."""
        self._finish_stage(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record why the stage ended."""
        if not self._record.get("stages"):
            return  # it ended before the stage began
        stage, name = self._record["stages"][-1], str(getattr(trainer.state.fn, "value", trainer.state.fn))
        if stage["status"] == "finished" and stage["stage"] != name:  # the next one had not come to `setup`
            self._record["stages"].append({"stage": name})
            self._started = time.perf_counter()
        reason = f"{type(exception).__name__}: {exception}".rstrip(": ")
        try:
            self._finish_stage(trainer, f"stopped by {exception if isinstance(exception, Stopped) else reason}")
        except OSError:  # a full disk, of which the exception tells
            if trainer.is_global_zero:
                _mark_stopped(self.path)

    def _relative(self, path: str) -> str:
        """A path inside the run folder becomes relative, so that the folder can be moved."""
        folder = self.path.parent.resolve()
        inside = Path(path).resolve()
        return inside.relative_to(folder).as_posix() if inside.is_relative_to(folder) else path

    def _record_splits(self, trainer: Trainer) -> None:
        """Save the rows of every split once; reject changed splits."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "save_splits"):
            return
        data, found = datamodule.identity, datamodule.splits_hash
        if self.trained_in is not None:
            check_data_of_run(self.trained_in, datamodule)
        if self._record.get("splits") is None:
            self._record |= {"data": data, "splits": found, "share": datamodule.split.share}
            self._record["images"] = datamodule.image_facts
            if trainer.is_global_zero:
                datamodule.save_splits(self.path.with_name("splits.npz"))
        asked = getattr(datamodule, "asked_others", {})
        if asked or "others" in self._record:
            self._record["others"] = asked | {"notes": datamodule.other_notes}
        _check_splits(self._record, data, found, self.path.parent)

    def _finish_evaluation(self, trainer: Trainer) -> None:
        self._record["results"] = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
        self._finish_stage(trainer, "finished")

    def _stop_clock(self) -> None:
        if self._clock:
            self._training_seconds += time.perf_counter() - self._clock
            self._clock = 0.0

    def _finish_stage(self, trainer: Trainer, status: str) -> None:
        stage = self._record["stages"][-1]
        stage["status"] = status
        stage["seconds"] = round(time.perf_counter() - self._started, 3)
        if stage["stage"] == "fit":
            stage["epochs"] = trainer.current_epoch
            stage["steps"] = trainer.global_step
            images = self._images * trainer.world_size
            stage["images_per_second"] = round(images / self._training_seconds, 1) if self._training_seconds else None
        stage["peak_memory_mib"] = _peak_memory_mib(trainer.strategy.root_device)
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            write_json(self.path, self._record)


def _mark_stopped(path: Path) -> None:
    """Say in a record that its last stage was stopped, in place: words of the same length need no space."""
    with contextlib.suppress(OSError):
        last = path.read_bytes().rpartition(b'"status": "')
        if last[0] and last[2].startswith((b'running"', b'started"')):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                os.lseek(descriptor, len(last[0]) + len(last[1]), os.SEEK_SET)
                os.write(descriptor, b"stopped")
            finally:
                os.close(descriptor)


def check_data_of_run(run: Path, datamodule: Any) -> None:
    """Reject data whose held-out images a network may have been trained on; warn about a different preparation."""
    record = json.loads((run / "run.json").read_text())
    _check_splits(record, datamodule.identity, datamodule.splits_hash, run)
    known, found = record.get("images"), datamodule.image_facts
    other = [name for name in ("shape", "mean", "std") if known and known[name] != found[name]]
    if other:
        said = ", ".join(f"{name} is {found[name]} instead of {known[name]}" for name in other)
        rank_zero_warn(f"The images are prepared differently from those that the network was trained on: {said}.")


def _check_splits(record: dict[str, Any], data: str, found: str, folder: Path) -> None:
    """Reject other splits of the same data; other data (a shifted test set, say) has its own splits."""
    known = record.get("splits")
    if known is not None and record.get("data") == data and known != found:
        raise ValueError(
            f"The splits of the data ({found[:12]}) differ from those of the run in {folder} ({known[:12]}): held-out "
            "images would be trained on, or training images treated as held-out. Use the data and split settings of "
            "its config.yaml, or train a new network."
        )


def environment(trainer: Trainer) -> dict[str, Any]:
    """Return seed, devices, versions and git revision."""
    return {
        "seed": run_seed(),
        "world_size": trainer.world_size,
        "device": _device_name(trainer),
        "threads": torch.get_num_threads(),
        "versions": _versions() | {"torch": str(torch.__version__)},  # with the CUDA build
        "revision": _revision(),
    }


def _device_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@functools.cache
def _revision() -> str | None:
    """Git revision of the package's checkout, with ``+changes`` if files differ from it; ``None`` elsewhere."""
    clone = Path(__file__).resolve().parents[2]
    try:
        # an environment inside another project's checkout must not report that revision
        if Path(_git(clone, "rev-parse", "--show-toplevel")).resolve() != clone:
            return None
        return _git(clone, "describe", "--always", "--dirty=+changes", "--abbrev=40") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _peak_memory_mib(device: torch.device) -> dict[str, float | None]:
    memory: dict[str, float | None] = {"process": None, "device": None}
    if sys.platform != "win32":
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        memory["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    if device.type == "cuda":
        memory["device"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return memory
