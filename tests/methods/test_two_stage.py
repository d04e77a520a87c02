"""Two stages: the encoder stays as it is, a new head learns, checkpoints of both stages come back."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam

from calib_lightning.core import LinearHead, Preemption, StageSwitch, StageTraining, StepSeed, load_module
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import DigitsDataModule, SplitSpec, ToyDataModule
from calib_lightning.methods.two_stage import TwoStage
from tests.ddp import cases


def sgd(params):
    return SGD(params, lr=0.05, momentum=0.9)


def adam(params):
    return Adam(params, lr=3e-3)


class Stages(Callback):
    """Keeps weights, buffers and figures at the end of every epoch, by stage: the last of each is what stays."""

    def __init__(self, folder=None):
        self.folder = folder
        self.states, self.figures = {}, {}

    def on_train_epoch_end(self, trainer, pl_module):
        stage = pl_module.stage
        self.states[stage] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.figures[stage] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        if self.folder is not None:
            trainer.save_checkpoint(Path(self.folder) / f"stage-{stage}.ckpt")


def part(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def equal(one, two):
    """Whether two dicts of tensors are the same, bit for bit."""
    return bool(one) and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def images(count=40):
    data = ToyDataModule(test_size=count)
    data.prepare_data()
    data.setup("test")
    return torch.cat([batch.image for batch in data.test_dataloader()[0]])


def fit_stopped(folder, module, epochs, stop_after=None, resume=False):
    """Toy images, four steps an epoch; stopped after a step, resumed from ``last.ckpt``, or neither."""
    seed_everything(11, workers=True)
    module = module()
    data = ToyDataModule(SplitSpec(val=31), batch_size=32, train_size=130)
    preemption = Preemption(folder)
    watch = cases.Watch(preemption, stop_after)
    keep = ModelCheckpoint(folder, filename="best", save_last=True, save_on_train_epoch_end=True)
    run = cases.trainer(folder, 1, [StepSeed(), watch, preemption, keep], max_epochs=epochs)
    stopped = None
    try:
        run.fit(module, datamodule=data, ckpt_path=str(Path(folder) / "last.ckpt") if resume else None)
    except Preempted as leaving:
        stopped = leaving.code
    os.environ.pop("PL_GLOBAL_SEED", None)
    return {"stopped": stopped, "digest": cases.digest(module), "stage": module.stage}


def check_resumed(folder, module, epochs, stop_after, stage):
    """A run that is stopped and resumed ends in the same bits as one that is not."""
    whole = fit_stopped(str(folder / "whole"), module, epochs)
    stopped = fit_stopped(str(folder / "part"), module, epochs, stop_after)
    resumed = fit_stopped(str(folder / "part"), module, epochs, resume=True)
    assert (stopped["stopped"], stopped["stage"]) == (143, stage)
    assert stopped["digest"] != whole["digest"]
    assert resumed == whole


# --- the method ------------------------------------------------------------------------------------------------------


def test_default_is_a_linear_head_for_the_last_forty_epochs():
    switch = TwoStage(3, encoder="digits_cnn").switch
    optimizer = switch.training.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (switch.at_epoch, switch.classifier, type(optimizer)) == (-40, LinearHead, SGD)
    assert [optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 5e-4]


def test_digits_keep_their_accuracy_and_the_encoder_its_bits(fit):
    torch.manual_seed(0)
    module = TwoStage(10, StageSwitch(-3, training=StageTraining(sgd)), encoder="digits_cnn", optimizer=sgd)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    stages = Stages()
    fit(module, DigitsDataModule(batch_size=32), epochs=8, callbacks=[stages])
    first, second = stages.states[0], stages.states[1]
    assert equal(part(first, "encoder."), part(second, "encoder."))
    assert not equal(part(first, "encoder."), part(before, "encoder."))
    # a fresh head, not the trained one
    assert not torch.allclose(first["head.linear.weight"], second["head.linear.weight"], atol=0.05)
    assert stages.figures[0]["val/accuracy"] > 0.85
    assert stages.figures[1]["val/accuracy"] > stages.figures[0]["val/accuracy"] - 0.05


def test_checkpoints_of_both_stages_come_back(fit, tmp_path):
    switch = StageSwitch(-1, training=StageTraining(sgd))
    module = TwoStage(3, switch, encoder="digits_cnn", optimizer=sgd)
    fit(module, ToyDataModule(batch_size=16, train_size=64), epochs=2, callbacks=[Stages(tmp_path)])
    loaded = [load_module(tmp_path / f"stage-{stage}.ckpt") for stage in (0, 1)]
    assert [(type(one), one.stage) for one in loaded] == [(TwoStage, 0), (TwoStage, 1)]
    with torch.no_grad():
        first, second = (one(images()) for one in loaded)
        assert torch.equal(second, module.eval()(images()))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("stop_after", "stage"), [(6, 0), (9, 1), (14, 1)])
def test_resumed_run_is_bit_equal(tmp_path, stop_after, stage):
    def module():
        switch = StageSwitch(2, training=StageTraining(sgd))
        return TwoStage(3, switch, encoder="digits_cnn", optimizer=sgd)

    check_resumed(tmp_path, module, 4, stop_after, stage)


@pytest.mark.parametrize("wrong", [-40, LinearHead, StageTraining()])
def test_other_switches_are_refused(wrong):
    with pytest.raises(TypeError, match=r"switch of TwoStage is .*StageSwitch\(-40\)"):
        TwoStage(3, wrong, encoder="digits_cnn")
