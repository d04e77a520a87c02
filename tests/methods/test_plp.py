"""PLP: the published schedule, and tensors that stay as they are while others move."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

from calib_lightning.core import LinearHead, Preemption, StepSeed, build_encoder
from calib_lightning.core.encoders import NoBlocksError
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods.plp import PLP, block_cuts, peeling_epochs
from tests.ddp import cases

# --- the schedule ----------------------------------------------------------------------------------------------------


def test_published_starts():
    assert peeling_epochs(11, 350) == [0, 31, 63, 95, 127, 159, 190, 222, 254, 286, 318]


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("groups", "epochs"), [(10, 350), (4, 100), (10, 100), (7, 30)])
def test_starts_round_down_the_exact_quotient(groups, epochs, gamma):
    exact = {
        0.5: lambda j: math.isqrt(j * epochs**2 // groups),
        1.0: lambda j: j * epochs // groups,
        2.0: lambda j: j * j * epochs // groups**2,
    }[gamma]
    assert peeling_epochs(groups, epochs, gamma) == [0] + [max(1, exact(j)) for j in range(1, groups)]


def test_nothing_is_frozen_in_the_first_epoch_of_a_short_run():
    assert peeling_epochs(4, 2) == [0, 1, 1, 1]
    assert peeling_epochs(4, 1) == [0, 1, 1, 1]


# --- the groups ------------------------------------------------------------------------------------------------------


def _tops(name, cuts):
    """The module whose tensor is the last of each group."""
    encoder = build_encoder(name)
    names = [n for n, _ in encoder.named_parameters()] + ["head.weight", "head.bias"]
    assert len(names) == cuts[-1]
    return [names[cut - 1].removeprefix("network.").rpartition(".")[0] for cut in cuts]


def test_published_cuts_fit_our_encoders():
    small, large = (PLP(10, encoder=name).cuts for name in ("resnet18_cifar", "resnet50_cifar"))
    assert (len(small), small[-1], len(large), large[-1]) == (11, 62, 11, 161)
    assert _tops("resnet18_cifar", small) == [
        "stem.1",
        *("stage1.0.bn2", "stage1.1.bn2"),
        *("stage2.0.downsample.1", "stage2.1.bn2"),
        *("stage3.0.downsample.1", "stage3.1.bn2"),
        # in the last block one convolution after the other
        *("stage4.0.downsample.1", "stage4.1.bn1", "stage4.1.bn2"),
        "head",
    ]
    assert _tops("resnet50_cifar", large) == [
        "stage1.2.bn3",
        *("stage2.1.bn3", "stage2.3.bn3"),
        *("stage3.0.downsample.1", "stage3.1.bn3", "stage3.2.bn3", "stage3.4.bn3", "stage3.5.bn3"),
        *("stage4.0.downsample.1", "stage4.1.bn3"),
        "head",
    ]


@pytest.mark.parametrize(
    ("name", "tops"),
    [
        ("digits_cnn", ["stem.1", "stage1.1", "stage2.1", "head"]),
        (
            "resnet18",
            ["bn1", *(f"layer{s}.{b}" for s in range(1, 5) for b in range(2)), "head"],
        ),
        # stages that are no plain sequences, and a convolution and norm after the last of them
        ("regnetx_002", ["stem.bn", "s1.b1", "s2.b1", *(f"s3.b{b}" for b in range(1, 5))]),
        ("efficientnet_b0", ["blocks.0.0", "blocks.1.0", "blocks.1.1"]),
    ],
)
def test_groups_of_other_encoders_are_their_residual_blocks(name, tops):
    encoder = build_encoder(name)
    cuts = block_cuts(encoder, LinearHead(encoder.num_features, 10))
    assert cuts[-1] - cuts[-2] == 2
    found = _tops(name, cuts)
    assert all(top.startswith(expected) for top, expected in zip(found, tops, strict=False))
    assert len(found) >= len(tops)
    if tops[-1] == "head":
        assert len(found) == len(tops)


def test_layers_after_the_last_stage_are_one_group():
    encoder = build_encoder("efficientnet_b0")
    tops = _tops("efficientnet_b0", block_cuts(encoder, LinearHead(1280, 10)))
    assert tops[-2:] == ["bn2", "head"]
    assert tops[-3].startswith("blocks.6.0")


# --- training --------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Notes which tensors each step has changed, by epoch."""

    def __init__(self):
        self.moved: dict[int, set[str]] = {}
        self.statistics: dict[int, set[str]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        parameters = {name for name, _ in pl_module.named_parameters()}
        for name, value in pl_module.state_dict().items():
            if not torch.equal(value, self.before[name]):
                kind = self.moved if name in parameters else self.statistics
                kind.setdefault(trainer.current_epoch, set()).add(name)


def _sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.05)


