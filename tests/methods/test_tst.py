"""TST: its head, and the switch that brings it."""

import functools

import numpy as np
import pytest
import torch
from torch.optim import Adam

from calib_lightning.core import LinearHead, StageSwitch, StageTraining, build_head, load_module
from calib_lightning.data import DigitsDataModule, ToyDataModule
from calib_lightning.methods.tst import TST, TSTHead
from tests.methods.test_two_stage import Stages, adam, check_resumed, equal, images, part, sgd

# --- the head --------------------------------------------------------------------------------------------------------


def test_head_equals_the_equation():
    torch.manual_seed(0)
    head, features = TSTHead(7, 4, width=5), torch.randn(6, 7)
    weights = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}
    hidden = np.maximum(features.numpy() @ weights["bottleneck.0.weight"].T + weights["bottleneck.0.bias"], 0)
    narrow = hidden @ weights["bottleneck.2.weight"].T + weights["bottleneck.2.bias"]
    expected = narrow @ weights["classifier.weight"].T + weights["classifier.bias"]
    np.testing.assert_allclose(head(features).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (narrow < 0).any()  # no activation before the last layer


def test_size_of_the_head():
    # WRN-28-10 on CIFAR-10: 640 -> 384 -> 128 -> 10
    shapes = [tuple(p.shape) for p in TSTHead(640, 10).parameters()]
    assert shapes == [(384, 640), (384,), (128, 384), (128,), (10, 128), (10,)]
    assert sum(p.numel() for p in TSTHead(640, 10).parameters()) == 246_144 + 49_280 + 1_290


def test_head_is_rebuilt_from_its_spec():
    head = TSTHead(7, 4, width=5)
    again = build_head(head.spec)
    again.load_state_dict(head.state_dict())
    features = torch.randn(3, 7)
    assert torch.equal(again(features), head(features))


def test_impossible_width_is_named():
    with pytest.raises(ValueError, match="width is 0"):
        TSTHead(7, 4, width=0)


# --- the method ------------------------------------------------------------------------------------------------------


def _switch(at_epoch, width=32, **options):
    return StageSwitch(at_epoch, functools.partial(TSTHead, width=width), StageTraining(adam, **options))


def test_default_is_that_of_the_paper():
    switch = TST(3, encoder="digits_cnn").switch
    optimizer = switch.training.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (switch.at_epoch, switch.classifier, switch.training.batch_size) == (-40, TSTHead, 256)
    assert (type(optimizer), optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (Adam, 1e-4, 0)


def test_digits_keep_their_accuracy_and_the_encoder_its_bits(fit):
    torch.manual_seed(0)
    module = TST(10, _switch(-4), encoder="digits_cnn", optimizer=sgd)
    stages = Stages()
    fit(module, DigitsDataModule(batch_size=32), epochs=9, callbacks=[stages])
    assert equal(part(stages.states[0], "encoder."), part(stages.states[1], "encoder."))
    assert stages.figures[0]["val/accuracy"] > 0.85
    assert stages.figures[1]["val/accuracy"] > stages.figures[0]["val/accuracy"] - 0.05


@pytest.mark.parametrize("frozen_bn", ["eval", "train"])
def test_statistics_go_on_only_in_the_literal_reading(fit, frozen_bn):
    module = TST(3, _switch(-1, frozen_bn=frozen_bn), encoder="digits_cnn", optimizer=sgd)
    stages = Stages()
    fit(module, ToyDataModule(batch_size=16, train_size=64), epochs=2, callbacks=[stages])
    first, second = (part(state, "encoder.") for state in stages.states.values())
    moved = {name.rpartition(".")[2] for name in first if not torch.equal(first[name], second[name])}
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert moved == (set() if frozen_bn == "eval" else statistics)


def test_checkpoint_brings_the_head_with_its_width(fit, tmp_path):
    module = TST(3, _switch(-1, width=7), encoder="digits_cnn", optimizer=sgd)
    fit(module, ToyDataModule(batch_size=16, train_size=64), epochs=2, callbacks=[Stages(tmp_path)])
    loaded = load_module(tmp_path / "stage-1.ckpt")
    assert loaded.head.spec["init_args"] == {"in_features": 96, "num_classes": 3, "width": 7}
    with torch.no_grad():
        assert torch.equal(loaded(images()), module.eval()(images()))
    assert type(load_module(tmp_path / "stage-0.ckpt").head) is LinearHead


@pytest.mark.parametrize(("stop_after", "stage"), [(6, 0), (10, 1)])
def test_resumed_run_is_bit_equal(tmp_path, stop_after, stage):
    check_resumed(tmp_path, lambda: TST(3, _switch(2), encoder="digits_cnn", optimizer=sgd), 4, stop_after, stage)


def test_other_switches_and_heads_are_refused():
    with pytest.raises(TypeError, match=r"switch of TST is -40.*StageSwitch\(-40, TSTHead\)"):
        TST(3, -40, encoder="digits_cnn")
    with pytest.raises(TypeError, match=r"builds a LinearHead.*TSTHead.*TwoStage"):
        TST(3, StageSwitch(-40), encoder="digits_cnn")


def test_the_look_at_the_head_draws_no_random_numbers():
    torch.manual_seed(0)
    TST(3, encoder="digits_cnn")
    after = torch.rand(1)
    torch.manual_seed(0)
    TST(3, _switch(-5, width=3), encoder="digits_cnn")
    assert torch.rand(1) == after
