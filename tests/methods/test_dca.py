"""DCA: a penalty beside any criterion."""

import pytest
import torch
import torch.nn.functional as F

from calib_lightning.methods.brier import BrierLoss, brier_loss
from calib_lightning.methods.dca import DCALoss, dca_penalty


@pytest.fixture
def logits():
    return torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(("labels", "accuracy"), [([0, 0, 1], 1), ([0, 1, 1], 2 / 3), ([1, 1, 0], 0)])
def test_mean_confidence_minus_accuracy(logits, labels, accuracy):
    confidence = sum(1 / (1 + torch.tensor(-height).exp().item()) for height in (3.0, 1.0, 2.0)) / 3
    assert dca_penalty(logits, torch.tensor(labels)).item() == pytest.approx(abs(confidence - accuracy), rel=1e-6)


def test_soft_targets_count_to_the_degree_of_the_predicted_class(logits):
    targets = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    expected = abs(logits.softmax(dim=1).max(dim=1).values.mean().item() - 1.75 / 3)
    assert dca_penalty(logits, targets).item() == pytest.approx(expected, rel=1e-12)


def test_criteria(logits):
    labels = torch.tensor([0, 1, 1])
    torch.testing.assert_close(DCALoss(strength=0.0)(logits, labels), F.cross_entropy(logits, labels))
    ours = DCALoss(BrierLoss(), 2.0)(logits, labels)
    torch.testing.assert_close(ours, brier_loss(logits, labels) + 2 * dca_penalty(logits, labels))


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_impossible_strength_is_named(strength):
    with pytest.raises(ValueError, match=str(strength)):
        DCALoss(strength=strength)
