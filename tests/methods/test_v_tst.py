"""V-TST: its divergence, its draws, and a fit whose second stage has a loss of its own."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from calib_lightning.core import StageSwitch, StageTraining, build_head, load_module
from calib_lightning.data import DigitsDataModule, ToyDataModule
from calib_lightning.methods.cross_entropy import CrossEntropyLoss
from calib_lightning.methods.mixup import MixupTransform
from calib_lightning.methods.tst import TSTHead
from calib_lightning.methods.v_tst import VTST, VTSTHead, gaussian_kl
from calib_lightning.types import Batch
from tests.methods.test_two_stage import Stages, adam, check_resumed, equal, images, part, sgd

# --- the divergence --------------------------------------------------------------------------------------------------


def test_divergence_from_itself_is_nothing():
    mu, logvar = torch.zeros(5, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    loss = gaussian_kl(mu, logvar)
    loss.backward()
    assert loss.item() == 0
    assert not mu.grad.any()
    assert not logvar.grad.any()


def test_divergence_equals_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    mu = 2 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
    logvar = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    each = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(torch.zeros(4).double(), 1.0))
    torch.testing.assert_close(gaussian_kl(mu, logvar), each.sum(dim=1).mean() / 4)


def test_divergence_equals_the_equation_in_numpy():
    rng = np.random.default_rng(1)
    mu, logvar = rng.normal(size=(3, 5)), -rng.exponential(size=(3, 5))
    total = 0.0
    for m, v in zip(mu, logvar, strict=True):
        total += -0.5 * np.sum(1 + v - m**2 - np.exp(v)) / 5
    found = gaussian_kl(torch.tensor(mu), torch.tensor(logvar))
    assert found.item() == pytest.approx(total / 3, rel=1e-12)
    assert torch.autograd.gradcheck(
        gaussian_kl, (torch.tensor(mu).requires_grad_(), torch.tensor(logvar).requires_grad_())
    )


def test_divergence_near_one_keeps_its_digits():
    logvar = torch.full((1, 1), -1e-4)
    # x^2 / 4 of e^x - 1 - x over 2; the plain terms would leave nothing in float32
    assert gaussian_kl(torch.zeros(1, 1), logvar).item() == pytest.approx(2.5e-9, rel=0.02)
    assert gaussian_kl(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == (
        torch.float32
    )


@pytest.mark.parametrize(("one", "two"), [((2, 3), (2, 4)), ((2,), (2,)), ((0, 3), (0, 3))])
def test_divergence_refuses_other_shapes(one, two):
    with pytest.raises(ValueError, match=r"mu has shape .* logvar .*\(N, Z\)"):
        gaussian_kl(torch.zeros(one), torch.zeros(two))


# --- the head --------------------------------------------------------------------------------------------------------


def _head(width=6, samples=10, d=5, k=4):
    torch.manual_seed(0)
    head = VTSTHead(d, k, width=width, samples=samples)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(3)
    return head


def _numpy(head, features):
    """Moments and softmax of every draw, one at a time, in float64."""
    weights = {name: value.detach().double().numpy() for name, value in head.state_dict().items()}

    def layers(name, x):
        hidden = np.maximum(x @ weights[f"{name}.0.weight"].T + weights[f"{name}.0.bias"], 0)
        return hidden @ weights[f"{name}.2.weight"].T + weights[f"{name}.2.bias"]

    x = features.double().numpy()
    mu, raw = layers("mean", x), layers("deviation", x)
    variance = 1 / (1 + np.exp(-raw))

    def draw(eps):
        logits = (mu + np.sqrt(variance) * eps) @ weights["classifier.weight"].T + weights["classifier.bias"]
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    return mu, variance, draw


def test_moments_equal_the_equation_and_no_variance_is_above_one():
    head, features = _head(), 5 * torch.randn(200, 5)
    mu, logvar = head.moments(features)
    expected_mu, expected_variance, _ = _numpy(head, features)
    np.testing.assert_allclose(mu.detach().numpy(), expected_mu, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logvar.exp().detach().numpy(), expected_variance, rtol=1e-4, atol=1e-6)
    assert logvar.max() <= 0
    assert logvar.min() < -1


@pytest.mark.parametrize("samples", [1, 10])
def test_evaluation_is_the_average_softmax_of_its_draws(samples):
    head, features = _head(samples=samples).eval(), torch.randn(9, 5)
    draw = _numpy(head, features)[2]
    expected = np.zeros((9, 4))
    for eps in head.noise.double().numpy():
        expected += draw(eps) / samples
    probs = head(features).exp()
    np.testing.assert_allclose(probs.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(probs.sum(dim=1).detach().numpy(), 1, rtol=1e-5)
    # the draws do differ
    assert np.abs(draw(head.noise[0].numpy()) - draw(-head.noise[0].numpy())).max() > 0.01


def test_draws_come_in_pairs_so_that_no_direction_shifts_all_rows():
    head = _head(samples=10)
    assert torch.equal(head.noise[5:], -head.noise[:5])
    assert VTSTHead(5, 4, samples=1).noise.any()
    assert VTSTHead(5, 4, samples=7).noise.shape == (7, 128)
    # two classes with equal means stay equal, whatever the seed
    head = _head(samples=10, k=2)
    with torch.no_grad():
        for parameter in (*head.mean.parameters(), head.classifier.bias):
            parameter.zero_()
        head.classifier.weight[1] = -head.classifier.weight[0]
    logits = head.eval()(torch.randn(20, 5))
    torch.testing.assert_close(logits[:, 0], logits[:, 1])


def test_evaluation_approaches_the_expectation():
    head, features = _head(samples=4000).eval(), torch.randn(3, 5)
    draw = _numpy(head, features)[2]
    rng = np.random.default_rng(0)
    expected = np.mean([draw(rng.normal(size=(3, 6))) for _ in range(4000)], axis=0)
    np.testing.assert_allclose(head(features).exp().detach().numpy(), expected, atol=0.03)


def test_evaluation_depends_on_the_row_alone():
    head, features = _head().eval(), torch.randn(40, 5)
    whole = head(features)
    torch.manual_seed(99)
    assert torch.equal(head(features), whole)
    parts = torch.cat([head(part) for part in features.split(7)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head(features.flip(0)).flip(0), whole, rtol=1e-5, atol=1e-6)


def test_a_rebuilt_head_has_the_same_draws_and_leaves_the_generator_alone():
    head = _head().eval()
    assert "noise" not in head.state_dict()
    state = torch.get_rng_state()
    with torch.device("meta"):
        VTSTHead(5, 4)
    assert torch.equal(torch.get_rng_state(), state)
    again = build_head(head.spec).eval()
    again.load_state_dict(head.state_dict())
    features = torch.randn(4, 5)
    assert torch.equal(again(features), head(features))


def test_training_draws_once_a_row():
    head, features = _head().train(), torch.randn(6, 5)
    torch.manual_seed(3)
    logits = head(features)
    torch.manual_seed(3)
    sampled, mu, logvar = head.sample(features)
    assert torch.equal(logits, sampled)
    torch.manual_seed(3)
    z = mu + logvar.exp().sqrt() * torch.randn(6, 6)
    torch.testing.assert_close(logits, head.classifier(z))
    same = head(features[:1].expand(5, -1))
    assert len(torch.unique(same[:, 0])) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    head = copy.deepcopy(_head()).to(dtype).eval()
    logits = head(torch.randn(3, 5, dtype=dtype))
    assert logits.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
    assert logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert _head().eval()(torch.randn(3, 5)).dtype == torch.float32


def test_extreme_features_stay_finite():
    head = _head()
    features = torch.tensor([[1e4, -1e4, 0.0, 1e4, 1e4]], requires_grad=True)
    logits = head.eval()(features)
    assert logits.isfinite().all()
    sampled, mu, logvar = head.train().sample(features)
    (gaussian_kl(mu, logvar) + sampled.square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_size_of_the_head():
    d, z, k = 7, 5, 3
    branch = d * 3 * z + 3 * z + 3 * z * z + z
    assert sum(p.numel() for p in VTSTHead(d, k, width=z).parameters()) == 2 * branch + z * k + k
    assert VTSTHead(d, k).noise.shape == (100, 128)


@pytest.mark.parametrize("name", ["width", "samples"])
def test_impossible_sizes_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        VTSTHead(5, 4, **{name: 0})


# --- the method ------------------------------------------------------------------------------------------------------


def _switch(at_epoch, width=32, **options):
    head = functools.partial(VTSTHead, width=width, samples=4)
    return StageSwitch(at_epoch, head, StageTraining(adam, **options))


def _batch(n=6):
    return Batch(images(n), torch.arange(n) % 3, torch.arange(n))


def test_default_is_that_of_the_paper():
    switch = VTST(3, encoder="digits_cnn").switch
    optimizer = switch.training.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (switch.at_epoch, switch.classifier, switch.training.batch_size) == (-40, VTSTHead, 256)
    assert (type(optimizer), optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (Adam, 1e-4, 0)


def test_loss_is_cross_entropy_and_later_the_bound():
    torch.manual_seed(0)
    module, batch = VTST(3, encoder="digits_cnn"), _batch()
    loss, logits = module.eval().loss(batch)
    torch.testing.assert_close(loss, cross_entropy(module(batch.image), batch.label))
    module.head = VTSTHead(96, 3, width=8)
    torch.manual_seed(5)
    loss, logits = module.eval().loss(batch)
    torch.manual_seed(5)
    mu, logvar = module.head.moments(module.features(batch.image))
    drawn = module.head.classifier(mu + logvar.exp().sqrt() * torch.randn(6, 8))
    torch.testing.assert_close(logits, drawn)
    divergence = kl_divergence(Normal(mu, logvar.exp().sqrt()), Normal(torch.zeros(8), 1.0)).sum(dim=1).mean() / 8
    torch.testing.assert_close(loss, cross_entropy(drawn, batch.label) + divergence)
    assert divergence > 0.01


def test_digits_keep_their_accuracy_and_the_encoder_its_bits(fit):
    torch.manual_seed(0)
    module = VTST(10, _switch(-6), encoder="digits_cnn", optimizer=sgd)
    stages = Stages()
    trainer = fit(module, DigitsDataModule(batch_size=32), epochs=11, callbacks=[stages])
    assert equal(part(stages.states[0], "encoder."), part(stages.states[1], "encoder."))
    assert stages.figures[0]["val/accuracy"] > 0.85
    assert stages.figures[1]["val/accuracy"] > stages.figures[0]["val/accuracy"] - 0.05
    # the log-probabilities are what is evaluated
    image = next(iter(trainer.datamodule.val_dataloader())).image
    with torch.no_grad():
        logits = module.eval().outputs(image).logits
    torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(len(image)))


def test_checkpoint_gives_equal_evaluations(fit, tmp_path):
    module = VTST(3, _switch(-1), encoder="digits_cnn", optimizer=sgd)
    fit(module, ToyDataModule(batch_size=16, train_size=64), epochs=2, callbacks=[Stages(tmp_path)])
    for stage in (0, 1):
        loaded = load_module(tmp_path / f"stage-{stage}.ckpt")
        assert (type(loaded), loaded.stage, isinstance(loaded.head, VTSTHead)) == (VTST, stage, stage == 1)
    with torch.no_grad():
        assert torch.equal(loaded(images()), module.eval()(images()))


@pytest.mark.parametrize(("stop_after", "stage"), [(6, 0), (10, 1)])
def test_resumed_run_is_bit_equal(tmp_path, stop_after, stage):
    check_resumed(tmp_path, lambda: VTST(3, _switch(2), encoder="digits_cnn", optimizer=sgd), 4, stop_after, stage)


def test_what_cannot_work_is_refused():
    with pytest.raises(TypeError, match=r"switch of VTST is -40.*StageSwitch\(-40, VTSTHead\)"):
        VTST(3, -40, encoder="digits_cnn")
    with pytest.raises(TypeError, match=r"builds a TSTHead.*VTSTHead"):
        VTST(3, StageSwitch(-40, TSTHead), encoder="digits_cnn")
    with pytest.raises(ValueError, match=r"criterion CrossEntropyLoss.*Omit the criterion"):
        VTST(3, _switch(-40, criterion=CrossEntropyLoss()), encoder="digits_cnn")
    with pytest.raises(ValueError, match=r"not support batch_transform.*init_from"):
        VTST(3, encoder="digits_cnn", batch_transform=MixupTransform())
