"""Margin-based label smoothing: the margin."""

import pytest
import torch
import torch.nn.functional as F

from calib_lightning.methods.mbls import MbLSLoss, mbls_loss

LABELS = torch.tensor([0, 1, 2])


@pytest.fixture
def logits():
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{"margin": 50.0}, {"strength": 0.0, "margin": 0.0}])
def test_a_margin_above_the_range_or_no_strength_is_cross_entropy(logits, options):
    torch.testing.assert_close(
        mbls_loss(logits, LABELS, **options), F.cross_entropy(logits, LABELS), rtol=1e-12, atol=0
    )


def test_without_a_margin_the_penalty_is_the_mean_distance_to_the_largest(logits):
    penalty = mbls_loss(logits, LABELS, margin=0.0, strength=1.0) - F.cross_entropy(logits, LABELS)
    expected = (logits.numpy().max(axis=1) - logits.numpy().mean(axis=1)).mean()
    assert penalty.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_flows_through_the_largest(logits):
    logits = torch.tensor([[5.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0])
    penalty = mbls_loss(logits, label, margin=3.0, strength=1.0) - F.cross_entropy(logits, label)
    (gradient,) = torch.autograd.grad(penalty, logits)
    torch.testing.assert_close(gradient, torch.tensor([[2.0, -1.0, -1.0]], dtype=torch.float64) / 3)


@pytest.mark.parametrize("options", [{"margin": -1.0}, {"strength": -1.0}, {"margin": float("nan")}])
def test_impossible_settings_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        MbLSLoss(**options)
