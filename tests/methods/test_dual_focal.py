"""Dual focal loss: which other class enters."""

import math

import pytest
import torch
import torch.nn.functional as F

from calib_lightning.methods.dual_focal import DualFocalLoss, dual_focal_loss


def _loss(probs, label, gamma):
    logits = torch.tensor([probs], dtype=torch.float64).log()
    return dual_focal_loss(logits, torch.tensor([label]), gamma=gamma).item()


def test_gamma_0_is_cross_entropy():
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    ours = dual_focal_loss(logits, labels, gamma=0.0)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("label", "below"),
    [(0, 0.3), (1, 0.15), (3, 0.0)],
    ids=["right", "wrong: the class below it, not the top one", "least likely: none"],
)
def test_the_next_class_below_the_true_one_enters(label, below):
    probs = [0.5, 0.3, 0.15, 0.05]
    expected = -((1 - probs[label] + below) ** 2) * math.log(probs[label])
    assert _loss(probs, label, 2.0) == pytest.approx(expected, rel=1e-12)


def test_equal_probability_is_not_below():
    assert _loss([0.4, 0.4, 0.2], 1, 2.0) == pytest.approx(-(0.8**2) * math.log(0.4), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 5.0])
def test_gradient_is_finite_at_certainty(gamma):
    logits = torch.tensor([[100.0, -100.0]], requires_grad=True)
    dual_focal_loss(logits, torch.tensor([0]), gamma=gamma).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [-1.0, float("nan")])
def test_impossible_gamma_is_named(gamma):
    with pytest.raises(ValueError, match=str(gamma)):
        DualFocalLoss(gamma)
