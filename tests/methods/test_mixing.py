"""Batch transforms: mixup, RegMixup, MIT-L and MIT-A, alone and around other criteria."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calib_lightning import methods
from calib_lightning.core import ClassificationModule
from calib_lightning.core.encoders import NoBlocksError
from calib_lightning.data import ToyDataModule
from calib_lightning.types import Batch

TRANSFORMS = [
    methods.MixupTransform(0.4),
    methods.RegMixupTransform(2.0),
    methods.MITLTransform(),
    methods.MITATransform(),
]
by_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)


class Linear(ClassificationModule):
    """A linear network: what is mixed can be computed by hand."""

    def __init__(self, criterion=None, batch_transform=None):
        super().__init__(3, criterion=criterion, encoder="digits_cnn", batch_transform=batch_transform)
        self.encoder.network = nn.Sequential(nn.Sequential(), nn.Flatten(1))
        self.head.linear = nn.Linear(4, 3)
        self.images = []

    def forward(self, image):
        self.images.append(image.detach().clone())
        return self.head(image.flatten(1))


def _batch(n=6):
    torch.manual_seed(5)
    return Batch(torch.randn(n, 1, 2, 2), torch.randint(3, (n,)), torch.arange(n))


def _draw(alpha, n=6):
    """What the transform drew after the same seed."""
    torch.manual_seed(2)
    weight, order = methods.mixup.beta_weight(alpha), torch.randperm(n)
    assert 0.05 < weight < 0.95
    assert order.tolist() != list(range(n))
    return weight, order


def test_mixup_equals_its_equation():
    module, batch = Linear(methods.FocalLoss(2.0), methods.MixupTransform(1.0)), _batch()
    torch.manual_seed(2)
    loss, logits = module.loss(batch)
    weight, order = _draw(1.0)
    image = batch.image.numpy()
    mixed = weight * image + (1 - weight) * image[order]
    np.testing.assert_allclose(module.images[0].numpy(), mixed, rtol=1e-5, atol=1e-6)
    focal = methods.FocalLoss(2.0)
    expected = weight * focal(logits, batch.label) + (1 - weight) * focal(logits, batch.label[order])
    torch.testing.assert_close(loss, expected)


def test_regmixup_equals_its_equation_in_one_pass():
    module, batch = Linear(batch_transform=methods.RegMixupTransform(2.0, eta=0.5)), _batch()
    torch.manual_seed(2)
    loss, clean = module.loss(batch)
    weight, order = _draw(2.0)
    (images,) = module.images
    image = batch.image.numpy()
    both = np.concatenate([image, weight * image + (1 - weight) * image[order]])
    np.testing.assert_allclose(images.numpy(), both, rtol=1e-5, atol=1e-6)
    mixed = module(images[6:])
    of_mixed = weight * F.cross_entropy(mixed, batch.label) + (1 - weight) * F.cross_entropy(mixed, batch.label[order])
    torch.testing.assert_close(loss, (F.cross_entropy(clean, batch.label) + 0.5 * of_mixed) / 1.5)
    torch.testing.assert_close(clean, module(batch.image))


def test_regmixup_of_weight_one_is_cross_entropy(monkeypatch):
    monkeypatch.setattr("calib_lightning.methods.regmixup.beta_weight", lambda alpha: 1.0)
    module, batch = Linear(batch_transform=methods.RegMixupTransform()), _batch()
    loss, _ = module.loss(batch)
    torch.testing.assert_close(loss, F.cross_entropy(module(batch.image), batch.label))


@pytest.mark.parametrize("transform", [methods.MITLTransform(), methods.MITATransform()], ids=["MIT-L", "MIT-A"])
def test_mit_recovers_both_inputs_of_a_linear_network(transform):
    module, batch = Linear(batch_transform=transform), _batch()
    torch.manual_seed(0)
    loss, own = module.loss(batch)
    torch.testing.assert_close(own, module(batch.image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(own, batch.label), rtol=1e-4, atol=1e-5)


def test_decoupling_equals_the_authors_form():
    f1, f2 = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    r1, r2 = 0.9, 0.2
    a, b = methods.decouple(f1, f2, (r1, r2))
    torch.testing.assert_close(r1 * a + (1 - r1) * b, f1)
    torch.testing.assert_close(r2 * a + (1 - r2) * b, f2)


def test_mit_l_equals_its_equation_on_a_network():
    transform = methods.MITLTransform()
    module = methods.Focal(3, encoder="digits_cnn", batch_transform=transform)
    batch = next(iter(_data().train_dataloader()))
    torch.manual_seed(3)
    loss, own = module.loss(batch)
    torch.manual_seed(3)
    r1, r2 = methods.draw_ratios(0.5, 0.5)
    order = torch.randperm(len(batch.label))
    f1 = module(r1 * batch.image + (1 - r1) * batch.image[order]).detach().double().numpy()
    f2 = module(r2 * batch.image + (1 - r2) * batch.image[order]).detach().double().numpy()
    a, b = ((1 - r2) * f1 - (1 - r1) * f2) / (r1 - r2), (r1 * f2 - r2 * f1) / (r1 - r2)
    np.testing.assert_allclose(own.detach().numpy(), a, rtol=1e-3, atol=1e-4)
    focal = 0.0
    for z, y in ((a, batch.label.numpy()), (b, batch.label[order].numpy())):
        p = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True))[np.arange(len(y)), y]
        focal += -np.mean((1 - p) ** 3 * np.log(p)) / 2
    assert loss.item() == pytest.approx(focal, rel=1e-3)


def test_mit_a_decouples_after_every_block():
    module = methods.MITA(3, encoder="digits_cnn").double()
    batch = next(iter(_data().train_dataloader()))
    image = batch.image.double()
    torch.manual_seed(3)
    loss, own = module.loss(batch._replace(image=image))
    torch.manual_seed(3)
    order = torch.randperm(len(batch.label))
    a, b = image, image[order]
    blocks = module.encoder.blocks
    for number, block in enumerate(blocks):
        r1, r2 = methods.draw_ratios(0.5, 0.5)
        f1, f2 = block(r1 * a + (1 - r1) * b), block(r2 * a + (1 - r2) * b)
        if number == len(blocks) - 1:
            f1, f2 = module.head(f1.flatten(1)), module.head(f2.flatten(1))
        a, b = ((1 - r2) * f1 - (1 - r1) * f2) / (r1 - r2), (r1 * f2 - r2 * f1) / (r1 - r2)
    torch.testing.assert_close(own, a, rtol=1e-9, atol=1e-9)
    expected = (F.cross_entropy(a, batch.label) + F.cross_entropy(b, batch.label[order])) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_ratios_keep_their_distance_and_sides():
    torch.manual_seed(0)
    for alpha, margin in ((0.5, 0.5), (1.0, 0.0), (20.0, 0.1)):
        ratios = np.array([methods.draw_ratios(alpha, margin) for _ in range(300)])
        assert (ratios[:, 0] >= 0.5).all()
        assert (ratios[:, 1] <= 0.5).all()
        assert (ratios[:, 0] - ratios[:, 1] >= margin).all()
        assert (ratios[:, 0] > ratios[:, 1]).all()


@by_transform
def test_it_composes_with_other_criteria_and_evaluation_is_plain(transform, fit):
    data = _data()
    for criterion in (methods.MMCELoss(), methods.BrierLoss()):
        module = ClassificationModule(3, criterion=criterion, encoder="digits_cnn", batch_transform=transform)
        batch = next(iter(data.train_dataloader()))
        loss, logits = module.loss(batch)
        loss.backward()
        assert logits.shape == (len(batch.label), 3)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
        module.eval()
        torch.testing.assert_close(module.outputs(batch.image).logits, module.head(module.encoder(batch.image)))


@pytest.mark.parametrize("transform", TRANSFORMS[:3], ids=lambda t: type(t).__name__)
def test_soft_labels_are_mixed_as_the_labels_they_are(transform):
    module, batch = Linear(batch_transform=transform), _batch()
    torch.manual_seed(1)
    hard, _ = module.loss(batch)
    torch.manual_seed(1)
    soft, _ = module.loss(batch._replace(label=F.one_hot(batch.label, 3).float()))
    torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: methods.MixupTransform(0.0), "alpha is 0"),
        (lambda: methods.MixupTransform(float("nan")), "alpha is nan"),
        (lambda: methods.RegMixupTransform(-1.0), "alpha is -1"),
        (lambda: methods.RegMixupTransform(1.0, eta=-1.0), "eta is -1"),
        (lambda: methods.MITLTransform(margin=1.0), "margin is 1"),
        (lambda: methods.MITATransform(alpha=0.0), "alpha is 0"),
        (lambda: methods.MITLTransform(alpha=200.0, margin=0.9), "unreachable"),
        (lambda: methods.FocalSchedule(3, gammas=[5.0, 3.0], milestones=[]), "2 gammas for 0 milestones"),
        (lambda: methods.FocalSchedule(3, gammas=[5.0, -3.0], milestones=[2]), "-3"),
        (lambda: methods.FocalSchedule(3, gammas=[5.0, 3.0, 1.0], milestones=[3, 3]), r"\[3, 3\]"),
    ],
)
def test_bad_settings_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_a_method_with_a_transform_takes_no_second_one():
    for method in (methods.Mixup, methods.RegMixup, methods.MITL, methods.MITA, methods.AugMix):
        with pytest.raises(ValueError, match="batch_transform cannot be set"):
            method(3, encoder="digits_cnn", batch_transform=methods.MixupTransform())
        method(3, encoder="digits_cnn", batch_transform=None)
    with pytest.raises(TypeError, match="'MixupTransform'"):
        methods.Brier(3, encoder="digits_cnn", batch_transform="MixupTransform")


def test_mit_a_needs_blocks():
    with pytest.raises(NoBlocksError, match="vit_tiny"):
        methods.MITA(3, encoder="vit_tiny_patch16_224")


def test_gamma_follows_its_schedule(fit):
    from lightning.pytorch import Callback

    class Gammas(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append((trainer.current_epoch, pl_module.criterion.gamma))

    gammas = Gammas()
    module = methods.FocalSchedule(
        3,
        gammas=[5.0, 3.0, 1.0],
        milestones=[1, 3],
        encoder="digits_cnn",
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )
    fit(module, ToyDataModule(train_size=60), epochs=4, callbacks=[gammas])
    assert sorted(set(gammas.seen)) == [(0, 5.0), (1, 3.0), (2, 3.0), (3, 1.0)]


def _data():
    data = ToyDataModule(batch_size=16, train_size=60)
    data.setup()
    return data
