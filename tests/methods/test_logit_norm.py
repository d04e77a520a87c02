"""LogitNorm: the length of logits does not count; what evaluation sees."""

import math

import pytest
import torch

from calib_lightning.core import load_module
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods.logit_norm import LogitNorm, LogitNormLoss, logit_norm_loss, normalized_logits


@pytest.fixture
def logits():
    return torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_positive_scaling_of_logits_changes_nothing(logits):
    labels = torch.arange(6)
    scales = torch.tensor([[0.1], [1.0], [3.0], [10.0], [100.0], [1e4]])
    ours = logit_norm_loss(logits * scales, labels, tau=0.5)
    torch.testing.assert_close(ours, logit_norm_loss(logits, labels, tau=0.5), rtol=1e-5, atol=0)


def test_every_row_gets_the_length_one_over_tau(logits):
    lengths = normalized_logits(logits, tau=0.04).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 25.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("k", "published"), [(10, 0.242), (100, 0.027)])
def test_tau_bounds_the_largest_probability(k, published):
    best = torch.full((1, k), -1.0 / (k - 1), dtype=torch.float64)
    best[0, 0] = 1.0
    bound = 1 / (1 + (k - 1) * math.exp(-math.sqrt(k / (k - 1))))
    assert normalized_logits(best, tau=1.0).softmax(dim=1).max().item() == pytest.approx(bound, rel=1e-6)
    assert bound == pytest.approx(published, abs=5e-4)


def test_logits_of_length_0_have_a_finite_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    logit_norm_loss(logits, torch.tensor([0, 1])).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("eval_logits", ["raw", "normalized"])
def test_evaluation_sees_the_logits_that_were_asked_for(fit, tmp_path, eval_logits):
    data = ToyDataModule(SplitSpec(val=60), batch_size=64)
    module = LogitNorm(3, tau=0.1, eval_logits=eval_logits, encoder="digits_cnn")
    trainer = fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    image = next(iter(data.val_dataloader())).image
    for trained in (module.eval(), load_module(tmp_path / "a.ckpt")):
        with torch.no_grad():
            raw = trained.head(trained.features(image))
            given = trained.predict_step((image, None, None), 0).logits
        expected = raw if eval_logits == "raw" else normalized_logits(raw, tau=0.1)
        assert torch.equal(given, expected)
    # 1 / tau
    lengths = given.norm(dim=1)
    assert torch.allclose(lengths, torch.full_like(lengths, 10.0)) == (eval_logits == "normalized")
    expected = torch.nn.functional.cross_entropy(*_evaluated(module, data.val_dataloader())).item()
    assert trainer.callback_metrics["val/nll"].item() == pytest.approx(expected, rel=1e-4)


def test_training_sees_raw_logits():
    module = LogitNorm(3, eval_logits="normalized", encoder="digits_cnn").train()
    image = torch.randn(4, 1, 8, 8)
    assert torch.equal(module(image), module.head(module.features(image)))


def test_checkpoint_is_not_chosen_by_a_length_that_training_leaves_free(logits):
    labels, rows = logits.argmax(dim=1), logits.float()
    # one loss, but any likelihood of the raw logits
    assert logit_norm_loss(rows, labels) == pytest.approx(logit_norm_loss(10 * rows, labels).item(), rel=1e-5)
    nll = torch.nn.functional.cross_entropy
    assert nll(10 * rows, labels) < 0.5 * nll(rows, labels)
    assert LogitNorm(3, encoder="digits_cnn").select_on == "val/accuracy"
    assert LogitNorm(3, eval_logits="normalized", encoder="digits_cnn").select_on == "val/nll"


def test_default_tau_is_the_same_everywhere(logits):
    labels = torch.arange(6)
    expected = logit_norm_loss(logits, labels, tau=0.04)
    assert logit_norm_loss(logits, labels) == LogitNormLoss()(logits, labels) == expected
    assert LogitNorm(3, encoder="digits_cnn").criterion.tau == 0.04


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_impossible_tau_is_named(tau):
    with pytest.raises(ValueError, match=str(tau)):
        LogitNormLoss(tau)


def test_impossible_eval_logits_are_named():
    with pytest.raises(ValueError, match="'scaled'"):
        LogitNorm(3, eval_logits="scaled", encoder="digits_cnn")


def _evaluated(module, loader):
    with torch.no_grad():
        pairs = [(module(batch.image), batch.label) for batch in loader]
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)
