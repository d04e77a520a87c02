"""MaC-Cal: masks, the rule for their keep rate, and the stage around both."""

import copy
import math
import os
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.core import (
    CachedFeatures,
    LinearHead,
    Preemption,
    StageSwitch,
    StageTraining,
    StepSeed,
    build_head,
    load_module,
    load_stages,
)
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.data.views import CleanViews
from calib_lightning.methods.cross_entropy import CrossEntropy, CrossEntropyLoss
from calib_lightning.methods.mac_cal import MaCCal, MaskedClassifier
from calib_lightning.methods.mixup import Mixup
from calib_lightning.methods.parts.mac_cal_figures import confidence_sums
from calib_lightning.methods.parts.mac_cal_head import MaskedBottleneck, MaskedHead, MaskedLinear, MaskedLinearHead
from calib_lightning.methods.parts.mac_cal_rule import AdaptiveSparsity, adapt_keep_rate, decayed_step
from calib_lightning.utils.seeding import derive_seed
from tests.ddp import cases
from tests.ddp.cases import cosine

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KEYS = ("mac_cal/keep", "mac_cal/confidence", "mac_cal/accuracy")
TRAINING_FIGURES = AdaptiveSparsity(gamma=0.95, eta=(0.1, 0.001), q_is="sparsity", held_out=False)

# --- the keep rate ---------------------------------------------------------------------------------------------------


def test_steps_decay_from_a_tenth_to_a_thousandth():
    steps = [decayed_step(t, 40) for t in range(1, 41)]
    assert steps == pytest.approx([0.1 * 0.01 ** (t / 40) for t in range(1, 41)])
    assert (steps[0], steps[-1]) == (pytest.approx(0.0891, abs=5e-5), pytest.approx(0.001))
    assert sum(steps) == pytest.approx(0.811, abs=5e-4)


def test_steps_may_be_constant_or_nothing():
    assert [decayed_step(t, 3, 0.1, 0.1) for t in (1, 2, 3)] == [0.1] * 3
    assert [decayed_step(t, 3, 0.0, 0.0) for t in (1, 2, 3)] == [0.0] * 3


@pytest.mark.parametrize(
    ("q_is", "expected"),
    [
        # Conf - 0.9 Acc is +0.04, -0.03, +0.19 (clipped to the step, 0.05), -0.27 (clipped), +0.32 (clipped)
        ("keep", [0.54, 0.51, 0.56, 0.51, 0.56]),
        ("sparsity", [0.46, 0.49, 0.44, 0.49, 0.44]),
    ],
)
def test_sequence_by_hand(q_is, expected):
    q, found = 0.5, []
    for confidence, accuracy in [(0.85, 0.9), (0.78, 0.9), (0.91, 0.8), (0.45, 0.8), (0.95, 0.7)]:
        q = adapt_keep_rate(q, confidence, accuracy, gamma=0.9, eta=0.05, minimum=0.05, q_is=q_is)
        found.append(q)
    assert found == pytest.approx(expected, abs=1e-12)


def test_keep_rate_stays_between_its_bounds():
    rule = {"gamma": 1.0, "eta": 0.1, "minimum": 0.2}
    assert adapt_keep_rate(0.95, 1.0, 0.5, q_is="keep", **rule) == 1.0
    assert adapt_keep_rate(0.25, 1.0, 0.5, q_is="sparsity", **rule) == 0.2
    assert adapt_keep_rate(0.25, 0.5, 1.0, q_is="keep", **rule) == 0.2
    assert adapt_keep_rate(0.95, 0.5, 1.0, q_is="sparsity", **rule) == 1.0


