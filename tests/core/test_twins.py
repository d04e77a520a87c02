"""Modules, trainers and callbacks of ``pytorch_lightning``, which has the code of ``lightning.pytorch`` once more."""

import importlib
import os
from unittest.mock import Mock

import lightning.pytorch
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning import Temperature, load_calibrator
from calib_lightning.callbacks import CalibrationMonitor, PostHocCalibrate
from calib_lightning.core import CachedFeatures, Preemption, StageSwitch, StageTraining, StepSeed, load_stages
from calib_lightning.core.distributed import check_strategy
from calib_lightning.core.twins import is_twin
from calib_lightning.methods import MaskedClassifier
from tests.callbacks.modules import ForeignCode, loader, rows

NAMED = {"encoder": "backbone", "head": "net"}


class Deep(ForeignCode):
    def __init__(self):
        super().__init__(lr=0.05)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = nn.Linear(4, 4)

    def forward(self, x):
        return super().forward(self.backbone(x).relu())


def module_of(package):
    return type("Deep", (Deep, package.LightningModule), {})()


def data_of(package):
    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(*rows(40, 0)), 8)

        def val_dataloader(self):
            return loader(37, seed=1)

        def calibration_dataloader(self):
            return loader(50, seed=7)

    return Data()


def fitted(package, folder, *callbacks, ckpt_path=None):
    """The module after a fit, and its trainer."""
    package.seed_everything(3)
    run = package.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, callbacks=[StepSeed(), *callbacks], default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        run.fit(own := module_of(package), datamodule=data_of(package), ckpt_path=ckpt_path, weights_only=True)
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)
    return own, run


@pytest.mark.parametrize(
    "switch",
    [
        lambda: StageSwitch(-2, **NAMED),
        lambda: MaskedClassifier(-2, **NAMED),  # asks the data module for its calibration split
        lambda: MaskedClassifier(-2, **NAMED, training=StageTraining(views=CachedFeatures())),
    ],
)
def test_a_stage_trains_the_same_head_in_both(pl, switch, tmp_path):
    own, run = fitted(pl, tmp_path, switch(), Preemption())
    same, _ = fitted(lightning.pytorch, tmp_path / "same", switch(), Preemption())
    assert run.current_epoch == 5
    assert {name.partition(".")[0] for name, part in own.named_parameters() if part.requires_grad} == {"net"}
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in own.state_dict().items())
    again, (x, _) = load_stages(module_of(pl), run.checkpoint_callback.best_model_path), rows(9, 5)
    assert torch.equal(again(x), own.eval()(x))


def test_a_stage_goes_on_from_a_checkpoint(pl, tmp_path):
    every = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    own, _ = fitted(pl, tmp_path, StageSwitch(-2, **NAMED), every)
    again, _ = fitted(pl, tmp_path, StageSwitch(-2, **NAMED), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in own.state_dict().items())


def test_callbacks_of_the_twin_are_known(pl, tmp_path):
    early = pl.callbacks.EarlyStopping("foreign_loss")
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append((early.wait_count, float(early.best_score)))
            early.wait_count = 1

    fitted(pl, tmp_path, StageSwitch(2, **NAMED), early, Look())
    assert seen[2] == (0, torch.inf)  # begins anew with the head
    for averaging in (pl.callbacks.StochasticWeightAveraging(1e-2), pl.callbacks.EMAWeightAveraging()):
        with pytest.raises(ValueError, match="averages the weights of all stages"):
            fitted(pl, tmp_path, StageSwitch(2, **NAMED), averaging)


def test_every_kept_file_has_the_calibrator_of_its_own_weights(pl, tmp_path):
    keeper = pl.callbacks.ModelCheckpoint(tmp_path, filename="best", monitor="monitor/nll", mode="max")
    newest = pl.callbacks.ModelCheckpoint(tmp_path, filename="newest")
    callback = PostHocCalibrate(Temperature())
    _, run = fitted(pl, tmp_path, callback, CalibrationMonitor(), keeper, newest)
    assert float(load_calibrator(tmp_path / "newest.ckpt").beta) == float(callback.calibrator.beta)
    assert float(load_calibrator(tmp_path / "best.ckpt").beta) != float(callback.calibrator.beta)
    _, same = fitted(lightning.pytorch, tmp_path / "same", CalibrationMonitor())
    monitored = {key: value for key, value in same.callback_metrics.items() if key.startswith("monitor/")}
    assert len(monitored) > 5
    assert str({key: run.callback_metrics[key] for key in monitored}) == str(monitored)  # some are NaN


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("SingleDeviceStrategy", True), ("DDPStrategy", True), ("DeepSpeedStrategy", False), ("FSDPStrategy", False)],
)
def test_strategies(pl, name, accepted):
    for package in (lightning.pytorch, pl):
        strategy = object.__new__(getattr(package.strategies, name))  # without what its set-up needs
        if accepted:
            check_strategy(Mock(strategy=strategy), "A switch")
            continue
        with pytest.raises(ValueError, match=f"The strategy is {name}, under which A switch cannot freeze"):
            check_strategy(Mock(strategy=strategy), "A switch")


def test_twins_have_the_same_place_and_not_just_the_same_name(pl):
    class ModelCheckpoint(pl.Callback):
        pass

    class Own(pl.callbacks.ModelCheckpoint):
        pass

    wanted = lightning.pytorch.callbacks.ModelCheckpoint
    assert is_twin(Own(), wanted)
    assert is_twin(wanted(), wanted)
    assert not is_twin(ModelCheckpoint(), wanted)
    for package in ("lightning.fabric", "lightning_fabric"):
        environment = importlib.import_module(f"{package}.plugins.environments").SLURMEnvironment
        assert is_twin(object.__new__(environment), lightning.fabric.plugins.environments.SLURMEnvironment)
