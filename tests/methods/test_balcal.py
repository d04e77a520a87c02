"""BalCAL: its equations, and a balance that belongs to the epoch whose validation used it."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from calib_lightning.callbacks import RunCheckpoint
from calib_lightning.core import BatchTransform, Preemption, StepSeed, build_encoder, load_checkpoint, load_module
from calib_lightning.core.encoders import NoBlocksError, TimmEncoder
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import balcal
from calib_lightning.methods.balcal import BalCAL, balcal_loss, batch_class_weights, find_balance
from calib_lightning.methods.focal import FocalLoss
from calib_lightning.methods.label_smoothing import LabelSmoothingLoss
from calib_lightning.methods.mbls import MbLSLoss
from calib_lightning.methods.parts.balcal_etf import feature_map_channels, simplex_etf
from calib_lightning.types import Batch
from tests.ddp import cases

# --- the equations, in float64 numpy ---------------------------------------------------------------------------------


def _softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _weights(labels, k):
    classes = [c for c in range(k) if (labels == c).any()]
    even = len(labels) / len(classes)
    return np.array([np.sqrt(even / (labels == c).sum()) if c in classes else 1.0 for c in range(k)])


def _cross_entropy(z, labels):
    return -np.log(_softmax(z)[np.arange(len(labels)), labels]).mean()


def _loss(linear, etf, labels, lam):
    weighted = etf * _weights(labels, etf.shape[1])
    return lam * _cross_entropy(linear, labels) + (1 - lam) * _cross_entropy(weighted, labels)


def _figures(linear, etf, labels, lam):
    p = _softmax(lam * linear + (1 - lam) * etf)
    return (p.argmax(axis=1) == labels).mean(), p.max(axis=1).mean()


def _balance(linear, etf, labels, delta):
    accuracy, confidence = _figures(linear, etf, labels, 1.0)
    if delta * accuracy > confidence:
        return 1.0
    left, right = 0.0, 1.0
    while right - left > 1e-4:
        middle = (left + right) / 2
        accuracy, confidence = _figures(linear, etf, labels, middle)
        if delta * accuracy > confidence:
            left = middle
        else:
            right = middle
    return middle


def _case(n=7, k=4, seed=0):
    rng = np.random.default_rng(seed)
    return 3 * rng.normal(size=(n, k)), rng.uniform(-1, 1, size=(n, k)), rng.integers(0, k, size=n)


@pytest.mark.parametrize(("d", "k"), [(8, 8), (96, 10), (512, 100), (2, 2)])
def test_frame_is_equiangular(d, k):
    torch.manual_seed(0)
    frame = simplex_etf(d, k).double().numpy()
    assert frame.shape == (d, k)
    np.testing.assert_allclose(frame.T @ frame, k / (k - 1) * np.eye(k) - 1 / (k - 1), atol=1e-6)
    assert not np.allclose(frame, simplex_etf(d, k).numpy())  # drawn


def test_class_weights():
    labels = np.array([0, 3, 3, 3, 1, 1, 3])
    np.testing.assert_allclose(batch_class_weights(torch.tensor(labels), 5).numpy(), _weights(labels, 5), rtol=1e-6)
    assert batch_class_weights(torch.tensor([1]), 3).tolist() == [1, 1, 1]
    assert batch_class_weights(torch.tensor([0, 1, 2, 2, 1, 0]), 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_loss_and_gradient_equal_the_equation(n, lam):
    linear, etf, labels = _case(n)
    tensors = torch.tensor(linear, requires_grad=True), torch.tensor(etf, requires_grad=True)
    loss = balcal_loss(*tensors, torch.tensor(labels), lam=lam)
    assert loss.item() == pytest.approx(_loss(linear, etf, labels, lam), rel=1e-6)
    assert torch.autograd.gradcheck(lambda a, b: balcal_loss(a, b, torch.tensor(labels), lam=lam), tensors)


@pytest.mark.parametrize("criterion", [LabelSmoothingLoss(0.1), FocalLoss(2.0), MbLSLoss(margin=1.0, strength=0.5)])
def test_any_criterion_on_both_classifiers(criterion):
    linear, etf, labels = map(torch.tensor, _case())
    weighted = etf * batch_class_weights(labels, 4)
    expected = 0.3 * criterion(linear, labels) + 0.7 * criterion(weighted, labels)
    torch.testing.assert_close(balcal_loss(linear, etf, labels, lam=0.3, criterion=criterion), expected)
    module = BalCAL(3, criterion=criterion, encoder="digits_cnn")
    batch = Batch(torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 0, 0]), torch.arange(6))
    found = module.eval().loss(batch)[0]
    linear, etf = module.branch_logits(batch.image)
    parts = criterion(linear, batch.label), criterion(etf * batch_class_weights(batch.label, 3), batch.label)
    torch.testing.assert_close(found, 0.8 * parts[0] + 0.2 * parts[1])


def test_adaptor_starts_as_the_authors():
    torch.manual_seed(0)
    module = BalCAL(10, encoder="resnet18_cifar")
    layers = list(module.etf_branch.modules())
    assert [layer.momentum for layer in layers if isinstance(layer, torch.nn.BatchNorm2d)] == [0.01] * 3
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [256, 512]
    for layer in convolutions:
        std = (2 / (9 * layer.out_channels)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.01)
        assert layer.weight.mean().abs() < 0.01 * std
        assert layer.weight.abs().max() > 3 * std  # normal, not uniform
    assert not module.head.linear.bias.any()


def test_a_pretrained_classifier_keeps_its_bias(monkeypatch):
    def hand_over(self, linear):
        torch.nn.init.ones_(linear.bias)
        return True

    monkeypatch.setattr(TimmEncoder, "hand_over_classifier", hand_over)
    assert BalCAL(16, encoder="mobilenetv3_small_050").head.linear.bias.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_logits_give_finite_loss_and_gradient(dtype, right):
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]]) * (1 if right else -1)
    logits = logits.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = balcal_loss(logits, logits, torch.zeros(2, dtype=torch.int64), lam=0.8)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        balcal_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long(), lam=0.5)
    with pytest.raises(ValueError, match="soft targets"):
        balcal_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.full((2, 2), 0.5), lam=0.5)


@pytest.mark.parametrize("seed", range(8))
def test_balance_equals_the_search_of_the_text(seed):
    rng = np.random.default_rng(seed)
    linear, etf, labels = _case(60, 5, seed)
    linear[np.arange(60), labels] += rng.uniform(0, 6)
    linear, etf = linear.astype(np.float32), etf.astype(np.float32)
    delta = [0.95, 1.0, 0.7][seed % 3]
    rows = [tuple(torch.tensor(part[i : i + 13]) for part in (linear, etf, labels)) for i in range(0, 60, 13)]

    def figures(lam):
        correct, confidence = balcal._sums(rows, lam, torch.device("cpu")).tolist()
        return correct / 60, confidence / 60

    found = find_balance(figures, delta)
    assert found == _balance(linear.astype(float), etf.astype(float), labels, delta)
    np.testing.assert_allclose(figures(0.3), _figures(linear, etf, labels, 0.3), rtol=1e-6)


def test_balance_of_an_underconfident_and_an_overconfident_network():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, size=400)
    sure = np.eye(4)[labels]
    assert _balance(0.1 * sure, sure, labels, 0.95) == 1
    assert find_balance(lambda lam: _figures(0.1 * sure, sure, labels, lam), 0.95) == 1
    wrong = np.where(rng.random(400) < 0.3, (labels + 1) % 4, labels)
    lam = find_balance(lambda lam: _figures(20 * np.eye(4)[wrong], np.zeros((400, 4)), labels, lam), 0.95)
    accuracy, confidence = _figures(20 * np.eye(4)[wrong], np.zeros((400, 4)), labels, lam)
    assert 0 < lam < 1
    assert confidence == pytest.approx(0.95 * accuracy, abs=1e-3)


# --- the network -----------------------------------------------------------------------------------------------------


def test_logits_are_the_mixture_of_both_classifiers_in_one_pass():
    torch.manual_seed(0)
    module = BalCAL(10, encoder="digits_cnn").eval()
    image = torch.randn(5, 1, 8, 8)
    passes = []
    module.encoder.blocks[0].register_forward_hook(lambda *args: passes.append(1))
    with torch.no_grad():
        logits = module(image)
        assert len(passes) == 1
        linear, etf = module.branch_logits(image)
        assert torch.equal(linear, module.head(module.encoder(image)))
        feature_map = module.encoder.blocks[:-1](image)
        branch = module.etf_branch
        activation = torch.relu(branch.norm(feature_map + branch.adaptor(feature_map))).double().mean(dim=(2, 3))
        expected = (activation / activation.norm(dim=1, keepdim=True)) @ branch.etf.double()
    torch.testing.assert_close(etf.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, 0.8 * linear + 0.2 * etf, rtol=0, atol=1e-6)
    assert branch.adaptor[2].weight.shape == (48, 96, 3, 3)
    assert BalCAL(10, adaptor_width=7, encoder="digits_cnn").etf_branch.adaptor[2].out_channels == 7


def test_weights_of_the_classes_are_in_the_loss_but_not_in_the_logits():
    torch.manual_seed(0)
    module = BalCAL(3, encoder="digits_cnn").eval()
    data = ToyDataModule(batch_size=16)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        loss, logits = module.loss(batch)
        linear, etf = (part.double().numpy() for part in module.branch_logits(batch.image))
        assert torch.equal(logits, module(batch.image))
    assert loss.item() == pytest.approx(_loss(linear, etf, batch.label.numpy(), 0.8), rel=1e-5)


def test_the_fixed_classifier_alone_is_never_sure():
    torch.manual_seed(0)
    for scale, bound in ((1.0, 0.2523), (4.0, np.exp(4) / (np.exp(4) + 9 * np.exp(-4 / 9)))):
        module = BalCAL(10, etf_scale=scale, encoder="digits_cnn")
        branch = module.etf_branch
        logits = scale * branch.etf.T @ branch.etf  # the best that features can be
        assert logits.softmax(dim=-1).amax().item() == pytest.approx(bound, abs=1e-3)
        with torch.no_grad():
            _, etf = module.branch_logits(torch.randn(50, 1, 8, 8))
        assert 0 < etf.abs().max() <= scale
    with torch.autocast("cpu", torch.bfloat16):
        _, etf = module.branch_logits(torch.randn(50, 1, 8, 8))
    assert etf.dtype == torch.float32
    assert not torch.equal(etf, etf.bfloat16().float())


def test_looking_for_the_channels_leaves_no_trace():
    encoder = build_encoder("resnet18_cifar")
    encoder.blocks[2].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    modes = [module.training for module in encoder.modules()]
    state = torch.get_rng_state()
    assert feature_map_channels(encoder, 10) == 512
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_timm_encoder_with_layers_behind_the_last_stage():
    # 288 channels before the last block, 1024 features after it
    module = BalCAL(16, encoder="mobilenetv3_small_050").eval()
    assert module.etf_branch.etf.shape == (288, 16)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        linear, etf = module.branch_logits(image)
        torch.testing.assert_close(linear, module.head(module.encoder(image)), rtol=1e-5, atol=1e-5)
    assert etf.shape == (2, 16)


class _Anything(BatchTransform):
    def loss(self, module, batch):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"num_classes": 97}, ValueError, "96 channels; .*97"),
        ({"num_classes": 1}, ValueError, "num_classes is 1"),
        ({"delta": 0.0}, ValueError, "delta is 0.0"),
        ({"delta": float("nan")}, ValueError, "delta is nan"),
        ({"etf_scale": -1.0}, ValueError, "etf_scale is -1.0"),
        ({"adaptor_width": 0}, ValueError, "adaptor_width is 0"),
        ({"batch_transform": _Anything()}, ValueError, "batch_transform"),
        ({"encoder": "vit_tiny_patch16_224"}, NoBlocksError, "vit_tiny"),
        ({"encoder": "mambaout_femto"}, ValueError, "feature map"),
    ],
)
def test_impossible_settings_are_named(options, error, named):
    with pytest.raises(error, match=named):
        BalCAL(**{"num_classes": 10, "encoder": "digits_cnn"} | options)


def test_images_of_the_wrong_shape_are_named():
    with pytest.raises(ValueError, match="digits_cnn"):
        BalCAL(10, encoder="digits_cnn")(torch.zeros(2, 3, 8, 8))


def test_a_loaded_module_has_the_balance_and_the_frame(tmp_path):
    torch.manual_seed(0)
    module = BalCAL(3, delta=0.9, encoder="digits_cnn")
    module.lam.fill_(0.25)
    run = cases.trainer(tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    image = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(image), module.eval()(image))
    assert loaded.lam == 0.25
    assert loaded.delta == 0.9


# --- the balance over epochs -----------------------------------------------------------------------------------------


class Follow(Callback):
    """Notes the balance of every training step and every validation, and what both classifiers said in training."""

    def __init__(self):
        self.trained: list[float] = []
        self.validated: list[float] = []
        self.rows: list[list[np.ndarray]] = []

    def on_fit_start(self, trainer, pl_module):
        said = {}
        pl_module.head.register_forward_hook(lambda m, i, out: said.update(linear=out.detach().double().numpy()))
        pl_module.etf_branch.register_forward_hook(lambda m, i, out: said.update(etf=out.detach().double().numpy()))
        self.said = said

    def on_train_epoch_start(self, trainer, pl_module):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained.append(pl_module.lam.item())
        labels = batch.label.numpy()
        self.rows.append([self.said["linear"], self.said["etf"] * _weights(labels, pl_module.num_classes), labels])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0 and not trainer.sanity_checking:
            self.validated.append(pl_module.lam.item())

    def expected(self, delta):
        return _balance(*(np.concatenate(parts) for parts in zip(*self.rows, strict=True)), delta)


def _slow(params):
    # slow enough for the balance to differ from one epoch to the next
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def _fit(folder, callbacks, **options):
    seed_everything(3)
    data = ToyDataModule(SplitSpec(val=31), batch_size=8, train_size=101)
    module = BalCAL(3, encoder="digits_cnn", optimizer=_slow)
    run = cases.trainer(folder, callbacks=callbacks, **options)
    run.fit(module, datamodule=data)
    os.environ.pop("PL_GLOBAL_SEED", None)
    return module, run


def test_checkpoints_hold_the_balance_that_validation_used(tmp_path, monkeypatch):
    # 70 rows in batches of 8, and parts joined on the way
    monkeypatch.setattr(balcal, "JOINED_BATCHES", 4)
    follow = Follow()
    ours = RunCheckpoint(tmp_path, "ours", monitor="val/nll")
    # another monitor, because Lightning does not tell the two apart otherwise
    theirs = [
        ModelCheckpoint(tmp_path, f"{end}-{{epoch}}", monitor, save_top_k=-1, save_on_train_epoch_end=end)
        for end, monitor in ((True, "val/brier"), (False, "val/accuracy"))
    ]
    module, run = _fit(tmp_path, [follow, ours, *theirs], max_epochs=3)
    assert follow.trained[:9] == [pytest.approx(0.8)] * 9
    assert follow.trained[9:18] == [follow.validated[0]] * 9
    assert follow.trained[18:] == [follow.validated[1]] * 9
    assert len(set(follow.validated)) == 3
    assert module.lam.item() == follow.validated[2] == follow.expected(0.95)
    for epoch in range(3):
        for end in (True, False):
            state = load_checkpoint(tmp_path / f"{end}-epoch={epoch}.ckpt")["state_dict"]
            assert state["lam"].item() == follow.validated[epoch]
    best = load_checkpoint(tmp_path / "ours.ckpt")
    assert best["state_dict"]["lam"].item() == follow.validated[best["epoch"]]
    # the figure that chose the file is what the file gives
    figures = run.validate(load_module(tmp_path / "ours.ckpt"), datamodule=run.datamodule, verbose=False)
    assert figures[0]["val/nll"] == pytest.approx(ours.best_model_score.item(), rel=1e-6)
    assert run.callback_metrics.keys() >= {"val/nll"}


def test_epochs_that_no_validation_ends(tmp_path):
    follow = Follow()
    module, run = _fit(tmp_path / "none", [follow], max_epochs=1, limit_val_batches=0)
    assert follow.validated == []
    assert module.lam.item() == follow.expected(0.95) != 0.8
    assert run.callback_metrics["train/lambda"].item() == module.lam.item()

    follow = Follow()
    module, _ = _fit(tmp_path / "middle", [follow], max_epochs=1, val_check_interval=6)
    assert len(follow.rows) == 9
    assert follow.validated == [pytest.approx(0.8)]
    assert module.lam.item() == follow.expected(0.95)

    follow = Follow()
    module, _ = _fit(tmp_path / "both", [follow], max_epochs=1, val_check_interval=3)
    assert follow.validated == [*[pytest.approx(0.8)] * 2, module.lam.item()]
    assert module.lam.item() == follow.expected(0.95)


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 4:
            trainer.should_stop = True


def test_a_run_that_stops_within_an_epoch(tmp_path):
    follow = Follow()
    module, run = _fit(tmp_path, [follow, Stop()], max_epochs=3)
    assert run.global_step == len(follow.rows) == 5
    assert follow.validated == [module.lam.item()]
    assert module.lam.item() == follow.expected(0.95)


def test_other_validations_do_not_touch_it(tmp_path):
    module, run = _fit(tmp_path, [], max_epochs=1)
    module._keep(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]))
    lam = module.lam.item()
    run.sanity_checking = True
    module.on_validation_start()
    assert module.lam.item() == lam < 1
    run.validate(module, datamodule=run.datamodule, verbose=False)
    assert module.lam.item() == lam
    # while that which ends an epoch does: right by the first of equal logits, and underconfident
    run.state.fn = TrainerFn.FITTING
    module.on_validation_start()
    assert module.lam.item() == 1


def fit_stopped(rank, world, folder, stop_after=None, resume=False):
    """Two epochs of toy images; stopped after a step, resumed from ``last.ckpt``, or neither."""
    seed_everything(11, workers=True)
    data = ToyDataModule(SplitSpec(val=31), batch_size=16 // world, train_size=130)
    # with these the balance of the second epoch is inside [0, 1], on one process and on two
    optimizer = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    module = BalCAL(3, delta=0.8, etf_scale=0.1, encoder="digits_cnn", optimizer=optimizer)
    preemption = Preemption(folder)
    watch = cases.Watch(preemption, stop_after)
    follow = Follow()
    keep = ModelCheckpoint(folder, filename="best", monitor="val/nll", save_last=True, save_on_train_epoch_end=True)
    run = cases.trainer(folder, world, [StepSeed(), follow, watch, preemption, keep], max_epochs=2)
    stopped = None
    try:
        run.fit(module, datamodule=data, ckpt_path=str(Path(folder) / "last.ckpt") if resume else None)
    except Preempted as leaving:
        stopped = leaving.code
    os.environ.pop("PL_GLOBAL_SEED", None)
    rows = [np.concatenate(parts) for parts in zip(*follow.rows, strict=True)] if follow.rows else None
    return {
        "stopped": stopped,
        "digest": cases.digest(module),
        "lam": module.lam.item(),
        "validated": follow.validated,
        "rows": rows,
    }


# 99 training images in batches of 16: 7 steps an epoch
@pytest.mark.parametrize("stop_after", [1, 6, 7, 10, 13])
def test_resumed_run_is_bit_equal(tmp_path, stop_after):
    whole = fit_stopped(0, 1, str(tmp_path / "whole"))
    stopped = fit_stopped(0, 1, str(tmp_path / "part"), stop_after)
    resumed = fit_stopped(0, 1, str(tmp_path / "part"), resume=True)
    assert stopped["stopped"] == 143
    assert len(set(whole["validated"])) == 2
    assert 0.01 < whole["lam"] < 0.99
    assert stopped["validated"] + resumed["validated"] == whole["validated"]
    assert resumed["digest"] == whole["digest"]
    assert resumed["lam"] == whole["lam"]


def test_two_processes_find_one_balance_over_all_rows(pool2, tmp_path):
    one, two = pool2.run(fit_stopped, str(tmp_path / "whole"))
    assert one["digest"] == two["digest"]
    assert one["validated"] == two["validated"]
    assert not np.array_equal(one["rows"][2], two["rows"][2])
    together = [np.concatenate(parts) for parts in zip(one["rows"], two["rows"], strict=True)]
    assert 0.01 < one["lam"] < 0.99
    assert one["lam"] == _balance(*together, 0.8) != _balance(*one["rows"], 0.8)

    stopped = pool2.run(fit_stopped, str(tmp_path / "part"), 10)
    resumed = pool2.run(fit_stopped, str(tmp_path / "part"), None, True)
    assert [part["stopped"] for part in stopped] == [143, 143]
    assert {part["digest"] for part in resumed} == {one["digest"]}

    # rows of two processes go on in one
    stopped = pool2.run(fit_stopped, str(tmp_path / "fewer"), 10)
    alone = fit_stopped(0, 1, str(tmp_path / "fewer"), resume=True)
    parts = [*(part["rows"] for part in stopped), alone["rows"]]
    assert [len(rows[2]) for rows in parts] == [32, 32, 35]
    together = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    assert 0.01 < alone["lam"] < 0.99
    assert alone["lam"] == _balance(*together, 0.8) != _balance(*alone["rows"], 0.8)


def test_rows_of_a_checkpoint_follow_to_the_device():
    module = BalCAL(3, encoder="digits_cnn").to("meta")
    rows = {"linear": torch.zeros(2, 3), "etf": torch.zeros(2, 3), "labels": torch.zeros(2, dtype=torch.int64)}
    module.restore_epoch_rows(rows)
    new = torch.zeros(4, 3, device="meta")
    module._keep(new, new, new[:, 0].long())
    kept = module.epoch_rows()
    assert {name: (len(part), part.device.type) for name, part in kept.items()} == dict.fromkeys(rows, (6, "meta"))
