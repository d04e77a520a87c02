"""CPC: pairs of classes, in pieces."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calib_lightning.methods import cpc
from calib_lightning.methods.cpc import CPC, CPCLoss, cpc_loss


def _exclusion(z, labels):
    total, k = 0.0, z.shape[1]
    for row, y in zip(z, labels, strict=True):
        wrong = np.delete(row, y)
        d = np.abs(wrong[:, None] - wrong)
        total += (d / 2 + np.log1p(np.exp(-d)))[np.triu_indices(k - 1, 1)].sum()
    return total / (len(z) * (k - 1) * (k - 2))


def _exclusion_gradient(z, labels):
    gradient, (n, k) = np.zeros_like(z), z.shape
    for i, y in enumerate(labels):
        others = np.delete(np.arange(k), y)
        gradient[i, others] = np.tanh((z[i, others][:, None] - z[i, others]) / 2).sum(axis=1) / 2
    return gradient / (n * (k - 1) * (k - 2))


def _exclusion_of(logits, labels):
    return cpc_loss(logits, labels, discrimination_strength=0.0) - F.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    ("n", "k", "scale"), [(5, 3, 1.0), (4, 34, 3.0), (3, 33, 3.0), (2, 200, 3.0), (3, 9, 3000.0), (6, 70, 1e-3)]
)
@pytest.mark.parametrize("at_once", [1, 2**9, 2**22])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_pieces_of_any_size_equal_the_equation(monkeypatch, n, k, scale, at_once, dtype, tolerance):
    monkeypatch.setattr(cpc, "PAIRS_AT_ONCE", at_once)
    rng = np.random.default_rng(k)
    # a common shift of the logits must not cost digits
    z = torch.tensor(scale * rng.normal(size=(n, k)) + 100).to(dtype)
    labels = rng.integers(0, k, size=n)
    logits = z.clone().requires_grad_()
    loss = _exclusion_of(logits, torch.tensor(labels))
    (gradient,) = torch.autograd.grad(loss, logits)
    wanted = _exclusion_gradient(z.double().numpy(), labels)
    assert loss.item() == pytest.approx(_exclusion(z.double().numpy(), labels), rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=0, atol=tolerance / (n * (k - 1)))


def test_exclusion_is_least_where_all_wrong_logits_are_equal():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = _exclusion_of(logits, torch.tensor([0]))
    # each of the (K-1)(K-2) ordered pairs adds log(2) / 2
    assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-12)
    assert torch.equal(torch.autograd.grad(loss, logits)[0].round(decimals=12), torch.zeros_like(logits))
    assert _exclusion_of(torch.tensor([[3.0, 1.0, 1.1, 1.0]]).double(), torch.tensor([0])) > loss


def test_discrimination_is_the_mean_over_the_other_classes():
    logits, label = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64), torch.tensor([0])
    loss = cpc_loss(logits, label, discrimination_strength=1.0, exclusion_strength=0.0)
    expected = (math.log1p(math.exp(1)) + math.log1p(math.exp(-2))) / 2
    assert (loss - F.cross_entropy(logits, label)).item() == pytest.approx(expected, rel=1e-12)


def test_a_second_derivative_is_an_error():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(cpc_loss(logits, torch.tensor([0, 1, 2])), logits, create_graph=True)


def test_both_strengths_0_are_cross_entropy():
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    ours = CPCLoss(0.0, 0.0)(logits, labels)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels), rtol=1e-12, atol=0)


def test_memory_does_not_grow_with_the_number_of_pairs():
    # all pairs of 128 rows and 500 classes would take 122 MiB
    logits, labels = torch.randn(128, 500, requires_grad=True), torch.randint(500, (128,))
    with torch.profiler.profile(profile_memory=True) as profile:
        cpc_loss(logits, labels).backward()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 2**20 < peak < 40 * 2**20


@pytest.mark.parametrize("k", [1, 2])
def test_fewer_than_three_classes_are_refused(k):
    with pytest.raises(ValueError, match=f"num_classes is {k}; it must be at least 3"):
        CPC(k, encoder="digits_cnn")
    with pytest.raises(ValueError, match=f"num_classes is {k}; it must be at least 3"):
        CPCLoss()(torch.zeros(3, k), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["discrimination_strength", "exclusion_strength"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_impossible_strengths_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        CPCLoss(**{name: value})
