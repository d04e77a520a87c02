"""Weights that are not finite replace no checkpoint, and the user is told."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from calib_lightning.callbacks import RunCheckpoint
from calib_lightning.core import ClassificationModule, Preemption, StepSeed, finite
from calib_lightning.core.finite import DivergedError
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import SplitSpec, ToyDataModule
from tests.ddp.cases import sgd, trainer
from tests.ddp.pool import ProcessPool

PLACES = {"a weight": "head.linear.weight", "a running variance": "encoder.network.stem.1.running_var"}


class Quiet(ClassificationModule):
    """Its loss and metrics do not notice what the weights are."""

    classifies = False

    def loss(self, batch):
        zero = sum(torch.nan_to_num(parameter).sum() for parameter in self.parameters()) * 0
        return zero, torch.zeros(len(batch.label), 3)


class Poison(Callback):
    """Writes a value into the state after a step, as a gradient that overflows does; may then ask for a stop."""

    def __init__(self, name, value=torch.nan, step=5, rank=0, then=None):
        self.name, self.value, self.step, self.rank, self.then = name, value, step, rank, then

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            pl_module.state_dict()[self.name].view(-1)[0] = self.value
            if self.then:
                self.then()


def module(cls=Quiet):
    seed_everything(3)
    os.environ.pop("PL_GLOBAL_SEED", None)
    return cls(3, encoder="digits_cnn", optimizer=sgd)


def fit(folder, own, callbacks, world=1, **options):
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=64 * world)
    run = trainer(folder, world, [StepSeed(), *callbacks], max_epochs=3, limit_val_batches=0, **options)
    run.fit(own, datamodule=data)
    return run


def saved(path):
    file = torch.load(path, weights_only=True)
    return file["global_step"], all(bool(value.isfinite().all()) for value in file["state_dict"].values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", PLACES)
def test_the_end_of_an_epoch_leaves_the_last_finite_checkpoint(tmp_path, place, value):
    keeper = RunCheckpoint(tmp_path, "last")
    name = PLACES[place]
    with pytest.raises(
        DivergedError, match=rf"not finite after step 6 \({name}\).* as they were.* lower learning rate"
    ):
        fit(tmp_path, module(), [Poison(name, value), keeper])
    assert saved(tmp_path / "last.ckpt") == (4, True)


@pytest.mark.parametrize("options", [{"save_last": True}, {"save_top_k": -1}, {"every_n_train_steps": 2}])
def test_lightning_s_own_callback_is_no_exception(tmp_path, options):
    with pytest.raises(DivergedError):
        fit(tmp_path, module(), [Poison(PLACES["a weight"]), ModelCheckpoint(tmp_path, **options)])
    files = [saved(path) for path in tmp_path.glob("*.ckpt")]
    assert files
    assert all(finite for _, finite in files)


def test_a_stop_leaves_the_last_finite_checkpoint_and_says_so(tmp_path, caplog):
    preemption = Preemption(tmp_path)

    def stop():
        preemption._leave_wanted = 143

    keeper, poison = RunCheckpoint(tmp_path, "last"), Poison(PLACES["a weight"], then=stop)
    with caplog.at_level("INFO"), pytest.raises(Preempted) as left:
        fit(tmp_path, module(), [poison, preemption, keeper])
    assert left.value.code == 143
    assert saved(tmp_path / "last.ckpt") == (4, True)
    said = [record.message for record in caplog.records if "Stop requested" in record.message]
    assert len(said) == 1
    assert "exiting with code 143 without a checkpoint. The weights are not finite after step 5" in said[0]


def test_a_wish_to_save_ends_a_run_that_has_diverged(tmp_path):
    preemption = Preemption(tmp_path)

    def wish():
        preemption._save_wanted = True

    with pytest.raises(DivergedError):
        fit(tmp_path, module(), [Poison(PLACES["a weight"], then=wish), preemption, RunCheckpoint(tmp_path, "last")])
    assert saved(tmp_path / "last.ckpt") == (4, True)


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return torch.nan_to_num(self.net(batch)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("guard", ["Preemption", "RunCheckpoint"])
def test_a_module_of_somebody_elses_is_guarded_by_either_callback(tmp_path, guard):
    keep = RunCheckpoint(tmp_path, "last") if guard == "RunCheckpoint" else ModelCheckpoint(tmp_path, "last")
    own = [Preemption(tmp_path)] if guard == "Preemption" else []
    run = trainer(tmp_path, 1, [Poison("net.weight"), *own, keep], max_epochs=3)
    with pytest.raises(DivergedError):
        run.fit(Foreign(), DataLoader(torch.ones(8, 2), 2))
    assert saved(tmp_path / "last.ckpt") == (4, True)


def test_weights_alone_are_guarded_too(tmp_path):
    """Lightning calls no hook of a callback when it saves weights only."""
    keep = ModelCheckpoint(tmp_path, "last", save_weights_only=True)
    run = trainer(tmp_path, 1, [Poison("net.weight"), Preemption(tmp_path), keep], max_epochs=3)
    with pytest.raises(DivergedError):
        run.fit(Foreign(), DataLoader(torch.ones(8, 2), 2))
    assert saved(tmp_path / "last.ckpt") == (4, True)


def test_each_save_is_checked_once(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(finite, "_check_finite", lambda run: found.append(run.global_step))
    keepers = [RunCheckpoint(tmp_path, "last"), ModelCheckpoint(tmp_path, "other")]
    fit(tmp_path, module(), [Preemption(tmp_path), *keepers])
    assert found == [2, 2, 4, 4, 6, 6]


def test_a_mask_may_be_infinite(tmp_path):
    own = module()
    own.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    own.register_buffer("best", torch.tensor(torch.nan))
    own.bias = nn.Parameter(torch.tensor(-torch.inf), requires_grad=False)
    own.many = nn.Parameter(torch.full((4,), 60000.0, dtype=torch.float16))  # finite, but not its sum
    fit(tmp_path, own, [Preemption(tmp_path), RunCheckpoint(tmp_path, "last")])
    assert saved(tmp_path / "last.ckpt") == (6, False)


def _fit_in_pool(rank: int, world: int, folder: Path) -> str:
    try:
        # in the last step: DDP gives all processes the statistics of the first before the next one
        poison = Poison(PLACES["a running variance"], step=6, rank=1)
        fit(folder, module(), [poison, RunCheckpoint(folder, "last")], world)
    except DivergedError as error:
        return str(error)
    return "saved"


def test_two_processes_refuse_alike_where_one_of_them_has_diverged(tmp_path: Path, pool2: ProcessPool) -> None:
    first, second = pool2.run(_fit_in_pool, tmp_path)
    assert "(on another process)" in first
    assert f"({PLACES['a running variance']})" in second
    assert saved(tmp_path / "last.ckpt") == (3, True)


@pytest.mark.parametrize("saved_before", [False, True])
def test_a_training_that_diverges_is_named_with_epoch_step_and_what_to_try(tmp_path, saved_before):
    class Diverging(ClassificationModule):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            if self.current_epoch == saved_before:  # as a learning rate that is too large
                for group in self.trainer.optimizers[0].param_groups:
                    group["lr"] = 1e30

    keep = [ModelCheckpoint(tmp_path)] if saved_before else []
    epoch = int(saved_before)
    kept = "Checkpoints from before are as they were" if saved_before else "Start again"
    said = rf"in epoch {epoch}, at step {2 * epoch + 1}: .* not finite\. {kept}.* lower learning rate, ClipGradients"
    with pytest.raises(DivergedError, match=said):
        fit(tmp_path, module(Diverging), keep)


@pytest.mark.parametrize("where", ["training", "validation", "sanity check"])
def test_images_that_are_not_finite_are_no_divergence(tmp_path, where):
    good, bad = torch.zeros(8, 1, 8, 8), torch.zeros(8, 1, 8, 8)
    bad[6, 0, 3, 3] = torch.nan
    first, second = (
        DataLoader([(image, 0, i) for i, image in enumerate(images)], batch_size=8)
        for images in ((bad, good) if where == "training" else (good, bad))
    )
    run = trainer(tmp_path, 1, [], max_epochs=1)
    run.num_sanity_val_steps = int(where == "sanity check")
    with pytest.raises(ValueError, match=r"1 of 8 images of a batch .* nan or infinite, the first in row 6"):
        run.fit(module(ClassificationModule), first, second)


def test_a_device_that_reports_late_names_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("calib_lightning.metrics.devices.checks_at_once", lambda device: False)
    own = module(ClassificationModule)
    with pytest.raises(DivergedError, match="diverged in epoch 2, at step 6: the weights are not finite"):
        fit(tmp_path, own, [Poison(PLACES["a weight"], step=5)])