def _adam(params):
    return torch.optim.Adam(params, lr=1e-3, weight_decay=0.05)


def _adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05)


def _fused(params):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05, fused=True)


def _fit(folder, module, callbacks, **options):
    seed_everything(3)
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=101)
    run = cases.trainer(folder, callbacks=callbacks, **options)
    run.fit(module, datamodule=data)
    os.environ.pop("PL_GLOBAL_SEED", None)
    return run


@pytest.mark.parametrize("optimizer", [_sgd, _adam, _adamw, _fused], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
def test_frozen_tensors_do_not_move_and_the_others_do(tmp_path, optimizer, options):
    torch.manual_seed(0)
    module = PLP(3, encoder="digits_cnn", optimizer=optimizer)
    names = [name for name, _ in module.named_parameters()]
    watch = Watch()
    _fit(tmp_path, module, [watch], max_epochs=8, **options)
    # two epochs for each of the four groups: 11, 9, 6 and 3 tensors are trained
    expected = {epoch: set(names[: [11, 9, 6, 3][epoch // 2]]) for epoch in range(8)}
    assert watch.moved == expected
    assert all(p.requires_grad for p in module.parameters())
    # the statistics of frozen layers go on
    assert {name for name in watch.statistics[7] if "running_mean" in name} == {
        f"encoder.network.{block}.1.running_mean" for block in ("stem", "stage1", "stage2")
    }


def test_gradients_of_frozen_tensors_do_not_count_when_gradients_are_clipped(tmp_path):
    norms = []

    class Clipped(PLP):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norms.append(sum(1 for p in self.parameters() if p.grad is not None))

    module = Clipped(3, encoder="digits_cnn", optimizer=_sgd, cuts=[3, 11])
    _fit(tmp_path, module, [], max_epochs=2, gradient_clip_val=1.0)
    assert norms == [11] * 5 + [3] * 5


def test_gamma_and_own_cuts(tmp_path):
    module = PLP(3, gamma=2.0, cuts=[6, 9, 11], encoder="digits_cnn", optimizer=_sgd)
    names = [name for name, _ in module.named_parameters()]
    watch = Watch()
    _fit(tmp_path, module, [watch], max_epochs=9)
    # (1/3)^2 * 9 = 1, (2/3)^2 * 9 = 4
    assert [len(watch.moved[epoch]) for epoch in range(9)] == [11, *[9] * 3, *[6] * 5]
    assert watch.moved[8] == set(names[:6])


def fit_stopped(rank, world, folder, stop_after=None, resume=False):
    """Four epochs of toy images; stopped after a step, resumed from ``last.ckpt``, or neither."""
    seed_everything(11, workers=True)
    data = ToyDataModule(SplitSpec(val=31), batch_size=32 // world, train_size=130)
    module = PLP(3, encoder="digits_cnn", optimizer=_sgd)
    preemption = Preemption(folder)
    watch = cases.Watch(preemption, stop_after)
    moved = Watch()
    keep = ModelCheckpoint(folder, filename="best", save_last=True, save_on_train_epoch_end=True)
    run = cases.trainer(folder, world, [StepSeed(), moved, watch, preemption, keep], max_epochs=4)
    stopped = None
    try:
        run.fit(module, datamodule=data, ckpt_path=str(Path(folder) / "last.ckpt") if resume else None)
    except Preempted as leaving:
        stopped = leaving.code
    os.environ.pop("PL_GLOBAL_SEED", None)
    moves = {epoch: len(names) for epoch, names in moved.moved.items()}
    return {"stopped": stopped, "digest": cases.digest(module), "moved": moves}


# 99 training images in batches of 32: 4 steps an epoch
@pytest.mark.parametrize("stop_after", [2, 8, 9, 14])
def test_resumed_run_is_bit_equal(tmp_path, stop_after):
    whole = fit_stopped(0, 1, str(tmp_path / "whole"))
    assert whole["moved"] == {0: 11, 1: 9, 2: 6, 3: 3}
    stopped = fit_stopped(0, 1, str(tmp_path / "part"), stop_after)
    resumed = fit_stopped(0, 1, str(tmp_path / "part"), resume=True)
    assert stopped["stopped"] == 143
    assert resumed["digest"] == whole["digest"]


def test_two_processes_freeze_the_same(pool2, tmp_path):
    one, two = pool2.run(fit_stopped, str(tmp_path))
    assert one["moved"] == two["moved"] == {0: 11, 1: 9, 2: 6, 3: 3}
    assert one["digest"] == two["digest"]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"gamma": 0.0}, ValueError, "gamma is 0.0"),
        ({"gamma": float("nan")}, ValueError, "gamma is nan"),
        ({"gamma": float("inf")}, ValueError, "gamma is inf"),
        ({"cuts": [3, 6, 10]}, ValueError, r"\[3, 6, 10\].* 11,"),
        ({"cuts": [6, 6, 11]}, ValueError, r"\[6, 6, 11\]"),
        ({"cuts": [0, 11]}, ValueError, r"\[0, 11\]"),
        ({"cuts": [11]}, ValueError, r"\[11\]"),
        ({"cuts": []}, ValueError, r"\[\]"),
        ({"cuts": [3.5, 11]}, ValueError, r"3\.5"),
        ({"encoder": "vit_tiny_patch16_224"}, NoBlocksError, "pass cuts.* 152"),
    ],
)
def test_impossible_settings_are_named(options, error, named):
    with pytest.raises(error, match=named):
        PLP(**{"num_classes": 3, "encoder": "digits_cnn"} | options)


def test_encoder_without_blocks_takes_cuts():
    assert PLP(10, cuts=[4, 152], encoder="vit_tiny_patch16_224").cuts == [4, 152]


def test_unknown_number_of_epochs_is_refused_before_the_first_step(tmp_path):
    module = PLP(3, encoder="digits_cnn")
    before = cases.digest(module)
    with pytest.raises(ValueError, match=r"max_epochs of the trainer is -1.*trainer\.max_epochs"):
        _fit(tmp_path, module, [], max_epochs=-1, max_steps=3)
    assert cases.digest(module) == before


@pytest.mark.parametrize(
    ("strategy", "allowed"),
    [(SingleDeviceStrategy, True), (DDPStrategy, True), (FSDPStrategy, False), (DeepSpeedStrategy, False)],
)
def test_strategies_that_may_step_other_tensors_are_refused(strategy, allowed, monkeypatch):
    module = PLP(3, encoder="digits_cnn")
    monkeypatch.setattr(module, "_take_class_names", lambda: None)  # there is no data here
    module._trainer = SimpleNamespace(max_epochs=3, strategy=strategy.__new__(strategy))
    if allowed:
        module.on_fit_start()
        return
    with pytest.raises(ValueError, match=rf"{strategy.__name__}.*single device.*ddp"):
        module.on_fit_start()
