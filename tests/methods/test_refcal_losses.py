"""RefCal's second stage with every loss of its release, mixup around them, and its training in one stage."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning import methods
from calib_lightning.core import CachedFeatures, LinearHead, Preemption, StageSwitch, StageTraining, load_module
from calib_lightning.data import DigitsDataModule, SplitSpec, ToyDataModule
from calib_lightning.data.views import CleanViews, ContrastiveViews
from calib_lightning.methods import AdaFocalLoss, CRLLoss, MDCALoss, RefCal
from calib_lightning.types import Batch
from calib_lightning.utils.seeding import derive_seed
from tests.ddp import cases
from tests.methods.table import LOSSES
from tests.methods.test_ada_focal import _adapted
from tests.methods.test_methods import _SaveAt
from tests.methods.test_refcal import loop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]


def data(**options):
    return ToyDataModule(SplitSpec(val=31), **{"batch_size": 16, "train_size": 130} | options)


def refcal(criterion, at_epoch=-3, views=None, num_classes=3, **options):
    torch.manual_seed(0)
    training = StageTraining(partial(SGD, lr=0.01, momentum=0.9), criterion=criterion, views=views or CleanViews())
    options = {"switch": StageSwitch(at_epoch, training=training)} | options
    views = ContrastiveViews((0.5, 1.0), flip=False)
    sgd = partial(SGD, lr=0.1, momentum=0.9)
    return RefCal(num_classes, 16, views=views, encoder="digits_cnn", optimizer=sgd, **options)


class Steps(Callback):
    """Epoch, logits, labels, positions and loss of every step of the second stage; logits of every validation."""

    def __init__(self):
        self.steps, self.validated, self.handle = [], {}, None

    def _catch(self, head, inputs, logits):
        self.logits = logits.detach().double().numpy()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.stage:
            self.handle = pl_module.head.register_forward_hook(self._catch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            found = (self.logits, batch.label.numpy(), batch.index.numpy(), outputs["loss"].item())
            self.steps.append((trainer.current_epoch, *found))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        found = outputs.logits.detach().double().numpy(), batch.label.numpy()
        self.validated.setdefault(trainer.current_epoch, []).append(found)


# --- the losses of the release, without AUCM -------------------------------------------------------------------------

RELEASED = (
    *("cross_entropy", "focal", "label_smoothing", "mdca", "brier", "dca", "mmce", "flsd", "mbls", "acls"),
    "logit_norm",
)
ROWS = [row for row in LOSSES if row.file in RELEASED]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file)
def test_every_loss_of_the_release_is_minimised_in_the_second_stage(fit, row):
    assert len(ROWS) == len(RELEASED)
    steps = Steps()
    fit(refcal(row.build(3), at_epoch=-8), data(), 9, callbacks=[steps])
    for _, logits, labels, _, loss in steps.steps:
        assert loss == pytest.approx(row.reference(logits, np.eye(3)[labels]), rel=1e-4, abs=1e-6)
    epochs = [np.mean([loss for epoch, *_, loss in steps.steps if epoch == wanted]) for wanted in range(1, 9)]
    assert min(epochs[1:]) < epochs[0]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_penalty_may_go_around_every_classification_loss(fit, strength):
    steps = Steps()
    fit(refcal(MDCALoss(methods.LabelSmoothingLoss(0.1), strength)), data(), 4, callbacks=[steps])
    smoothing = next(row for row in LOSSES if row.file == "label_smoothing").reference
    for _, logits, labels, _, loss in steps.steps:
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        penalty = np.abs(p.mean(axis=0) - np.eye(3)[labels].mean(axis=0)).mean()
        assert loss == pytest.approx(smoothing(logits, np.eye(3)[labels]) + strength * penalty, rel=1e-4)


def replayed(steps, strength, rows=99, first=1):
    """Losses and final counts of CRL over the steps, by the authors' rules, counted from the switch."""
    count, losses, pairs = np.zeros(rows), [], 0
    for epoch, z, labels, index, _ in steps:
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        span = max(1, epoch - first) - count.min()
        rate = np.clip((count[index] - count.min()) / span, 0, 1) if span > 0 else np.zeros(len(index))
        kappa, expected = np.exp(log_p).max(axis=1), -log_p[np.arange(len(index)), labels].mean()
        for i in range(len(index)):
            j = (i + 1) % len(index)
            if rate[i] != rate[j]:
                pairs += 1
                gap = np.sign(rate[i] - rate[j]) * (kappa[i] - kappa[j])
                expected += strength * max(0.0, abs(rate[i] - rate[j]) - gap) / len(index)
        losses.append(expected)
        count[index] += log_p.argmax(axis=1) == labels
    return losses, count, pairs


