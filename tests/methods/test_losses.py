"""Every criterion against its equation, its invariants and hard inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calib_lightning import methods

from .table import ROWS

by_method = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module.__name__)


def _case(n=7, k=4, seed=0):
    rng = np.random.default_rng(seed)
    return 3 * rng.normal(size=(n, k)), rng.integers(0, k, size=n), rng.dirichlet(np.ones(k), size=n)


@by_method
@pytest.mark.parametrize("soft", [False, True])
def test_value_and_gradient_equal_the_equation(row, soft):
    z, labels, mixed = _case()
    targets = mixed if soft else np.eye(z.shape[1])[labels]
    logits = torch.tensor(z, requires_grad=True)
    loss = row.criterion(logits, torch.tensor(targets if soft else labels))
    loss.backward()
    assert loss.item() == pytest.approx(row.reference(z, targets), rel=1e-12)
    gradient = np.zeros_like(z)
    for i in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[i] = 1e-6
        gradient[i] = (row.reference(z + step, targets) - row.reference(z - step, targets)) / 2e-6
    np.testing.assert_allclose(logits.grad.numpy(), gradient, atol=1e-8)


@by_method
def test_gradcheck(row):
    z, labels, _ = _case(n=3, k=3, seed=1)
    logits = torch.tensor(z, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: row.criterion(x, torch.tensor(labels)), (logits,))


@by_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("n", [1, 5])
def test_extreme_logits_give_finite_loss_and_gradient(row, dtype, right, n):
    logits = torch.zeros(n, 3, dtype=dtype)
    logits[:, 0], logits[:, 1] = (1e4, -1e4) if right else (-1e4, 1e4)
    logits.requires_grad_()
    loss = row.criterion(logits, torch.zeros(n, dtype=torch.int64))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_at_certainty(gamma):
    logits = torch.tensor([[100.0, -100.0]], requires_grad=True)
    methods.focal_loss(logits, torch.tensor([0]), gamma=gamma).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: methods.focal_loss(z, y, gamma=0.0),
        lambda z, y: methods.label_smoothing_loss(z, y, smoothing=0.0),
        lambda z, y: methods.entropy_regularization_loss(z, y, strength=0.0),
    ],
    ids=["focal gamma 0", "no smoothing", "no entropy"],
)
def test_special_cases_equal_cross_entropy(loss):
    z, labels, _ = _case()
    logits, labels = torch.tensor(z), torch.tensor(labels)
    torch.testing.assert_close(loss(logits, labels), F.cross_entropy(logits, labels), rtol=1e-12, atol=0)


def test_label_smoothing_on_wrong_classes_only_is_a_larger_smoothing():
    # a spread over the K-1 wrong classes equals a * K / (K - 1) spread over all K
    z, labels, _ = _case(k=5)
    wrong_only = np.full((len(labels), 5), 0.2 / 4)
    wrong_only[np.arange(len(labels)), labels] = 0.8
    ours = methods.label_smoothing_loss(torch.tensor(z), torch.tensor(labels), smoothing=0.2 * 5 / 4)
    theirs = F.cross_entropy(torch.tensor(z), torch.tensor(wrong_only))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_mean_entropy_is_the_sum_over_k():
    z, labels, _ = _case(k=4)
    logits, labels = torch.tensor(z), torch.tensor(labels)
    mean = methods.entropy_regularization_loss(logits, labels, strength=0.4, entropy_reduction="mean")
    total = methods.entropy_regularization_loss(logits, labels, strength=0.1)
    assert mean.item() == pytest.approx(total.item(), rel=1e-12)


def test_brier_bounds():
    certain = torch.tensor([[1e3, 0.0]])
    assert methods.brier_loss(certain, torch.tensor([0])).item() == 0
    assert methods.brier_loss(certain, torch.tensor([1])).item() == 2


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: methods.LabelSmoothingLoss(1.5), "1.5"),
        (lambda: methods.LabelSmoothingLoss(-0.1), "-0.1"),
        (lambda: methods.FocalLoss(-1.0), "-1.0"),
        (lambda: methods.EntropyRegularizationLoss(-2.0), "-2.0"),
        (lambda: methods.EntropyRegularizationLoss(0.1, "max"), "max"),
    ],
)
def test_impossible_settings_are_named(build, named):
    with pytest.raises(ValueError, match=named):
        build()
