"""Methods that need the number of samples of each class: LDAM and class-balanced cross-entropy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from calib_lightning import methods
from calib_lightning.core import load_module
from calib_lightning.data import DigitsDataModule, SplitSpec, ToyDataModule


def _sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def test_weights_and_margins_of_a_long_tail():
    counts = [5000, 500, 50]
    weights = np.array([(1 - 0.9999) / (1 - 0.9999**n) for n in counts])
    expected = weights * 3 / weights.sum()
    np.testing.assert_allclose(methods.effective_number_weights(counts).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(methods.effective_number_weights(counts, beta=0.0).numpy(), 1.0)
    margins = methods.ldam_margins(counts).numpy()
    np.testing.assert_allclose(margins, [0.5 / 100**0.25, 0.5 / 10**0.25, 0.5], rtol=1e-12)


def test_equal_counts_and_no_margin_are_cross_entropy():
    logits, labels = torch.randn(9, 4, dtype=torch.float64), torch.randint(4, (9,))
    plain = F.cross_entropy(logits, labels)
    torch.testing.assert_close(methods.ClassBalancedLoss([7] * 4)(logits, labels), plain)
    criterion = methods.LDAMLoss([7, 70, 20, 9], max_margin=0.0)
    torch.testing.assert_close(criterion(logits, labels), plain)
    criterion.reweighted = True
    weighted = F.cross_entropy(logits, labels, weight=methods.effective_number_weights([7, 70, 20, 9]))
    torch.testing.assert_close(criterion(logits, labels), weighted)


def test_cosine_head_in_any_precision():
    head = methods.CosineHead(5, 3, scale=12.0)
    features = torch.randn(4, 5)
    w = head.weight.detach().numpy().astype(np.float64)
    h = features.numpy().astype(np.float64)
    cosine = (h @ w.T) / np.linalg.norm(h, axis=1)[:, None] / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(head(features).detach().numpy(), 12 * cosine, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(features), head(features.float()))
        assert head(features).dtype == torch.float32
    torch.testing.assert_close(head(7 * features), head(features))


@pytest.mark.parametrize("width", [16, 512, 2048])
def test_cosine_head_of_any_width_learns(width):
    head = methods.CosineHead(width, 10)
    start = head.weight.detach().clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(10))
    labels = torch.arange(10).repeat(8)
    features = torch.randn(10, width)[labels] + torch.randn(80, width)
    optimizer = _sgd(head.parameters())
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    assert (head(features).argmax(dim=1) == labels).float().mean() > 0.95
    assert F.cosine_similarity(head.weight.detach(), start).max() < 0.95


class Phases(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.current_epoch, pl_module.criterion.reweighted))


def test_counts_come_from_the_data_and_weights_come_late(fit, tmp_path):
    data = DigitsDataModule(SplitSpec(val=100, imbalance=0.1), batch_size=64)
    module, phases = methods.LDAM(10, encoder="digits_cnn", optimizer=_sgd, reweight_from=0.5), Phases()
    trainer = fit(module, data, epochs=2, callbacks=[phases])
    assert set(phases.seen) == {(0, False), (1, True)}
    counts = data.class_counts.tolist()
    assert counts[0] > 5 * counts[9]
    torch.testing.assert_close(module.criterion.margins, methods.ldam_margins(counts))
    torch.testing.assert_close(module.criterion.class_weights, methods.effective_number_weights(counts))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_module(tmp_path / "model.ckpt")
    assert isinstance(loaded.head, methods.CosineHead)
    balanced = methods.ClassBalanced(10, encoder="digits_cnn", optimizer=_sgd)
    fit(balanced, data)
    torch.testing.assert_close(balanced.criterion.class_weights, methods.effective_number_weights(counts))


@pytest.mark.parametrize("method", [methods.LDAM, methods.ClassBalanced])
@pytest.mark.parametrize(
    "counts", [np.array([5, 6, 7]), list(np.bincount([0, 0, 1, 2])), torch.tensor([5, 6, 7]), (5, 6, 7)]
)
def test_counts_of_any_kind_come_back_from_a_checkpoint(method, counts, fit, tmp_path):
    module = method(3, class_counts=counts, encoder="digits_cnn", optimizer=_sgd)
    fit(module, ToyDataModule(train_size=60)).save_checkpoint(tmp_path / "model.ckpt")
    assert load_module(tmp_path / "model.ckpt").hparams.class_counts == [int(n) for n in counts]


def test_counts_of_an_earlier_fit_are_not_taken(fit):
    data = ToyDataModule(train_size=60)
    trainer = fit(methods.ClassBalanced(3, encoder="digits_cnn", optimizer=_sgd), data)
    with pytest.raises(ValueError, match="class_counts="):
        trainer.fit(methods.ClassBalanced(3, encoder="digits_cnn", optimizer=_sgd), data.evaluation_loader("train"))


@pytest.mark.parametrize(("share", "epochs", "first"), [(0.55, 100, 55), (0.28, 100, 28), (0.8, 200, 160), (0.0, 9, 0)])
def test_weights_begin_with_the_epoch_that_is_meant(share, epochs, first, monkeypatch):
    module = methods.LDAM(3, class_counts=[3, 2, 1], reweight_from=share, encoder="digits_cnn")
    module.criterion = methods.LDAMLoss([3, 2, 1])
    trainer = SimpleNamespace(max_epochs=epochs)
    monkeypatch.setattr(methods.LDAM, "trainer", trainer)
    seen = []
    for epoch in range(epochs):
        monkeypatch.setattr(methods.LDAM, "current_epoch", epoch)
        module.on_train_batch_start(None, 0)
        seen.append(module.criterion.reweighted)
    assert seen.index(True) == first
    assert all(seen[first:])


@pytest.mark.parametrize("method", [methods.LDAM, methods.ClassBalanced])
def test_without_counts_or_with_wrong_ones_it_does_not_start(method, fit):
    class Foreign(ToyDataModule):
        class_counts = None

    with pytest.raises(ValueError, match="class_counts="):
        fit(method(3, encoder="digits_cnn", optimizer=_sgd), Foreign(train_size=60))
    with pytest.raises(ValueError, match="class_counts has 2 entries; it must have one for each of the 3 classes"):
        fit(method(3, class_counts=[5, 6], encoder="digits_cnn", optimizer=_sgd), Foreign(train_size=60))
    for counts in ([5, 0, 6], [], [5, -1, 2], [1.5, 2.0, 3.0], [1.0, float("inf"), 2.0]):
        with pytest.raises(ValueError, match="integers of at least 1"):
            method(3, class_counts=counts, encoder="digits_cnn")
    with pytest.raises(ValueError, match="beta is 1"):
        method(3, beta=1.0, encoder="digits_cnn")
    fit(method(3, class_counts=[5, 6, 7], encoder="digits_cnn", optimizer=_sgd), Foreign(train_size=60))


def test_ldam_must_know_the_number_of_epochs(fit):
    module = methods.LDAM(3, encoder="digits_cnn", optimizer=_sgd)
    with pytest.raises(ValueError, match="max_epochs is -1"):
        fit(module, ToyDataModule(train_size=60), epochs=-1, max_steps=2)
    fit(
        methods.LDAM(3, encoder="digits_cnn", optimizer=_sgd, reweight_from=1.0),
        ToyDataModule(train_size=60),
        -1,
        max_steps=2,
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reweight_from": 1.5}, "reweight_from is 1.5"),
        ({"max_margin": -0.1}, "max_margin is -0.1"),
        ({"scale": 0.0}, "scale is 0"),
    ],
)
def test_bad_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        methods.LDAM(3, encoder="digits_cnn", **options)


@pytest.mark.parametrize(
    ("method", "criterion"), [(methods.LDAM, methods.LDAMLoss), (methods.ClassBalanced, methods.ClassBalancedLoss)]
)
def test_a_module_that_goes_back_to_its_own_stage_has_its_own_criterion(fit, tmp_path, method, criterion):
    data = ToyDataModule(SplitSpec(val=30), train_size=126)
    own = method(3, encoder="digits_cnn", optimizer=_sgd)
    fit(own, data).save_checkpoint(tmp_path / "own.ckpt")
    own.enter_stage(1, torch.nn.CrossEntropyLoss())  # as a switch does
    fit(own, data, epochs=2, ckpt_path=tmp_path / "own.ckpt")
    assert (own.stage, own.plain_loss, type(own.criterion)) == (0, False, criterion)
