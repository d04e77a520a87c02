"""The consistency loss against its equation; views, loss and module together."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything

from calib_lightning.core import load_module
from calib_lightning.data import DigitsDataModule, Normalize, ToyDataModule
from calib_lightning.data.augmix import AugMixViews
from calib_lightning.methods.augmix import AugMix, AugMixTransform, jsd_consistency
from calib_lightning.methods.focal import Focal, focal_loss
from calib_lightning.types import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


def reference(*logits):
    """The equation in float64 numpy."""
    probs = []
    for z in logits:
        e = np.exp(z - z.max(axis=1, keepdims=True))
        probs.append(e / e.sum(axis=1, keepdims=True))
    mixture = np.clip(sum(probs) / 3, 1e-7, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(p > 0, p * (np.log(p) - np.log(mixture)), 0) for p in probs]
    return sum(term.sum(axis=1).mean() for term in terms) / 3


def three(n=6, k=4, scale=2.0, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(3, n, k))


@pytest.mark.parametrize(("n", "k", "scale"), [(6, 4, 2.0), (1, 2, 1.0), (5, 1000, 3.0), (4, 3, 30.0)])
def test_consistency_equals_the_equation(n, k, scale):
    z = three(n, k, scale)
    assert jsd_consistency(*torch.tensor(z)).item() == pytest.approx(reference(*z), rel=1e-10)


def test_consistency_equals_kl_div_with_its_gradient():
    logits = torch.tensor(three(), requires_grad=True)
    probs = logits.softmax(-1)
    mixture = probs.mean(0).clamp(1e-7, 1).log()
    expected = sum(F.kl_div(mixture, p, reduction="batchmean") for p in probs) / 3
    torch.testing.assert_close(jsd_consistency(*logits), expected)
    torch.testing.assert_close(
        torch.autograd.grad(jsd_consistency(*logits), logits), torch.autograd.grad(expected, logits)
    )
    assert torch.autograd.gradcheck(lambda x: jsd_consistency(*x), (logits,))


def test_consistency_has_its_bounds_and_symmetry():
    same = torch.tensor(three()[0])
    assert jsd_consistency(same, same, same).item() == pytest.approx(0, abs=1e-12)
    certain = 100 * torch.eye(3, dtype=torch.float64)
    # three certain and different classes: each KL is log 3
    assert jsd_consistency(certain[:1], certain[1:2], certain[2:]).item() == pytest.approx(np.log(3), rel=1e-12)
    a, b, c = torch.tensor(three(seed=1))
    torch.testing.assert_close(jsd_consistency(a, b, c), jsd_consistency(c, a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_give_a_finite_loss_and_gradient(dtype):
    logits = torch.zeros(3, 4, 5, dtype=dtype)
    logits[0, :, 0], logits[1, :, 0], logits[2, :, 1] = 1e4, -1e4, 1e4
    logits.requires_grad_()
    loss = jsd_consistency(*logits)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 0 < loss < np.log(3)
    assert logits.grad.isfinite().all()


def test_autocast_changes_nothing():
    logits = torch.tensor(three()).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = jsd_consistency(*logits)
    assert torch.equal(found, jsd_consistency(*logits))


def test_consistency_refuses_what_is_no_triple():
    a, b, c = torch.tensor(three())
    with pytest.raises(ValueError, match=r"\(6, 4\), \(5, 4\), \(6, 4\)"):
        jsd_consistency(a, b[:5], c)
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        jsd_consistency(a[:0], b[:0], c[:0])
    with pytest.raises(TypeError, match=r"torch\.int64"):
        jsd_consistency(a, b.long(), c)


def views_of_toy(n=8, size=8):
    rng = np.random.default_rng(0)
    image = torch.tensor(rng.normal(size=(n, 3, 1, size, size)), dtype=torch.float32)
    return Batch(image, torch.arange(n) % 10, torch.arange(n))


def in_one_forward(module, batch):
    """Logits of the three views, together in one batch: BatchNorm sees all of them."""
    image = torch.cat([batch.image[:, view] for view in range(3)])
    return module(image).reshape(3, len(batch.label), -1)


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_criterion_of_clean_images_and_the_consistency(training):
    torch.manual_seed(0)
    module = AugMix(10, strength=12.0, encoder="digits_cnn").train(training)
    batch = views_of_toy()
    clean, first, second = in_one_forward(module, batch)
    loss, logits = module.loss(batch)
    expected = F.cross_entropy(clean, batch.label) + 12 * reference(
        *(x.detach().double().numpy() for x in (clean, first, second))
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(logits, clean)


def test_composes_with_another_method_and_soft_targets():
    torch.manual_seed(0)
    module = Focal(10, gamma=2.0, batch_transform=AugMixTransform(strength=3.0), encoder="digits_cnn")
    batch = views_of_toy()
    clean, first, second = in_one_forward(module, batch)
    expected = focal_loss(clean, batch.label, gamma=2.0) + 3 * jsd_consistency(clean, first, second)
    torch.testing.assert_close(module.loss(batch)[0], expected)
    soft = batch._replace(label=torch.full((8, 10), 0.1))
    expected = focal_loss(clean, soft.label, gamma=2.0) + 3 * jsd_consistency(clean, first, second)
    torch.testing.assert_close(module.loss(soft)[0], expected)


def test_no_strength_is_the_criterion_alone():
    torch.manual_seed(0)
    module, batch = AugMix(10, strength=0.0, encoder="digits_cnn").eval(), views_of_toy()
    expected = F.cross_entropy(module(batch.image[:, 0]), batch.label)
    torch.testing.assert_close(module.loss(batch)[0], expected)


def test_the_network_runs_once():
    module, calls = AugMix(10, encoder="digits_cnn"), []
    module.encoder.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    module.loss(views_of_toy())
    assert calls == [24]


@pytest.mark.parametrize("shape", [(8, 1, 8, 8), (8, 2, 1, 8, 8), (8, 3, 8, 8)])
def test_images_without_views_are_refused_before_the_forward(shape):
    module = AugMix(10, encoder="digits_cnn")
    module.encoder.register_forward_hook(lambda *args: pytest.fail("the network has run"))
    batch = Batch(torch.zeros(shape), torch.zeros(8, dtype=torch.int64), torch.arange(8))
    with pytest.raises(ValueError, match=r"images have shape \(8, .*needs three views .*\(3, C, H, W\)"):
        module.loss(batch)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strength": -1.0}, "strength is -1.0"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"severity": 11.0}, "severity is 11.0"),
    ],
)
def test_impossible_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        AugMix(10, encoder="digits_cnn", **options)


def make_trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1}
    return Trainer(default_root_dir=tmp_path, **(quiet | options))


class Watched(AugMix):
    """Keeps the images that it trains on."""

    seen: list
    """Batches in order."""

    def loss(self, batch):
        self.seen = [*getattr(self, "seen", []), batch]
        return super().loss(batch)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def test_learns_digits_on_views_of_the_data_module_and_comes_back(tmp_path):
    seed_everything(7)
    module = AugMix(10, strength=6.0, severity=2.0, encoder="digits_cnn", optimizer=sgd)
    data, trainer = DigitsDataModule(batch_size=64), make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["train/accuracy"] > 0.6
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    assert type(loaded) is AugMix
    assert (loaded.batch_transform.strength, loaded.batch_transform.severity) == (6.0, 2.0)
    image = next(iter(data.evaluation_loader("test"))).image
    with torch.no_grad():
        assert torch.equal(loaded(image), module.eval()(image))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_images_are_the_views_of_the_run_seed(tmp_path, num_workers):
    seed_everything(11)
    module = Watched(10, severity=5.0, encoder="digits_cnn")
    data = DigitsDataModule(batch_size=32, num_workers=num_workers)
    make_trainer(tmp_path, max_epochs=2, limit_train_batches=2, limit_val_batches=1).fit(module, datamodule=data)
    transform = AugMixViews(Normalize(data.mean, data.std), severity=5.0, seed=11)
    whole = DigitsDataModule(batch_size=2000)
    whole.setup()
    clean = next(iter(whole.evaluation_loader("train"))).image
    pixels = (clean * data.std[0] + data.mean[0]).mul(255).round().to(torch.uint8)
    for epoch, batch in zip([0, 0, 1, 1], module.seen, strict=True):
        assert torch.equal(batch.image, transform(pixels[batch.index], batch.index, epoch))


def test_crop_and_flip_come_before_the_views(tmp_path):
    class Cropped(DigitsDataModule):
        augment = True

    seed_everything(3)
    module = Watched(10, encoder="digits_cnn")
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=Cropped(batch_size=16))
    plain = Cropped(batch_size=16)
    plain.setup()
    expected = next(iter(plain.train_dataloader()))
    assert torch.equal(module.seen[0].index, expected.index)
    assert torch.equal(module.seen[0].image[:, 0], expected.image)


def test_other_modules_get_plain_images(tmp_path):
    seed_everything(0)
    data, module = ToyDataModule(batch_size=16), Focal(3, encoder="digits_cnn", optimizer=sgd)
    make_trainer(tmp_path, limit_train_batches=1).fit(module, datamodule=data)
    assert next(iter(data.train_dataloader())).image.ndim == 4