def _small_problem(start, q_is, gamma, held_out, epochs=30):
    """Retrain a linear head on 150 noisy rows of 30 features; confidence is measured on 2,000 others, or as printed."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 30, generator=generator)
    labels, others = (torch.randint(6, (n,), generator=generator) for n in (150, 2000))
    noise = 3.0
    features = centres[labels] + noise * torch.randn(150, 30, generator=generator)
    unseen = centres[others] + noise * torch.randn(2000, 30, generator=generator)
    torch.manual_seed(0)
    head = MaskedLinearHead(30, 6)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    q, path = start, []
    for epoch in range(epochs):
        head.set_keep(q)
        path.append(q)
        sums = torch.zeros(3, dtype=torch.float64)
        for step in range(10):
            rows = torch.randperm(150, generator=generator)[:64]
            head.train()
            head.draw(derive_seed(epoch, step))
            logits = head(features[rows])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            sums += confidence_sums(logits.detach(), labels[rows])
        if held_out:
            head.eval()
            with torch.no_grad():
                sums = confidence_sums(head(unseen), others)
        confidence, correct, count = sums.tolist()
        q = adapt_keep_rate(q, confidence / count, correct / count, gamma=gamma, eta=0.1, minimum=0.05, q_is=q_is)
    return path, confidence / count - correct / count


def test_read_as_a_sparsity_every_start_ends_at_the_same_rate():
    ends = {start: _small_problem(start, "sparsity", gamma=1.0, held_out=True) for start in (0.05, 0.5, 1.0)}
    rates = [np.mean(path[-10:]) for path, _ in ends.values()]
    assert max(rates) - min(rates) < 0.05
    assert 0.1 < min(rates) <= max(rates) < 0.9
    assert max(abs(gap) for _, gap in ends.values()) < 0.03


def test_read_as_a_keep_rate_it_runs_to_a_bound():
    low, _ = _small_problem(0.3, "keep", gamma=1.0, held_out=True)
    high, _ = _small_problem(0.7, "keep", gamma=1.0, held_out=True)
    assert high[-1] == 1.0
    assert low[-1] == 0.05
    printed, _ = _small_problem(0.3, "keep", gamma=0.95, held_out=False)  # as in the paper, on the masked steps
    assert min(printed[15:]) > 0.95


def test_sums_are_those_of_numpy():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(57, 4))
    labels = generator.integers(4, size=57)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = [p.max(axis=1).sum(), (p.argmax(axis=1) == labels).sum(), 57]
    assert confidence_sums(torch.tensor(logits), torch.tensor(labels)).tolist() == pytest.approx(expected, rel=1e-12)
    soft = torch.nn.functional.one_hot(torch.tensor(labels), 4) * 0.7 + 0.075
    assert confidence_sums(torch.tensor(logits), soft).tolist() == pytest.approx(expected, rel=1e-12)


# --- masked layers ---------------------------------------------------------------------------------------------------


def _layer(q=0.5, seed=3, **options):
    torch.manual_seed(0)
    layer = MaskedLinear(20, 6, **options)
    layer.keep.fill_(q)
    layer.draw(seed)
    return layer


def test_a_mask_is_a_share_of_the_weights():
    torch.manual_seed(0)
    layer = MaskedLinear(300, 200)
    for q in (0.05, 0.3, 0.9):
        layer.keep.fill_(q)
        layer.draw(1)
        # five standard deviations of a binomial share
        assert abs(float(layer.mask.double().mean()) - q) < 5 * math.sqrt(q * (1 - q) / 60_000)
    layer.keep.fill_(1.0)
    layer.draw(1)
    assert bool(layer.mask.all())


def test_weights_that_are_masked_get_no_gradient_and_the_others_theirs():
    layer, h = _layer(), torch.randn(8, 20)
    layer(h).square().sum().backward()
    z = h @ (layer.weight * layer.mask).T + layer.bias
    dense = (2 * z).T @ h
    assert bool((layer.weight.grad[~layer.mask] == 0).all())
    torch.testing.assert_close(layer.weight.grad[layer.mask], dense[layer.mask])
    torch.testing.assert_close(layer.bias.grad, 2 * z.sum(dim=0))
    assert 0 < int(layer.mask.sum()) < 120


def test_straight_through_gives_the_dense_gradient_of_the_masked_output():
    layer, h = _layer(gradient="straight_through"), torch.randn(8, 20)
    masked = (layer.weight * layer.mask).detach()
    out = layer(h)
    assert torch.equal(out, F.linear(h, masked, layer.bias))
    out.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, (2 * (h @ masked.T + layer.bias)).T @ h)
    assert bool((layer.weight.grad != 0).all())


@pytest.mark.parametrize(
    ("scaling", "training", "evaluation"), [("expected", 1.0, 0.25), ("none", 1.0, 1.0), ("inverted", 4.0, 1.0)]
)
def test_scaling(scaling, training, evaluation):
    layer, h = _layer(q=0.25, scaling=scaling), torch.randn(8, 20)
    deployed = F.linear(h, evaluation * layer.weight, layer.bias)
    assert torch.equal(layer(h), F.linear(h, training * layer.weight * layer.mask, layer.bias))
    layer.eval()
    assert torch.equal(layer(h), deployed)
    layer.train()
    layer.clear()
    assert torch.equal(layer(h), deployed)


def test_mean_masked_logit_is_the_logit_of_scaled_weights():
    torch.manual_seed(0)
    head = MaskedLinearHead(30, 4).double()
    head.set_keep(0.3)
    h, draws = torch.randn(5, 30, dtype=torch.float64), 4000
    with torch.no_grad():
        total = torch.zeros(5, 4, dtype=torch.float64)
        for seed in range(draws):
            head.draw(seed)
            total += head(h)
        weight = head.linear.weight
        expected = h @ (0.3 * weight).T + head.linear.bias
        # variance of a masked logit: q (1 - q) sum_i (w_i h_i)^2; five standard deviations of the mean
        spread = (0.3 * 0.7 * h.square() @ weight.square().T / draws).sqrt()
    assert bool(((total / draws - expected).abs() < 5 * spread).all())
    assert bool((spread < 0.02).all())


def test_masks_depend_on_the_seed_and_differ_between_layers():
    head = MaskedBottleneck(40, 40, hidden=40)
    head.set_keep(0.5)
    head.draw(7)
    first, last = (layer.mask for layer in head.layers())
    assert not torch.equal(first, last)
    torch.manual_seed(99)  # the global generator has no part in it
    head.draw(7)
    assert torch.equal(head.layers()[0].mask, first)
    assert torch.equal(head.layers()[1].mask, last)
    head.draw(8)
    assert not torch.equal(head.layers()[0].mask, first)
    head.clear()
    assert [layer.mask for layer in head.layers()] == [None, None]


def test_drawing_leaves_the_global_generator_alone():
    layer = _layer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    layer.draw(1)
    assert torch.equal(torch.rand(3), expected)


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        (MaskedLinearHead(96, 3), [(3, 96)]),
        (MaskedBottleneck(96, 3), [(24, 96), (3, 24)]),
        (MaskedBottleneck(96, 50), [(50, 96), (50, 50)]),
        (MaskedBottleneck(96, 3, hidden=7), [(7, 96), (3, 7)]),
        (MaskedBottleneck(96, 3, layers="first"), [(24, 96)]),
        (MaskedBottleneck(96, 3, layers="last"), [(3, 24)]),
    ],
)
def test_masked_layers_of_heads(head, shapes):
    assert [tuple(layer.weight.shape) for layer in head.layers()] == shapes
    head.set_keep(0.25)
    assert head.keep == 0.25
    assert all(float(layer.keep) == 0.25 for layer in head.layers())
    assert head(torch.zeros(2, 96)).shape == (2, head.spec["init_args"]["num_classes"])


def test_bottleneck_is_its_equation():
    torch.manual_seed(0)
    h = torch.randn(5, 12)
    for activation, layers in [(True, "both"), (False, "both"), (True, "first"), (False, "last")]:
        head = MaskedBottleneck(12, 4, hidden=8, activation=activation, layers=layers)
        head.set_keep(0.5)
        head.eval()
        scale = {"both": (0.5, 0.5), "first": (0.5, 1.0), "last": (1.0, 0.5)}[layers]
        inner = h @ (scale[0] * head.first.weight).T + head.first.bias
        expected = (inner.clamp_min(0) if activation else inner) @ (scale[1] * head.last.weight).T + head.last.bias
        torch.testing.assert_close(head(h), expected)
    plain = MaskedBottleneck(12, 4, bias=False)
    assert plain.first.bias is None
    assert plain.last.bias is None


@pytest.mark.parametrize(
    "head",
    [
        MaskedLinearHead(12, 4, bias=False, gradient="straight_through", scaling="none"),
        MaskedBottleneck(12, 4, hidden=6, activation=False, layers="last", scaling="inverted"),
    ],
    ids=lambda head: type(head).__name__,
)
def test_heads_come_back_from_their_spec_and_state(head):
    head.set_keep(0.4)
    again = build_head(head.spec)
    assert again.spec == head.spec
    again.load_state_dict(head.state_dict())
    assert again.keep == pytest.approx(0.4)
    h = torch.randn(3, 12)
    for one, two in ((head, again), (head.eval(), again.eval())):
        one.draw(5)
        two.draw(5)
        assert torch.equal(one(h), two(h))
    assert not any("mask" in name for name in head.state_dict())


@pytest.mark.parametrize("make", [MaskedLinearHead, MaskedBottleneck])
def test_heads_can_be_copied_exported_and_run_in_half_precision(make):
    torch.manual_seed(0)
    head = make(12, 4)
    head.set_keep(0.5)
    head.draw(1)
    h = torch.randn(3, 12)
    twin = copy.deepcopy(head)
    assert torch.equal(twin(h), head(h))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(h)
        assert logits.dtype == torch.bfloat16
        logits.float().sum().backward()
    torch.testing.assert_close(logits.float(), head(h), rtol=0.02, atol=0.02)
    for layer in head.layers():
        assert bool((layer.weight.grad[~layer.mask] == 0).all())
    exported = torch.export.export(head.eval(), (h,)).module()
    assert torch.equal(exported(h), head(h))


# --- the stage -------------------------------------------------------------------------------------------------------


class Log(Callback):
    """Keep rate, masks and logged figures of every epoch and step."""

    def __init__(self):
        self.figures: dict[int, dict[str, float]] = {}
        self.masks: list[list[torch.Tensor | None]] = []
        self.deployed: dict[int, float] = {}

    def _take(self, trainer, epoch):
        found = trainer.callback_metrics
        if KEYS[0] in found:
            self.figures[epoch] = {key: float(found[key]) for key in found}

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            self._take(trainer, trainer.current_epoch - 1)

    def on_before_backward(self, trainer, pl_module, loss):
        head = getattr(pl_module, "head", None)
        if isinstance(head, MaskedHead):
            self.masks.append([layer.mask for layer in head.layers()])

    def on_validation_end(self, trainer, pl_module):
        if isinstance(pl_module.head, MaskedHead):
            self.deployed[trainer.current_epoch] = pl_module.head.keep

    def on_train_end(self, trainer, pl_module):
        self._take(trainer, trainer.current_epoch - 1)

    def of(self, key):
        return [figures[f"mac_cal/{key}"] for figures in self.figures.values()]


def _data(**options):
    return ToyDataModule(SplitSpec(val=31, calibration=30), **{"batch_size": 16, "train_size": 130} | options)


def _sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4)


def _training(**options):
    return StageTraining(**{"optimizer": _sgd, "criterion": CrossEntropyLoss(), "views": CleanViews()} | options)


def _module(switch, method=MaCCal, **options):
    torch.manual_seed(0)
    if method is MaCCal:
        options["switch"] = switch
    return method(3, **{"encoder": "digits_cnn", "optimizer": _sgd} | options)


def test_keep_rate_one_is_plain_retraining_bit_for_bit(fit):
    fixed = AdaptiveSparsity(start=1.0, eta=(0.0, 0.0))
    masked = _module(MaskedClassifier(-2, sparsity=fixed, training=_training()))
    plain = _module(None, method=_of_stage(StageSwitch(-2, training=_training())))
    one, two = (fit(module, _data(), 4).callback_metrics for module in (masked, plain))
    ours, theirs = ({n: v for n, v in m.state_dict().items() if not n.endswith("keep")} for m in (masked, plain))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert {key: value for key, value in one.items() if "mac_cal" not in key} == two
    assert one["mac_cal/keep"] == 1.0


def _of_stage(switch):
    class Staged(CrossEntropy):
        def configure_callbacks(self):
            return [switch]

    Staged.switch = switch
    return Staged


@pytest.mark.parametrize("every", ["batch", "epoch"])
def test_masks_of_every_step_are_a_function_of_stage_and_step(fit, every):
    fixed = AdaptiveSparsity(start=0.5, eta=(0.0, 0.0), held_out=False)
    switch = MaskedClassifier(-2, MaskedBottleneck, fixed, mask_every=every, training=_training())
    log = Log()
    fit(_module(switch), _data(), 3, callbacks=[log])
    # 69 training images in batches of 16: 5 steps an epoch
    assert len(log.masks) == 10
    for number, masks in enumerate(log.masks):
        keys = (5 + number, number % 5) if every == "batch" else (1 + number // 5,)
        for layer, mask in enumerate(masks):
            generator = torch.Generator().manual_seed(derive_seed(derive_seed(0, 1, *keys), layer))
            assert torch.equal(mask, torch.rand(mask.shape, generator=generator) < 0.5)
    different = {masks[0].numpy().tobytes() for masks in log.masks}
    assert len(different) == (10 if every == "batch" else 2)


def test_no_mask_and_no_hook_stays_behind(fit):
    module = _module(MaskedClassifier.paper(-2))
    fit(module, _data(), 3)
    assert [layer.mask for layer in module.head.layers()] == [None, None]
    assert not module.head._forward_hooks

    class Broken(nn.Module):
        def forward(self, logits, labels):
            raise KeyError("broken")

    module = _module(MaskedClassifier(-2, sparsity=TRAINING_FIGURES, training=_training(criterion=Broken())))
    with pytest.raises(KeyError, match="broken"):
        fit(module, _data(), 3)
    assert module.head.layers()[0].mask is None
    assert not module.head._forward_hooks


def test_encoder_is_frozen_bit_for_bit_while_the_head_is_trained(fit):
    class Encoder(Callback):
        def __init__(self):
            self.states = {}

        def on_train_epoch_end(self, trainer, pl_module):
            self.states[trainer.current_epoch] = copy.deepcopy(pl_module.state_dict())

    seen = Encoder()
    module = _module(MaskedClassifier(-3, training=_training()))
    trainer = fit(module, _data(), 5, callbacks=[seen])
    trainer.validate(module, datamodule=_data(), verbose=False)
    before, after = seen.states[1], module.state_dict()
    encoder = [name for name in before if name.startswith("encoder.")]
    assert any("running_mean" in name for name in encoder)
    for name in encoder:
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(seen.states[2]["head.linear.weight"], after["head.linear.weight"])
    # the stage before did move it
    assert not torch.equal(seen.states[0]["encoder.network.stem.0.weight"], before["encoder.network.stem.0.weight"])


def _expected_rates(log, sparsity, length):
    q, rates = sparsity.start, []
    for t, (confidence, accuracy) in enumerate(zip(log.of("confidence"), log.of("accuracy"), strict=True), start=1):
        rates.append(q)
        first, last = sparsity.eta
        eta = first * (last / first) ** (t / length)
        change = float(np.clip(confidence - sparsity.gamma * accuracy, -eta, eta))
        q = float(np.clip(q + (change if sparsity.q_is == "keep" else -change), sparsity.minimum, 1.0))
    return rates


@pytest.mark.parametrize(
    "sparsity",
    [
        AdaptiveSparsity(),
        AdaptiveSparsity(gamma=0.9, start=0.3, eta=(0.05, 0.01)),
        AdaptiveSparsity(gamma=0.95, eta=(0.1, 0.001), q_is="keep", held_out=False),
        AdaptiveSparsity(gamma=0.5, minimum=0.4, q_is="sparsity", held_out=False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:MaskedClassifier. the keep rate has reached its bound")
def test_keep_rate_of_each_epoch_follows_the_figures_of_the_one_before(fit, sparsity):
    switch, log = MaskedClassifier(-5, sparsity=sparsity, training=_training()), Log()
    module = _module(switch)
    fit(module, _data(), 7, callbacks=[log])
    assert list(log.figures) == [2, 3, 4, 5, 6]
    assert log.of("keep") == pytest.approx(_expected_rates(log, sparsity, 5), abs=1e-6)
    assert len(set(log.of("keep"))) > 1
    # validation, checkpoint and the deployed head have the rate of their epoch; the last update has no effect
    assert list(log.deployed.values()) == pytest.approx(log.of("keep"), abs=1e-6)
    assert module.head.keep == pytest.approx(log.of("keep")[-1], abs=1e-6)


def test_held_out_figures_are_those_of_the_deployed_network_on_the_calibration_split(fit):
    data = _data()
    module = _module(MaskedClassifier(-4, MaskedBottleneck, training=_training()))
    metrics = fit(module, data, 6).callback_metrics
    (batch,) = _whole(data, "calibration")
    with torch.no_grad():
        logits = module.eval().double()(batch.image.double()).numpy()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert float(metrics["mac_cal/confidence"]) == pytest.approx(p.max(axis=1).mean(), abs=1e-6)
    assert float(metrics["mac_cal/accuracy"]) == pytest.approx((p.argmax(axis=1) == batch.label.numpy()).mean())
    assert len(batch.label) == 30


def _whole(data, name):
    data.batch_size = 1000
    return data.evaluation_loader(name)


def test_features_of_the_calibration_split_are_computed_once_where_they_cannot_change(fit):
    class Counted(MaskedClassifier):
        count = 0

        def features(self, module, batch):
            Counted.count += 1
            return super().features(module, batch)

    fit(_module(Counted(-4, training=_training())), _data(), 5)
    assert Counted.count == 2  # batches of 16 out of 30 images
    fit(_module(Counted(-4, training=_training(frozen_bn="train"))), _data(), 5)
    assert Counted.count == 2 + 4 * 2


def test_training_figures_are_those_of_the_masked_steps(fit):
    seen = {}

    class Watched(MaCCal):
        def criterion_value(self, logits, labels):
            if self.training and self.stage:
                seen.setdefault(self.current_epoch, []).append((logits.detach().double().numpy(), labels.numpy()))
            return super().criterion_value(logits, labels)

    torch.manual_seed(0)
    module = Watched(3, MaskedClassifier(-3, sparsity=TRAINING_FIGURES), encoder="digits_cnn", optimizer=_sgd)
    log = Log()
    fit(module, _data(), 4, callbacks=[log])
    for epoch, figures in log.figures.items():
        logits, labels = (np.concatenate(parts) for parts in zip(*seen[epoch], strict=True))
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert len(labels) == 69
        assert figures["mac_cal/confidence"] == pytest.approx(p.max(axis=1).mean(), abs=1e-6)
        assert figures["mac_cal/accuracy"] == pytest.approx((p.argmax(axis=1) == labels).mean())
        assert figures["train/accuracy"] == pytest.approx(figures["mac_cal/accuracy"])
    assert list(log.figures) == [1, 2, 3]


def test_default_schedule_is_a_cosine_over_the_stage(fit):
    rates = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(_module(MaskedClassifier(-5)), _data(), 7, callbacks=[Rates()])
    expected = [0.1 * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
    # the callback stands before the switch, so it sees the rate of the stage from its second epoch on
    assert rates[3:] == pytest.approx(expected[1:])
    rates.clear()
    fit(_module(MaskedClassifier.paper(2)), _data(), 7, callbacks=[Rates()])
    assert rates[3:] == [0.1] * 4


def test_presets():
    paper, sparsity, ours = MaskedClassifier.paper(-40), MaskedClassifier.paper_sparsity(-40), MaskedClassifier(-40)
    for switch, q_is in ((paper, "keep"), (sparsity, "sparsity")):
        rule = switch.sparsity
        assert (rule.gamma, rule.start, rule.minimum, rule.eta) == (0.95, 0.5, 0.05, (0.1, 0.001))
        assert (rule.q_is, rule.held_out, switch.mask_every) == (q_is, False, "batch")
        head = switch.classifier(512, 100)
        assert (head.hidden, head.activation, head.first.scaling) == (128, True, "none")
        assert [layer.gradient for layer in head.layers()] == ["restricted"] * 2
    rule = ours.sparsity
    assert (rule.gamma, rule.start, rule.minimum, rule.eta) == (1.0, 0.5, 0.05, (0.1, 0.1))
    assert (rule.q_is, rule.held_out, ours.mask_every, ours.warm_start) == ("sparsity", True, "batch", False)
    assert isinstance(ours.classifier(512, 100), MaskedLinearHead)
    assert ours.classifier(512, 100).linear.scaling == "expected"
    own = StageTraining(scheduler=cosine)
    for made in (MaskedClassifier.paper, MaskedClassifier.paper_sparsity):
        switch = made(-40, encoder="net", head="net.fc", training=own)
        assert (switch.encoder, switch.head, switch.training.scheduler) == ("net", "net.fc", cosine)
    for switch in (paper, sparsity, ours):
        (group,) = switch.training.optimizer([torch.zeros(1, requires_grad=True)]).param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 5e-4)
        assert (switch.training.scheduler is None) == (switch is not ours)
    assert isinstance(MaCCal(3, encoder="digits_cnn").switch, MaskedClassifier)
    assert MaCCal(3, encoder="digits_cnn").switch.at_epoch == -40


@pytest.mark.parametrize(
    ("file", "build"),
    [
        ("method/mac_cal", MaskedClassifier),
        ("callback/mac_cal", MaskedClassifier),
        ("callback/mac_cal_paper", MaskedClassifier.paper),
        ("callback/mac_cal_paper_sparsity", MaskedClassifier.paper_sparsity),
    ],
)
def test_files_say_what_the_presets_are(file, build):
    content = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())
    node = content["init_args"]["switch"] if "init_args" in content else content["trainer"]["callbacks+"][0]
    told, switch = node["init_args"], build(node["init_args"]["at_epoch"])
    assert (node["class_path"], told["at_epoch"]) == ("MaskedClassifier", -40)
    assert told["sparsity"] | {"eta": tuple(told["sparsity"]["eta"])} == asdict(switch.sparsity)
    spec = switch.classifier(512, 10).spec
    assert spec["class_path"].endswith(f".{told['classifier']['class_path']}")
    assert {"in_features": 512, "num_classes": 10} | told["classifier"]["init_args"] == spec["init_args"]
    assert (told["mask_every"], told["warm_start"]) == (switch.mask_every, switch.warm_start)
    training = told["training"]
    assert training["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    assert (training["batch_size"], training["views"]) == (128, "CleanViews")
    if "paper" in file:
        assert training["scheduler"] is None
    else:
        assert training["scheduler"] == "CosineToEnd"


@pytest.mark.parametrize("build", [MaskedClassifier, MaskedClassifier.paper])
def test_images_are_clean_where_the_data_can_be_told(fit, build):
    switch = build(-1)
    fit(_module(switch), _data(), 2)
    assert isinstance(switch.training.views, CleanViews)


@pytest.mark.parametrize("kind", ["held-out", "training"])
def test_stored_features_train_the_same_classifier(fit, kind):
    found = []
    for views in (CleanViews(), CachedFeatures()):
        sparsity = AdaptiveSparsity(held_out=kind == "held-out", gamma=0.95, eta=(0.1, 0.01))
        log, module = Log(), _module(MaskedClassifier(-4, sparsity=sparsity, training=_training(views=views)))
        fit(module, _data(), 5, callbacks=[log])
        found.append((log, module.head.linear.weight.detach()))
    (one, weight), (two, same) = found
    for key in ("keep", "confidence", "accuracy"):
        assert one.of(key) == pytest.approx(two.of(key), abs=1e-5)
    torch.testing.assert_close(weight, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["expected", "none", "inverted"])
def test_warm_start_deploys_the_classifier_before(fit, scaling):
    logits = {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if pl_module.stage == 0:
                self._look("before", pl_module)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.stage == 1 and "after" not in logits:
                self._look("after", pl_module)

        def _look(self, name, module):
            module.eval()
            with torch.no_grad():
                logits[name] = module(torch.linspace(-1, 1, 256).view(4, 1, 8, 8))
            module.train()

    head = partial(MaskedLinearHead, scaling=scaling)
    switch = MaskedClassifier(-1, head, warm_start=True, training=_training())
    module = _module(switch)
    fit(module, _data(), 2, callbacks=[Look()])
    torch.testing.assert_close(logits["after"], logits["before"])
    assert isinstance(module.head, MaskedLinearHead)


def test_it_follows_a_method_that_mixes_images(fit):
    log = Log()
    module = _module(None, method=Mixup)
    training = StageTraining(optimizer=_sgd)
    fit(module, _data(), 4, callbacks=[log, MaskedClassifier(-2, sparsity=TRAINING_FIGURES, training=training)])
    assert list(log.figures) == [2, 3]
    assert isinstance(module.head, MaskedLinearHead)
    assert isinstance(module.criterion, CrossEntropyLoss)
    assert module.batch_transform is None
    assert training.criterion is None


@pytest.mark.parametrize(("start", "gamma", "bound"), [(0.9, 9.0, 1.0), (0.15, 0.1, 0.05)])
def test_reaching_a_bound_is_told_once(fit, start, gamma, bound):
    sparsity = AdaptiveSparsity(gamma=gamma, start=start, eta=(0.1, 0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(_module(MaskedClassifier(-4, sparsity=sparsity, training=_training())), _data(), 5)
    told = [str(w.message) for w in caught if "keep rate has reached its bound" in str(w.message)]
    assert len(told) == 1
    assert f"its bound {bound} at epoch 2" in told[0]


def test_a_fixed_rate_on_a_bound_is_no_news(fit):
    sparsity = AdaptiveSparsity(start=1.0, eta=(0.0, 0.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(_module(MaskedClassifier(-2, sparsity=sparsity, training=_training())), _data(), 3)
    assert not [w for w in caught if "bound" in str(w.message)]


# --- a module that is not ours ---------------------------------------------------------------------------------------


class Foreign(LightningModule):
    """Somebody's module: pairs as batches, names of its own, no stage."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DictBatches(Foreign):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class ForeignData(LightningDataModule):
    def _set(self, rows):
        x = torch.linspace(-2, 2, rows * 6).sin().view(rows, 6)
        return TensorDataset(x, torch.arange(rows) % 3)

    def train_dataloader(self):
        return DataLoader(self._set(60), batch_size=20, shuffle=True)

    def calibration_dataloader(self):
        return DataLoader(self._set(24), batch_size=10)