@pytest.mark.parametrize("views", [CleanViews(), CachedFeatures()], ids=["images", "stored"])
def test_crl_learns_in_the_second_stage(fit, views):
    steps, criterion = Steps(), CRLLoss(0.5)
    fit(refcal(criterion, at_epoch=-4, views=views), data(), 5, callbacks=[steps])
    losses, count, pairs = replayed(steps.steps, 0.5)
    assert [loss for *_, loss in steps.steps] == pytest.approx(losses, rel=1e-4)
    assert pairs > 50
    assert criterion.history.count.tolist() == count.tolist()
    assert 0 < count.sum() < 4 * 99
    # a second run begins with an empty history
    again = Steps()
    fit(refcal(criterion, at_epoch=-4, views=views), data(), 5, callbacks=[again])
    assert [loss for *_, loss in again.steps] == [loss for *_, loss in steps.steps]


@pytest.mark.parametrize("wrapped", [False, True])
def test_ada_focal_follows_the_validation_in_the_second_stage(fit, wrapped):
    steps, criterion = Steps(), AdaFocalLoss(n_bins=5, rate=2.0)
    fit(refcal(MDCALoss(criterion, 0.3) if wrapped else criterion), data(), 4, callbacks=[steps])
    edges, gammas = np.linspace(0, 1, 6), np.ones(5)
    for epoch in (1, 2, 3):
        for when, z, labels, _, loss in steps.steps:
            if when == epoch:
                p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
                own = p[np.arange(len(labels)), labels]
                gamma = gammas[np.searchsorted(edges[1:-1], own, side="right")]
                expected = -(np.where(gamma > 0, 1 - own, 1 + own) ** np.abs(gamma) * np.log(own)).mean()
                penalty = 0.3 * np.abs(p.mean(axis=0) - np.eye(3)[labels].mean(axis=0)).mean()
                assert loss == pytest.approx(expected + penalty * wrapped, rel=1e-3)
        logits, labels = (np.concatenate(part) for part in zip(*steps.validated[epoch], strict=True))
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        gammas, edges = _adapted(gammas, p.max(axis=1), p.argmax(axis=1) == labels, rate=2.0)
    np.testing.assert_allclose(criterion.gammas.numpy(), gammas, rtol=1e-4)
    assert len(np.unique(gammas)) > 2


@pytest.mark.parametrize(("every", "epochs"), [(5, 3), (3, 2)])
def test_ada_focal_needs_a_validation_within_its_stage(fit, every, epochs):
    steps = Steps()
    with pytest.raises(ValueError, match=r"no validation batches in the epochs.*check_val_every_n_epoch"):
        fit(refcal(AdaFocalLoss(), at_epoch=1), data(), epochs, callbacks=[steps], check_val_every_n_epoch=every)
    assert not steps.steps
    criterion = AdaFocalLoss(n_bins=5, rate=2.0)
    fit(refcal(criterion, at_epoch=1), data(), epochs, check_val_every_n_epoch=epochs)
    assert len(criterion.gammas.unique()) > 1


LEARNING = {"crl": lambda: CRLLoss(2.0), "ada_focal": lambda: AdaFocalLoss(n_bins=5, rate=3.0)}


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("step", [12, 15, 18])
def test_a_fit_resumed_within_the_stage_ends_in_the_same_bits(fit, tmp_path, name, step):
    # 7 steps an epoch; the second stage begins with the 8th
    ends = []
    for options in ({"callbacks": [_SaveAt(step), Preemption(tmp_path)]}, {"ckpt_path": tmp_path / "last.ckpt"}):
        module = refcal(LEARNING[name]())
        fit(module, data(), 4, **options)
        ends.append({key: value.clone() for key, value in module.state_dict().items()})
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key
    key = {"crl": "criterion.history.count", "ada_focal": "criterion.gammas"}[name]
    assert len(ends[0][key].unique()) > 2
    loaded = load_module(tmp_path / "last.ckpt")
    assert isinstance(loaded.head, LinearHead)


