"""Routines of torch-uncertainty, as they come, with the callbacks and stages of this package."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning import CalibratedClassifier, Temperature
from calib_lightning.callbacks import CalibrationMonitor, PostHocCalibrate
from calib_lightning.core import StageSwitch, load_stages
from calib_lightning.methods import MaskedClassifier

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tu():
    reason = "torch-uncertainty is not installed (pip install -e '.[foreign]')"
    pytest.importorskip("torch_uncertainty.routines", reason=reason)
    import torch_uncertainty

    return torch_uncertainty


def rows(n, seed, classes):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, 1, 8, 8, generator=generator) + 0.3 * y.view(-1, 1, 1, 1), y


class Data(LightningDataModule):
    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def _loader(self, n, seed):
        return DataLoader(TensorDataset(*rows(n, seed, self.classes)), 32)

    def train_dataloader(self):
        return self._loader(256, 0)

    def val_dataloader(self):
        return self._loader(200, 1)

    def calibration_dataloader(self):
        return self._loader(300, 2)


def routine(tu, outputs):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()))
    model.add_module("fc", nn.Linear(288, outputs))
    loss = nn.CrossEntropyLoss() if outputs > 1 else nn.BCEWithLogitsLoss()
    recipe = torch.optim.SGD(model.parameters(), lr=0.02)
    return tu.routines.ClassificationRoutine(model, num_classes=outputs, loss=loss, optim_recipe=recipe)


def fitted(tu, folder, module, *callbacks):
    run = tu.TUTrainer(
        accelerator="cpu", max_epochs=2, logger=False, callbacks=list(callbacks), default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(module, datamodule=Data(max(2, module.num_classes)))
    return run


@pytest.mark.parametrize("outputs", [3, 1])
def test_callbacks_agree_with_its_own_metrics(tu, outputs, tmp_path):
    module, calibrate = routine(tu, outputs), PostHocCalibrate(Temperature())
    run = fitted(tu, tmp_path, module, CalibrationMonitor(figures_every=0), calibrate)
    found = {key: float(value) for key, value in run.callback_metrics.items()}
    assert found["monitor/accuracy"] == pytest.approx(found["val/cls/Acc"], abs=1e-6)
    if outputs > 1:  # of a binary network it measures p of class 1
        assert found["monitor/ece"] == pytest.approx(found["val/cal/ECE"], abs=1e-5)
    images, labels = rows(300, 2, max(2, outputs))
    classifier = CalibratedClassifier(module, Temperature()).fit([(images, labels)])
    assert classifier.calibrator.temperature == pytest.approx(calibrate.calibrator.temperature, rel=1e-4)


@pytest.mark.parametrize("outputs", [3, 1])
@pytest.mark.parametrize("kind", [StageSwitch, MaskedClassifier])
def test_a_stage_of_its_own(tu, kind, outputs, tmp_path):
    module, switch = routine(tu, outputs), kind(-2, encoder="model.features", head="model.fc")
    run = fitted(tu, tmp_path, module, switch, CalibrationMonitor(figures_every=0))
    assert (run.current_epoch, switch.first_epoch) == (4, 2)
    assert {name for name, part in module.named_parameters() if part.requires_grad} == {
        "model.fc.linear.weight",
        "model.fc.linear.bias",
    }
    chance = 1 / max(2, outputs)
    assert float(run.callback_metrics["monitor/accuracy"]) > chance + 0.1
    if kind is MaskedClassifier:
        assert float(run.callback_metrics["mac_cal/accuracy"]) > chance + 0.1
    run.save_checkpoint(tmp_path / "own.ckpt")
    x, _ = rows(9, 5, 2)
    assert torch.equal(load_stages(routine(tu, outputs), tmp_path / "own.ckpt")(x), module.eval()(x))