def _foreign_switch(sparsity, cls=MaskedClassifier, **options):
    options |= {"encoder": "backbone", "head": "fc"}
    return cls(-3, sparsity=sparsity, training=StageTraining(optimizer=_sgd), **options)


@pytest.mark.parametrize("held_out", [True, False])
def test_works_in_a_module_and_with_data_of_somebody_else(fit, tmp_path, held_out):
    sparsity = AdaptiveSparsity(held_out=held_out)
    torch.manual_seed(0)
    module, log = Foreign(), Log()
    before = {}

    class Before(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                before.update(copy.deepcopy(pl_module.backbone.state_dict()))

    trainer = fit(module, ForeignData(), 5, callbacks=[log, Before(), _foreign_switch(sparsity)])
    assert isinstance(module.fc, MaskedLinearHead)
    assert list(log.figures) == [2, 3, 4]
    assert log.of("keep") == pytest.approx(_expected_rates(log, sparsity, 3), abs=1e-6)
    for name, value in module.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    if held_out:
        x, y = ForeignData()._set(24).tensors
        p = module.eval()(x).detach().softmax(dim=-1)
        assert log.of("accuracy")[-1] == pytest.approx(float((p.argmax(dim=-1) == y).float().mean()))
        assert log.of("confidence")[-1] == pytest.approx(float(p.amax(dim=-1).mean()), abs=1e-6)
    trainer.save_checkpoint(tmp_path / "foreign.ckpt")
    again = load_stages(Foreign(), tmp_path / "foreign.ckpt")
    x = torch.randn(4, 6)
    assert torch.equal(again(x), module.eval()(x))


def test_labels_of_other_batches_can_be_named(fit):
    class Named(MaskedClassifier):
        def labels(self, batch):
            return batch["y"]

    def loader():
        x, y = ForeignData()._set(60).tensors
        return DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=20)

    class Loaders(LightningDataModule):
        def train_dataloader(self):
            return loader()

    log, sparsity = Log(), AdaptiveSparsity(held_out=False)
    fit(DictBatches(), Loaders(), 4, callbacks=[log, _foreign_switch(sparsity, Named)])
    assert list(log.figures) == [1, 2, 3]
    named = Log()
    fit(DictBatches(), Loaders(), 4, callbacks=[named, _foreign_switch(sparsity, batch=("x", "y"))])
    assert list(named.figures) == [1, 2, 3]
    with pytest.raises(TypeError, match=r"MaskedClassifier needs batches.*dict.*Give batch="):
        fit(DictBatches(), Loaders(), 4, callbacks=[_foreign_switch(sparsity)])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_deployed_network_comes_back_from_its_file(fit, tmp_path):
    module = _module(MaskedClassifier(-2, MaskedBottleneck, training=_training()))
    trainer = fit(module, _data(), 3)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = load_module(tmp_path / "end.ckpt")
    assert isinstance(again, MaCCal)
    assert again.stage == 1
    assert isinstance(again.head, MaskedBottleneck)
    assert again.head.keep == module.head.keep != 1.0
    image = torch.randn(4, 1, 8, 8)
    assert torch.equal(again(image), module.eval()(image))