def fit_in_pool(rank, world, folder, name):
    torch.manual_seed(0)
    module = refcal(LEARNING[name]())
    trainer = cases.trainer(folder, world, [Steps()], max_epochs=1)
    trainer.fit(module, datamodule=data(batch_size=16 // world))
    return {key: value.numpy() for key, value in module.state_dict().items() if key.startswith(("head.", "criterion."))}


@pytest.mark.parametrize("name", LEARNING)
def test_two_processes_learn_the_same(pool2, tmp_path, name):
    one, two = pool2.run(fit_in_pool, str(tmp_path), name)
    for key, value in one.items():
        np.testing.assert_array_equal(value, two[key])
    learned = one[{"crl": "criterion.history.count", "ada_focal": "criterion.gammas"}[name]]
    assert len(np.unique(learned)) > 2
    assert name != "crl" or len(learned) == 99


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.criterion = nn.Linear(6, 5), nn.Linear(5, 3), nn.CrossEntropyLoss()

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", LEARNING)
def test_what_cannot_learn_is_refused_before_training(fit, name, tmp_path):
    criterion = LEARNING[name]()
    trainer = cases.trainer(tmp_path, 1, [StageSwitch(1, training=StageTraining(criterion=criterion))], max_epochs=2)
    loader = DataLoader(TensorDataset(torch.zeros(8, 6), torch.arange(8) % 3), 4)
    with pytest.raises(ValueError, match=rf"{type(criterion).__name__}, which learns from .*ClassificationModule"):
        trainer.fit(Foreign(), loader)
    assert trainer.global_step == 0
    if name == "crl":
        module, source, message = refcal(criterion, batch_transform=methods.MixupTransform()), data(), "not mixtures"
    else:
        module, source, message = refcal(criterion), ToyDataModule(train_size=60), "no validation batches"
    before = cases.digest(module)
    with pytest.raises(ValueError, match=message):
        fit(module, source, 4)
    assert cases.digest(module) == before


# --- mixup -----------------------------------------------------------------------------------------------------------


def test_mixup_acts_in_the_second_stage_only(fit):
    weights = []

    class Inputs(Steps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            seed = derive_seed(0, pl_module.stage, 0, trainer.global_step, batch_idx)
            self.draw, self.image = torch.Generator().manual_seed(seed), None
            pl_module.encoder.register_forward_pre_hook(lambda _, inputs: setattr(self, "image", inputs[0]))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.set_state(self.draw.get_state())
                weight, order = float(torch.distributions.Beta(*torch.ones(2).double()).sample()), torch.randperm(16)
            if pl_module.stage and len(batch.label) == 16:
                z, labels = self.steps[-1][1], batch.label.numpy()
                targets = weight * np.eye(3)[labels] + (1 - weight) * np.eye(3)[labels[order.numpy()]]
                log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
                assert outputs["loss"].item() == pytest.approx(-(targets * log_p).sum(axis=1).mean(), rel=1e-5)
                torch.testing.assert_close(self.image, weight * batch.image + (1 - weight) * batch.image[order])
                weights.append(weight)
            elif not pl_module.stage:
                assert torch.equal(self.image, batch.image.flatten(0, 1))

    module = refcal(methods.CrossEntropyLoss(), batch_transform=methods.MixupTransform(1.0))
    fit(module, data(), 4, callbacks=[Inputs()])
    assert len(weights) == 18
    assert max(weights) - min(weights) > 0.5
    mixed = refcal(methods.BrierLoss(), views=CachedFeatures(), batch_transform=methods.MixupTransform())
    with pytest.raises(ValueError, match="CachedFeatures is incompatible with MixupTransform"):
        fit(mixed, data(), 4)


# --- one stage -------------------------------------------------------------------------------------------------------


def test_the_joint_loss_is_that_of_both_parts():
    module = refcal(methods.FocalLoss(2.0), joint=0.7)
    image, labels = torch.randn(5, 2, 1, 8, 8), torch.tensor([2, 0, 2, 1, 0])
    loss, logits = module.loss(Batch(image, labels, torch.arange(5)))
    features = module.encoder(image.flatten(0, 1))
    z = module.projection(features).view(5, 2, -1).detach().double()
    views = module.head(features).view(5, 2, 3).detach().double().numpy()
    p = np.exp(views) / np.exp(views).sum(axis=2, keepdims=True)
    own = p[np.arange(5)[:, None], np.arange(2)[None], labels.numpy()[:, None]]
    expected = -((1 - own) ** 2 * np.log(own)).mean() + 0.7 * loop(z, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(logits.detach().numpy(), views[:, 0], atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("build", [methods.CrossEntropyLoss, CRLLoss, AdaFocalLoss])
def test_one_stage_trains_and_evaluates_the_classifier_throughout(fit, tmp_path, build):
    found = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            found.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    digits = DigitsDataModule(SplitSpec(val=200), batch_size=64)
    module = refcal(build(), joint=1.0, num_classes=10)
    trainer = fit(module, digits, 4, callbacks=[Watch()])
    assert module.stage == 0
    assert len(found) == 4
    assert all({"train/loss", "train/accuracy", "val/nll", "val/accuracy"} <= set(metrics) for metrics in found[1:])
    assert found[-1]["val/accuracy"] > 0.8
    trainer.test(module, datamodule=digits, verbose=False)
    trainer.save_checkpoint(tmp_path / "joint.ckpt")
    loaded = load_module(tmp_path / "joint.ckpt")
    assert loaded.joint == 1.0
    image = torch.randn(4, 1, 8, 8)
    assert torch.equal(loaded(image), module.eval()(image))


def test_one_stage_is_resumed_within_an_epoch_bit_for_bit(fit, tmp_path):
    ends = []
    for options in ({"callbacks": [_SaveAt(9), Preemption(tmp_path)]}, {"ckpt_path": tmp_path / "last.ckpt"}):
        module = refcal(CRLLoss(), joint=0.5)
        fit(module, data(), 3, **options)
        ends.append({key: value.clone() for key, value in module.state_dict().items()})
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert ends[0].keys() == ends[1].keys()
