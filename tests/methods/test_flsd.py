"""Sample-dependent focal loss: which gamma is taken where."""

import pytest
import torch

from calib_lightning.methods.flsd import FLSDLoss, flsd_loss
from calib_lightning.methods.focal import focal_loss


def _logits(probability):
    return torch.tensor([[probability, 1 - probability]], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("probability", "gamma"), [(0.01, 5.0), (0.199, 5.0), (0.201, 3.0), (0.499, 3.0), (0.501, 2.0), (0.99, 2.0)]
)
def test_gamma_depends_on_the_probability_of_the_true_class(probability, gamma):
    logits, label = _logits(probability), torch.tensor([0])
    ours, focal = flsd_loss(logits, label, gamma=2.0), focal_loss(logits, label, gamma=gamma)
    torch.testing.assert_close(ours, focal, rtol=1e-12, atol=0)


def test_the_choice_carries_no_gradient():
    logits = _logits(0.1).requires_grad_()
    label = torch.tensor([0])
    (ours,) = torch.autograd.grad(flsd_loss(logits, label), logits)
    (focal,) = torch.autograd.grad(focal_loss(logits, label, gamma=5.0), logits)
    torch.testing.assert_close(ours, focal, rtol=1e-12, atol=0)


def test_gradient_is_finite_at_certainty():
    logits = torch.tensor([[100.0, -100.0]], requires_grad=True)
    flsd_loss(logits, torch.tensor([0]), gamma=0.3).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [-1.0, float("nan")])
def test_impossible_gamma_is_named(gamma):
    with pytest.raises(ValueError, match=str(gamma)):
        FLSDLoss(gamma)