CLEAN_PASS = AdaptiveSparsity(gamma=0.95, eta=(0.1, 0.001), held_out="clean_pass")
KINDS = {
    "held-out": {"sparsity": AdaptiveSparsity(eta=(0.1, 0.001))},
    "training": {"classifier": MaskedBottleneck, "sparsity": TRAINING_FIGURES},
    "clean-pass": {"classifier": MaskedBottleneck, "sparsity": CLEAN_PASS},
    "held": {"classifier": partial(MaskedBottleneck, gradient="held"), "sparsity": TRAINING_FIGURES},
    "destroyed": {
        "classifier": partial(MaskedLinearHead, gradient="destroyed", scaling="none"),
        "sparsity": TRAINING_FIGURES,
        "mask_every": "epoch",
    },
}


def _switch(kind):
    return MaskedClassifier(-3, training=_training(), **KINDS[kind])


def fit_stopped(rank, world, folder, kind, stop_after=None, resume=False):
    """Five epochs, the last three masked; stopped after a step, resumed from ``last.ckpt``, or neither."""
    seed_everything(11, workers=True)
    data = _data(batch_size=16 // world)
    module = _module(_switch(kind))
    preemption = Preemption(folder)
    log, watch = Log(), cases.Watch(preemption, stop_after)
    keep = ModelCheckpoint(folder, filename="best", save_last=True, save_on_train_epoch_end=True)
    run = cases.trainer(folder, world, [StepSeed(), log, watch, preemption, keep], max_epochs=2)
    stopped = None
    try:
        run.fit(module, datamodule=data, ckpt_path=str(Path(folder) / "last.ckpt") if resume else None)
    except Preempted as leaving:
        stopped = leaving.code
        log._take(run, run.current_epoch - 1)  # what the last whole epoch has logged
    os.environ.pop("PL_GLOBAL_SEED", None)
    figures = {epoch: {key: found[key] for key in KEYS} for epoch, found in log.figures.items()}
    masks = [mask for masks in log.masks for mask in masks]
    return {"stopped": stopped, "digest": cases.digest(module), "figures": figures, "masks": masks}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {kind: fit_stopped(0, 1, str(tmp_path_factory.mktemp("whole")), kind) for kind in ("held-out", "training")}


# 69 training images in batches of 16: 5 steps an epoch, the stage begins with the 11th
@pytest.mark.parametrize("kind", ["held-out", "training"])
@pytest.mark.parametrize("stop_after", [8, 10, 12, 15, 18, 20, 23])
def test_resumed_run_is_bit_equal(whole, tmp_path, kind, stop_after):
    stopped = fit_stopped(0, 1, str(tmp_path), kind, stop_after)
    resumed = fit_stopped(0, 1, str(tmp_path), kind, resume=True)
    assert stopped["stopped"] == 143
    assert resumed["digest"] == whole[kind]["digest"]
    assert stopped["figures"] | resumed["figures"] == whole[kind]["figures"]
    assert len({figures["mac_cal/keep"] for figures in whole[kind]["figures"].values()}) == 3
    masks = stopped["masks"] + resumed["masks"]
    assert len(masks) == len(whole[kind]["masks"]) > 0
    assert all(torch.equal(one, two) for one, two in zip(masks, whole[kind]["masks"], strict=True))


@pytest.mark.parametrize("kind", ["held-out", "training"])
def test_two_processes_agree_and_see_all_rows(pool2, whole, tmp_path, kind):
    one, two = pool2.run(fit_stopped, str(tmp_path), kind)
    assert one["digest"] == two["digest"]
    assert one["figures"] == two["figures"]
    assert all(torch.equal(a, b) for a, b in zip(one["masks"], two["masks"], strict=True))
    # the same global batches: up to rounding and BatchNorm of the first stage, what one process sees
    for epoch, figures in one["figures"].items():
        count = 30 if kind == "held-out" else 69
        share = figures["mac_cal/accuracy"] * count
        assert share == pytest.approx(round(share), abs=1e-4), epoch


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: AdaptiveSparsity(gamma=0.0), "gamma is 0.0"),
        (lambda: AdaptiveSparsity(gamma=math.nan), "gamma is nan"),
        (lambda: AdaptiveSparsity(start=1.5), "start 1.5"),
        (lambda: AdaptiveSparsity(minimum=0.0), "minimum is 0.0"),
        (lambda: AdaptiveSparsity(minimum=0.6), "minimum is 0.6 and start 0.5"),
        (lambda: AdaptiveSparsity(eta=(0.001, 0.1)), r"\(0\.001, 0\.1\)"),
        (lambda: AdaptiveSparsity(eta=(0.1, 0.0)), r"\(0\.1, 0\.0\)"),
        (lambda: AdaptiveSparsity(eta=(0.1,)), r"eta is \(0\.1,\)"),
        (lambda: AdaptiveSparsity(q_is="drop"), "q_is is 'drop'.*'keep', 'sparsity'"),
        (lambda: decayed_step(0, 40), r"t is 0.*1\.\.40"),
        (lambda: decayed_step(41, 40), r"t is 41.*1\.\.40"),
        (lambda: decayed_step(1, 40, -0.1, -0.1), "0 < last"),
        (
            lambda: adapt_keep_rate(0.5, math.nan, 0.5, gamma=1.0, eta=0.1, minimum=0.1, q_is="keep"),
            "confidence is nan",
        ),
        (lambda: adapt_keep_rate(0.5, 0.5, 0.5, gamma=1.0, eta=0.1, minimum=0.1, q_is="q"), "q_is is 'q'"),
        (lambda: MaskedLinear(3, 2, gradient="dense"), "gradient is 'dense'.*'straight_through'"),
        (lambda: MaskedLinear(3, 2, scaling="mean"), "scaling is 'mean'.*'inverted'"),
        (lambda: MaskedLinearHead(3, 2).set_keep(0.0), "keep is 0.0"),
        (lambda: MaskedLinearHead(3, 2).set_keep(1.1), "keep is 1.1"),
        (lambda: MaskedBottleneck(3, 2, layers="none"), "layers is 'none'.*'first'"),
        (lambda: MaskedBottleneck(3, 2, hidden=0), "hidden is 0"),
        (lambda: MaskedClassifier(-2, mask_every="step"), "mask_every is 'step'.*'epoch'"),
        (lambda: MaskedClassifier.paper(-2, q_is="rate"), "q_is is 'rate'"),
        (lambda: confidence_sums(torch.zeros(4, 3), torch.zeros(2)), "4 rows of logits for 2 labels"),
    ],
)
def test_impossible_settings_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_a_switch_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"switch of MaCCal.*MaskedClassifier\(-40\)"):
        MaCCal(3, StageSwitch(-40), encoder="digits_cnn")


