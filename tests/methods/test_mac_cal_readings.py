"""MaC-Cal's further readings: a clean pass, masked weights that a step does not move, masked inference."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from calib_lightning.core import CachedFeatures, StageTraining
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import (
    AdaptiveSparsity,
    CrossEntropy,
    MaskedBottleneck,
    MaskedClassifier,
    MaskedLinear,
    MaskedLinearHead,
    masked_inference,
)
from calib_lightning.utils.seeding import derive_seed
from tests.ddp import cases
from tests.methods.test_mac_cal import CLEAN_PASS, KEYS, Foreign, Log, _data, _module, _sgd, _training, fit_stopped


def _softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _figures(logits, labels):
    p = _softmax(np.asarray(logits, dtype=np.float64))
    return p.max(axis=1).mean(), (p.argmax(axis=1) == np.asarray(labels)).mean()


# --- a clean pass over the training set ------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [None, CachedFeatures()], ids=["images", "stored"])
@pytest.mark.parametrize("scaling", ["expected", "none"])
def test_a_clean_pass_measures_the_deployed_classifier_on_unaugmented_training_images(fit, views, scaling):
    data, log = _data(), Log()
    data.augment = views is None

    def head(d, k):
        return MaskedBottleneck(d, k, scaling=scaling)

    switch = MaskedClassifier(-3, head, CLEAN_PASS, training=_training(views=views))
    module = _module(switch)
    fit(module, data, 5, callbacks=[log])
    data.batch_size = 1000
    (batch,) = data.evaluation_loader("train")
    assert len(batch.label) == 69
    features = module.eval().features(batch.image).detach().double().numpy()
    first, last = (layer.weight.detach().double().numpy() for layer in (module.head.first, module.head.last))
    q = module.head.keep if scaling == "expected" else 1.0
    inner = np.maximum(features @ (q * first).T + module.head.first.bias.detach().double().numpy(), 0)
    logits = inner @ (q * last).T + module.head.last.bias.detach().double().numpy()
    confidence, accuracy = _figures(logits, batch.label)
    assert log.of("confidence")[-1] == pytest.approx(confidence, abs=1e-6)
    assert log.of("accuracy")[-1] == pytest.approx(accuracy, abs=1e-6)
    assert len(set(log.of("keep"))) == 3
    assert not switch.uses_calibration


@pytest.mark.parametrize("stored", [False, True])
def test_a_clean_pass_reads_the_rows_that_a_foreign_loader_reads_and_leaves_its_order(fit, stored):
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(60, 6, generator=generator), torch.arange(60) % 3
    rows = [row for row in range(60) if row % 5]  # a fifth is left out
    batches = {}

    class Loaders(LightningDataModule):
        def train_dataloader(self):
            own = torch.Generator().manual_seed(3)
            sampler = SubsetRandomSampler(rows, generator=own)
            return DataLoader(TensorDataset(images, labels), batch_size=16, sampler=sampler)

    class Order(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches[key].append(batch[1].tolist())

    for held_out in ("clean_pass", False):
        key, log = held_out, Log()
        batches[key] = []
        torch.manual_seed(0)
        module = Foreign()
        training = StageTraining(optimizer=_sgd, views=CachedFeatures() if stored else None)
        sparsity = AdaptiveSparsity(held_out=held_out, eta=(0.0, 0.0))
        switch = MaskedClassifier(-3, sparsity=sparsity, training=training, encoder="backbone", head="fc")
        fit(module, Loaders(), 4, callbacks=[log, Order(), switch])
        if held_out:
            logits = module.eval()(images[rows]).detach()
            confidence, accuracy = _figures(logits, labels[rows])
            assert log.of("confidence")[-1] == pytest.approx(confidence, abs=1e-6)
            assert log.of("accuracy")[-1] == pytest.approx(accuracy, abs=1e-6)
    assert batches["clean_pass"] == batches[False]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(6), 0)] * 8)


def test_data_that_cannot_be_read_again_is_refused_before_training(fit):
    class Loaders(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=4)

    module = Foreign()
    before = cases.digest(module)
    switch = MaskedClassifier(-2, sparsity=CLEAN_PASS, encoder="backbone", head="fc")
    with pytest.raises(ValueError, match=r"held_out='clean_pass'.*must be a DataLoader with a batch_size over a map"):
        fit(module, Loaders(), 4, callbacks=[switch])
    assert cases.digest(module) == before
    with pytest.raises(ValueError, match=r"held_out is 'train'; it must be True .*'clean_pass'"):
        AdaptiveSparsity(held_out="train")
    with pytest.raises(ValueError, match="held_out is 1; it must be True"):
        AdaptiveSparsity(held_out=1)


def test_two_processes_measure_every_training_row_once(pool2, tmp_path):
    one, two = pool2.run(fit_stopped, str(tmp_path), "clean-pass")
    assert one["digest"] == two["digest"]
    assert one["figures"] == two["figures"]
    assert len(one["figures"]) == 3
    for figures in one["figures"].values():
        share = figures["mac_cal/accuracy"] * 69
        assert share == pytest.approx(round(share), abs=1e-4)


# --- what a step does to masked weights ------------------------------------------------------------------------------


def _stepped(gradient, masks=1, steps=3):
    """A layer before and after each step of SGD with momentum and weight decay, with the masks of the step."""
    torch.manual_seed(0)
    layer = MaskedLinear(20, 6, gradient=gradient)
    layer.keep.fill_(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        before, kept = layer.weight.detach().clone(), torch.zeros(6, 20, dtype=torch.bool)
        optimizer.zero_grad()
        for number in range(masks):
            layer.draw(derive_seed(step, number))
            kept |= layer.mask
            layer(torch.randn(8, 20)).square().sum().backward()
            if number == masks - 1:
                layer.before_update()
                optimizer.step()
            layer.clear()
        yield before, layer.weight.detach().clone(), kept


@pytest.mark.parametrize("masks", [1, 2])
def test_momentum_and_weight_decay_do_not_move_held_weights(masks):
    for before, after, kept in _stepped("held", masks):
        assert torch.equal(after[~kept], before[~kept])
        assert bool((after[kept] != before[kept]).all())
        assert 0 < int(kept.sum()) < 120
    moved = [bool((after[~kept] != before[~kept]).all()) for before, after, kept in _stepped("restricted", masks)]
    assert moved == [True] * 3


def test_the_first_step_moves_kept_weights_as_plain_sgd_does():
    torch.manual_seed(0)
    w = MaskedLinear(20, 6).weight.detach().double().numpy()
    bias = (torch.manual_seed(0), MaskedLinear(20, 6).bias)[1].detach().double().numpy()
    before, after, kept = next(iter(_stepped("held", steps=1)))
    torch.manual_seed(0)
    MaskedLinear(20, 6)
    h, m = torch.randn(8, 20).double().numpy(), kept.numpy()
    gradient = (2 * (h @ (w * m).T + bias)).T @ h * m
    np.testing.assert_allclose(before.numpy(), w, rtol=1e-6)
    np.testing.assert_allclose(after.numpy(), np.where(m, w - 0.1 * (gradient + 0.1 * w), w), rtol=1e-4, atol=1e-5)


def test_destroyed_weights_become_zero_and_may_grow_again():
    zeros = []
    for _, after, kept in _stepped("destroyed"):
        assert bool((after[~kept] == 0).all())
        zeros.append(after == 0)
        assert bool((after[kept] != 0).all())
    assert bool((zeros[0] & ~zeros[1]).any())


class Steps(Callback):
    """The masked weights and the mask around every step."""

    def __init__(self):
        self.before, self.held = None, []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        head = pl_module.head
        if isinstance(head, MaskedLinearHead) and head.linear.mask is not None:
            self.before = head.linear.weight.detach().clone(), head.linear.mask

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.before is not None:
            weight, mask = self.before
            now = pl_module.head.linear.weight
            self.held.append(bool(torch.equal(now[~mask], weight[~mask]) and (now[mask] != weight[mask]).any()))


@pytest.mark.parametrize("gradient", ["held", "restricted"])
def test_a_stage_holds_the_masked_weights_of_every_step(fit, gradient):
    steps, fixed = Steps(), AdaptiveSparsity(eta=(0.0, 0.0), held_out=False)
    switch = MaskedClassifier(-3, lambda d, k: MaskedLinearHead(d, k, gradient=gradient), fixed, training=_training())
    fit(_module(switch), _data(), 4, callbacks=[steps])
    # plain SGD moves them by weight decay
    assert steps.held == [gradient == "held"] * 14


def test_a_destroyed_classifier_stays_sparse(fit):
    fixed = AdaptiveSparsity(start=0.3, eta=(0.0, 0.0), held_out=False)
    head = MaskedLinearHead

    def build(d, k):
        return head(d, k, gradient="destroyed", scaling="none")

    module = _module(MaskedClassifier(-2, build, fixed, mask_every="epoch", training=_training()))
    fit(module, _data(), 3)
    share = float((module.head.linear.weight != 0).float().mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / module.head.linear.weight.numel())
    with pytest.raises(ValueError, match=r"gradient is 'destroyed' and mask_every is 'batch'.*mask_every='epoch'"):
        fit(_module(MaskedClassifier(-2, build, fixed, training=_training())), _data(), 3)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    kinds = ("clean-pass", "held", "destroyed")
    return {kind: fit_stopped(0, 1, str(tmp_path_factory.mktemp("whole")), kind) for kind in kinds}


@pytest.mark.parametrize("kind", ["clean-pass", "held", "destroyed"])
@pytest.mark.parametrize("stop_after", [12, 15, 18])
def test_resumed_run_is_bit_equal(whole, tmp_path, kind, stop_after):
    stopped = fit_stopped(0, 1, str(tmp_path), kind, stop_after)
    resumed = fit_stopped(0, 1, str(tmp_path), kind, resume=True)
    assert stopped["stopped"] == 143
    assert resumed["digest"] == whole[kind]["digest"]
    assert stopped["figures"] | resumed["figures"] == whole[kind]["figures"]
    assert len(whole[kind]["figures"]) == 3
    assert {key for figures in whole[kind]["figures"].values() for key in figures} == set(KEYS)


# --- masked inference ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier that has seen no mask, and its data."""
    torch.manual_seed(0)
    data = ToyDataModule(SplitSpec(val=31), batch_size=50, train_size=300)
    module = CrossEntropy(3, encoder="digits_cnn", optimizer=_sgd)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        default_root_dir=tmp_path_factory.mktemp("trained"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return trainer, module, data


@pytest.mark.parametrize("keep", [1.0, 0.6, 0.0])
def test_masked_inference_is_its_equation_on_the_whole_test_set(trained, keep):
    trainer, module, data = trained
    before = copy.deepcopy(module.state_dict())
    with masked_inference(module.head, keep, seed=4):
        (found, *_) = trainer.test(module, datamodule=data, verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items() if "head" in name)
    mask = torch.rand((3, 96), generator=torch.Generator().manual_seed(derive_seed(4, 0))) < keep
    weight, bias = (p.detach().double().numpy() for p in module.head.parameters())
    parts = [(module.eval().features(b.image).detach().double().numpy(), b.label) for b in data.test_dataloader()[0]]
    features, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    p = _softmax(features @ (weight * mask.numpy()).T + bias)
    assert found["test/accuracy"] == pytest.approx((p.argmax(axis=1) == labels).mean(), abs=1e-6)
    assert found["test/nll"] == pytest.approx(-np.log(p[np.arange(len(p)), labels]).mean(), rel=1e-4)


def test_draws_depend_on_the_seed_and_their_mean_is_the_scaled_classifier():
    torch.manual_seed(0)
    head, h = MaskedBottleneck(30, 4, activation=False, scaling="none").double().eval(), torch.ones(2, 30).double()
    before = copy.deepcopy(head.state_dict())
    draws = []
    with torch.no_grad():
        for seed in range(3000):
            with masked_inference(head, 0.5, seed):
                draws.append(head(h))
        with masked_inference(head, 0.5, 7):
            assert torch.equal(head(h), draws[7])
    assert not torch.equal(draws[0], draws[1])
    first, last = head.first, head.last
    expected = F.linear(F.linear(h, 0.5 * first.weight, first.bias), 0.5 * last.weight, last.bias)
    spread = torch.stack(draws).std(dim=0) / math.sqrt(3000)
    assert bool(((torch.stack(draws).mean(dim=0) - expected).abs() < 5 * spread).all())
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_of_a_masked_classifier_the_deployed_weights_are_masked_and_errors_leave_it_whole():
    head, h = MaskedLinearHead(30, 4), torch.randn(2, 30)
    head.set_keep(0.25)
    weight = head.eval().linear.weight.detach().clone()
    with masked_inference(head, 0.5, 1):
        mask = torch.rand((4, 30), generator=torch.Generator().manual_seed(derive_seed(1, 0))) < 0.5
        assert torch.equal(head(h), F.linear(h, weight * mask * 0.25, head.linear.bias))
    with pytest.raises(KeyError), masked_inference(head, 0.5):
        raise KeyError
    assert torch.equal(head.linear.weight, weight)
    for keep in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"keep is {keep}; it must be in \[0, 1\]"), masked_inference(head, keep):
            pass
    with pytest.warns(FutureWarning, match="deprecated"):
        old = nn.utils.weight_norm(nn.Linear(4, 2))
    for normed in (nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), old):
        refused = pytest.raises(ValueError, match=r"weight of a (Parametrized)?Linear is computed from others")
        with refused, masked_inference(nn.Sequential(nn.Linear(4, 4), normed), 0.0):
            pass
    without = pytest.raises(ValueError, match="The classifier is a ReLU without a linear layer")
    with without, masked_inference(nn.ReLU(), 0.5):
        pass
