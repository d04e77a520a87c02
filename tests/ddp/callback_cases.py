"""What the tests of callbacks run on every process."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from calib_lightning.callbacks import CalibrationMonitor, PostHocCalibrate
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.posthoc import Temperature, load_calibrator
from tests.ddp.cases import trainer


class Own(LightningModule):
    """No base class of ours; batches are (image, label, index)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
        self.net(torch.zeros(1, 1, 8, 8))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)  # as made: the figures are those of one process


def monitor_and_calibrate(rank: int, world: int, folder: str, broken_rank: int | None = None) -> dict[str, Any]:
    data = ToyDataModule(SplitSpec(val=41, calibration=53), batch_size=8)
    module = Own()
    if broken_rank == rank:
        module.net.register_forward_hook(lambda net, inputs, output: output if net.training else output * torch.nan)
    calibrate = PostHocCalibrate(Temperature())
    keeper = ModelCheckpoint(folder, filename="kept")
    callbacks = [CalibrationMonitor(figures_every=0), keeper]
    if broken_rank is None:
        callbacks.append(calibrate)
    run = trainer(folder, world, callbacks, max_epochs=1)
    run.fit(module, datamodule=data)
    beta = float(calibrate.calibrator.beta) if broken_rank is None else None
    in_file = float(load_calibrator(keeper.best_model_path).beta) if broken_rank is None else None
    values = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("monitor/")}
    return {"values": values, "beta": beta, "in_file": in_file, "epoch": run.current_epoch}
