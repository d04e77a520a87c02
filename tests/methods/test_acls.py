"""ACLS: two penalties, one with a stopped gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calib_lightning.methods.acls import ACLSLoss, acls_loss

Z = 4 * np.random.default_rng(0).normal(size=(6, 5))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def _penalty(z, fixed, reference):
    """Both penalties in loops; ``fixed`` are the largest logits where no gradient is to flow through them."""
    positive, negative = 0.0, 0.0
    for row, largest in zip(z, fixed, strict=True):
        top = int(np.argmax(row))
        positive += max(0.0, row[top] - (row.min() if reference == "min" else 0.0) - 2.0) ** 2
        negative += sum(max(0.0, largest - row[k] - 2.0) ** 2 for k in range(len(row)) if k != top)
    n, k = z.shape
    return 0.3 * (0.7 * positive / n + 0.4 * negative / (n * (k - 1)))


@pytest.mark.parametrize("reference", ["zero", "min"])
def test_value_and_gradient_equal_the_equation(reference):
    logits = torch.tensor(Z, requires_grad=True)
    criterion = ACLSLoss(2.0, 0.3, 0.7, 0.4, reference)
    penalty = criterion(logits, LABELS) - F.cross_entropy(logits, LABELS)
    fixed = Z.max(axis=1)
    assert penalty.item() == pytest.approx(_penalty(Z, fixed, reference), rel=1e-12)
    (gradient,) = torch.autograd.grad(penalty, logits)
    for i in np.ndindex(*Z.shape):
        step = np.zeros_like(Z)
        step[i] = 1e-6
        slope = (_penalty(Z + step, fixed, reference) - _penalty(Z - step, fixed, reference)) / 2e-6
        assert gradient[i].item() == pytest.approx(slope, abs=1e-7)


def test_labels_do_not_enter_the_penalty():
    logits = torch.tensor(Z)
    penalties = [acls_loss(logits, y, margin=1.0) - F.cross_entropy(logits, y) for y in (LABELS, LABELS.flip(0))]
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("options", [{"margin": 100.0}, {"margin": 0.0, "strength": 0.0}])
def test_a_huge_margin_or_no_strength_is_cross_entropy(options):
    logits = torch.tensor(Z)
    torch.testing.assert_close(
        acls_loss(logits, LABELS, **options), F.cross_entropy(logits, LABELS), rtol=1e-12, atol=0
    )


def test_of_several_largest_logits_the_first_is_predicted():
    logits = torch.tensor([[5.0, 5.0, 0.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0])
    penalty = acls_loss(logits, label, margin=2.0, strength=1.0) - F.cross_entropy(logits, label)
    (gradient,) = torch.autograd.grad(penalty, logits)
    torch.testing.assert_close(gradient, torch.tensor([[6.0, 0.0, -0.3]], dtype=torch.float64))


@pytest.mark.parametrize("name", ["margin", "strength", "positive_weight", "negative_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_impossible_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        ACLSLoss(**{name: value})


def test_impossible_reference_is_named():
    with pytest.raises(ValueError, match="'max'"):
        ACLSLoss(positive_reference="max")
