"""Small grids, and what runs them without drawing figures, which take longer than the runs."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import yaml
from lightning.pytorch import Callback

from calib_lightning.callbacks import LogFigures
from calib_lightning.commands import benchmark
from calib_lightning.posthoc import Temperature

TOY = {
    "data": {"as": "toy", "data": "ToyDataModule", "options": {"data.split": {"val": 30, "calibration": 30}}},
    "network": "digits_cnn",
    "calibrators": "Temperature",
    "options": {"trainer.max_epochs": 2, "trainer.accelerator": "cpu", "trainer.devices": 1},
}
_run = benchmark.run_command


def write_grid(folder: Path, **changes) -> Path:
    """Write ``grid.yaml``: `TOY` with other keys; ``options`` are added to its own."""
    content = {**TOY, **changes, "options": TOY["options"] | changes.get("options", {})}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def runs_of(folder: Path) -> dict[str, dict]:
    """The entries of ``benchmark.json`` by folder."""
    return {entry["folder"]: entry for entry in json.loads((folder / "benchmark.json").read_text())["runs"]}


def stages_of(run: Path) -> list[str]:
    """The stages that a run has begun."""
    return [stage["stage"] for stage in json.loads((run / "run.json").read_text())["stages"]]


def results_of(run: Path) -> dict[str, np.ndarray]:
    """Everything that a run has predicted, and the temperature."""
    found = {}
    for path in sorted((run / "predictions").glob("*.npz")):
        with np.load(path) as arrays:
            found |= {f"{path.stem}/{name}": arrays[name] for name in arrays.files}
    for path in run.glob("calibrate/report.json"):
        report = json.loads(path.read_text())
        found["temperature"] = np.array(report["calibrators"]["Temperature"]["fit"]["temperature"])
    return found


def run_without_figures(command, log, folder, environment) -> None:
    """`calib_lightning.commands.benchmark.run_command` without figures, and with a calibrator that a test breaks."""
    LogFigures.on_test_epoch_end = Callback.on_test_epoch_end
    if "TEST_BROKEN_CALIBRATOR" in environment:
        Temperature.fit_rows = _fails
    _run(command, log, folder, environment)


def _fails(*_, **__) -> None:
    raise ValueError("no temperature is right")


class Raises(Callback):
    """Fails in the first step of an epoch.

    Args:
        epoch: The epoch.
        kill: End the process instead, as the system does when memory runs out.
    """

    def __init__(self, epoch: int = 0, kill: bool = False) -> None:
        self.epoch, self.kill = epoch, kill

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the loss is\nlost")
