"""AdaFocal: bins and gammas after each validation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calib_lightning import methods
from calib_lightning.core import load_module
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import AdaFocal, AdaFocalLoss


def _sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def _adapted(gammas, confidence, correct, rate=1.0):
    """One update in plain Python, from the paper's rules."""
    n, n_bins = len(confidence), len(gammas)
    edges = np.interp(np.linspace(0, n, n_bins + 1), np.arange(n), np.sort(confidence))
    new = []
    for b in range(n_bins):
        inside = (confidence > edges[b]) & (confidence <= edges[b + 1])
        gap = confidence[inside].mean() - correct[inside].mean() if inside.any() else 0.0
        g = gammas[b]
        g = g * np.exp(rate * gap) if g > 0 else g * np.exp(-rate * gap)
        if abs(g) < 0.2:
            g = -0.2 if g > 0 else 0.2
        new.append(min(20.0, max(-2.0, g)))
    return np.array(new), edges


def test_six_updates_equal_the_rules():
    rng = np.random.default_rng(0)
    criterion, gammas = AdaFocalLoss(n_bins=7, rate=4.0), np.ones(7)
    signs = set()
    for _ in range(6):
        confidence = rng.beta(4, 1, size=211)
        confidence[:30] = 1.0  # collapses the upper bounds
        correct = rng.random(211) < rng.uniform(0.2, 1.0)
        criterion.adapt(torch.tensor(confidence), torch.tensor(correct))
        gammas, edges = _adapted(gammas, confidence, correct, rate=4.0)
        np.testing.assert_allclose(criterion.gammas.numpy(), gammas, rtol=1e-12)
        np.testing.assert_allclose(criterion.edges.numpy(), edges, rtol=1e-12)
        signs |= set(np.sign(gammas))
    assert signs == {-1.0, 1.0}


def test_overconfidence_raises_gamma_and_the_bounds_hold():
    criterion = AdaFocalLoss(n_bins=1, rate=100.0)
    sure = torch.full((10,), 0.9)
    criterion.adapt(torch.linspace(0.8, 0.9, 10), torch.zeros(10))
    assert criterion.gammas.item() == 20.0
    criterion.gammas.fill_(0.21)
    criterion.adapt(torch.linspace(0.8, 0.9, 10), torch.ones(10))
    assert criterion.gammas.item() == pytest.approx(-0.2)
    criterion.adapt(sure - torch.rand(10) / 10, torch.ones(10))
    assert criterion.gammas.item() == -2.0
    before = criterion.gammas.clone()
    criterion.adapt(torch.empty(0), torch.empty(0))
    assert torch.equal(criterion.gammas, before)


def test_gamma_zero_is_cross_entropy():
    logits, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(4, (8,))
    bins = {"edges": torch.linspace(0, 1, 4, dtype=torch.float64), "gammas": torch.zeros(3, dtype=torch.float64)}
    torch.testing.assert_close(methods.ada_focal_loss(logits, labels, **bins), F.cross_entropy(logits, labels))


def test_a_fit_moves_gammas_by_the_whole_validation_split(fit, tmp_path):
    data = ToyDataModule(SplitSpec(val=61), batch_size=16, train_size=160)
    module = AdaFocal(3, encoder="digits_cnn", optimizer=_sgd, rate=2.0)
    trainer = fit(module, data, epochs=1, num_sanity_val_steps=2)
    confidence, correct = [], []
    with torch.no_grad():
        for batch in data.val_dataloader():
            top, predicted = module.eval()(batch.image).softmax(dim=-1).max(dim=-1)
            confidence.append(top.double().numpy())
            correct.append((predicted == batch.label).numpy())
    gammas, edges = _adapted(np.ones(15), np.concatenate(confidence), np.concatenate(correct), rate=2.0)
    np.testing.assert_allclose(module.criterion.gammas.numpy(), gammas, rtol=1e-6)
    np.testing.assert_allclose(module.criterion.edges.numpy(), edges, rtol=1e-6)
    assert len(np.unique(gammas)) > 3
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(load_module(tmp_path / "model.ckpt").criterion.gammas, module.criterion.gammas)
    trainer.validate(module, datamodule=data, verbose=False)
    np.testing.assert_allclose(module.criterion.gammas.numpy(), gammas, rtol=1e-6)


def test_without_validation_it_does_not_start(fit):
    for data, options in (
        (ToyDataModule(train_size=60), {}),
        (ToyDataModule(SplitSpec(val=20), train_size=60), {"limit_val_batches": 0}),
    ):
        with pytest.raises(ValueError, match="validation split"):
            fit(AdaFocal(3, encoder="digits_cnn", optimizer=_sgd), data, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_bins": 0}, "n_bins is 0"),
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": float("nan")}, "nan"),
        ({"gamma_min": 1.0}, "gamma_min is 1"),
        ({"switch": 3.0}, "switch 3"),
    ],
)
def test_bad_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        AdaFocalLoss(**options)