@pytest.mark.parametrize(
    ("switch", "error", "named"),
    [
        (MaskedClassifier(-2, LinearHead), TypeError, "classifier builds a LinearHead.*MaskedHead"),
        (MaskedClassifier(-2, MaskedBottleneck, warm_start=True), TypeError, "MaskedBottleneck.*MaskedLinearHead"),
    ],
)
def test_classifiers_that_cannot_be_masked_are_refused_before_training(fit, switch, error, named):
    module = _module(switch)
    before = cases.digest(module)
    with pytest.raises(error, match=named):
        fit(module, _data(), 3)
    assert cases.digest(module) == before


def test_a_warm_start_from_something_else_is_refused_before_training(fit):
    module = _module(MaskedClassifier(-2, partial(MaskedLinearHead, bias=False), warm_start=True))
    with pytest.raises(ValueError, match=r"bias=False.*warm_start=False"):
        fit(module, _data(), 3)
    switch = _foreign_switch(AdaptiveSparsity(held_out=False))
    switch.warm_start = True
    module = Foreign()
    module.fc = nn.Sequential(nn.Dropout(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match=r"the previous classifier is a Sequential.*warm_start=False"):
        fit(module, ForeignData(), 4, callbacks=[switch])


@pytest.mark.parametrize("data", [ToyDataModule(SplitSpec(val=31), train_size=130), None], ids=["none", "loaders"])
def test_data_without_a_calibration_split_is_refused_before_training(fit, tmp_path, data):
    if data is not None:
        module = _module(MaskedClassifier(-2))
        before = cases.digest(module)
        with pytest.raises(ValueError, match=r"ToyDataModule.* has no calibration split.*held_out=False"):
            fit(module, data, 3)
        assert cases.digest(module) == before
        return
    trainer = Trainer(
        accelerator="cpu", max_epochs=4, logger=False, callbacks=[_foreign_switch(None)], default_root_dir=tmp_path
    )
    with pytest.raises(ValueError, match=r"plain loaders.* has no calibration split.*held_out=False"):
        trainer.fit(Foreign(), ForeignData().train_dataloader())
