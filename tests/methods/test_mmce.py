"""Maximum mean calibration error: both penalties, both normalisations, against the N x N matrix."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_lightning.methods.mmce import MMCELoss, mmce_loss, mmce_penalty, weighted_mmce_penalty


def _case(n, k=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, k, generator=generator, dtype=dtype)
    labels = torch.randint(k, (n,), generator=generator)
    labels[::2] = logits[::2].argmax(dim=1)
    return logits, labels


def _parts(logits, labels):
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    kernel = torch.exp(-(confidence[:, None] - confidence).abs() / 0.4)
    return confidence, (predicted == labels).double(), kernel


def _plain(logits, labels):
    r, c, kernel = _parts(logits, labels)
    return ((c - r)[:, None] * (c - r) * kernel).mean()


def _weighted(logits, labels, official):
    r, c, kernel = _parts(logits, labels)
    m, n = c.sum().item(), (1 - c).sum().item()

    def pairs(a, b, size):
        return (a[:, None] * b * kernel).sum() / size / (size + 1e-5 if official else 1)

    right, wrong = c * (1 - r), (1 - c) * r
    squared = pairs(right, right, m * m) + pairs(wrong, wrong, n * n) - 2 * pairs(right, wrong, m * n)
    return torch.sqrt(squared + 1e-10)


@pytest.mark.parametrize("n", [3, 40, 700])
@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (mmce_penalty, _plain),
        (lambda z, y: mmce_penalty(z, y, sqrt=True), lambda z, y: torch.sqrt(_plain(z, y) + 1e-10)),
        (weighted_mmce_penalty, lambda z, y: _weighted(z, y, False)),
        (lambda z, y: weighted_mmce_penalty(z, y, normalization="official"), lambda z, y: _weighted(z, y, True)),
    ],
    ids=["plain", "root", "weighted", "official"],
)
def test_running_sums_equal_the_matrix_in_value_and_gradient(ours, reference, n):
    logits, labels = _case(n)
    values, gradients = [], []
    for penalty in (ours, reference):
        z = logits.clone().requires_grad_()
        values.append(penalty(z, labels))
        gradients.append(torch.autograd.grad(values[-1], z)[0])
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 40.0]), min_size=2, max_size=12), st.integers(0, 100))
def test_equal_confidences(levels, seed):
    logits = torch.zeros(len(levels), 3, dtype=torch.float64)
    logits[:, 1] = torch.tensor(levels)
    labels = torch.randint(3, (len(levels),), generator=torch.Generator().manual_seed(seed))
    gradients = []
    for penalty in (mmce_penalty, _plain):
        z = logits.clone().requires_grad_()
        gradients.append(torch.autograd.grad(penalty(z, labels), z)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_float32_is_accurate_on_a_large_batch():
    logits, labels = _case(1000, seed=1)
    z = logits.float().requires_grad_()
    ours = weighted_mmce_penalty(z, labels)
    reference = logits.clone().requires_grad_()
    expected = _weighted(reference, labels, False)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    gradient, wanted = torch.autograd.grad(ours, z)[0], torch.autograd.grad(expected, reference)[0]
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_a_batch_of_many_rows_needs_no_matrix():
    # the matrix would take 2^17 x 2^17 x 4 bytes = 64 GiB
    logits, labels = _case(2**17, k=2, dtype=torch.float32)
    logits.requires_grad_()
    mmce_loss(logits, labels).backward()
    assert logits.grad.isfinite().all()


def test_the_order_of_rows_does_not_matter():
    logits, labels = _case(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mmce_loss(logits, labels), mmce_loss(logits[order], labels[order]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("normalization", ["paper", "official"])
def test_weighted_penalty_is_0_where_all_rows_are_right_or_all_wrong(shift, normalization):
    logits, _ = _case(20)
    labels = (logits.argmax(dim=1) + shift) % 5
    logits.requires_grad_()
    penalty = weighted_mmce_penalty(logits, labels, normalization=normalization)
    assert penalty.item() == 0
    assert torch.equal(torch.autograd.grad(penalty, logits)[0], torch.zeros_like(logits))


def test_official_normalization_weakens_the_right_rows():
    # with two wrong rows among 128 the published second division all but removes the gradient of the right ones
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(128, 10, generator=generator, dtype=torch.float64)
    labels = logits.argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 10
    shares = []
    for normalization in ("paper", "official"):
        z = logits.clone().requires_grad_()
        weighted_mmce_penalty(z, labels, normalization=normalization).backward()
        shares.append((z.grad[2:].norm() / z.grad[:2].norm()).item())
    assert shares[1] < shares[0] / 10


def test_a_root_of_the_root_is_refused():
    with pytest.raises(ValueError, match="Set weighted to false"):
        MMCELoss(sqrt=True)


def test_strength_0_is_cross_entropy():
    logits, labels = _case(10)
    ours = mmce_loss(logits, labels, strength=0.0)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels), rtol=1e-12, atol=0)


def test_settings_reach_the_loss():
    logits, labels = _case(20)
    cross_entropy = F.cross_entropy(logits, labels).item()
    plain = MMCELoss(3.0, weighted=False)(logits, labels).item() - cross_entropy
    root = MMCELoss(3.0, weighted=False, sqrt=True)(logits, labels).item() - cross_entropy
    official = MMCELoss(3.0, normalization="official")(logits, labels).item() - cross_entropy
    expected = _plain(logits, labels).item()
    np.testing.assert_allclose([plain, root], [3 * expected, 3 * np.sqrt(expected + 1e-10)], rtol=1e-10)
    assert official == pytest.approx(3 * _weighted(logits, labels, True).item(), rel=1e-10)


@pytest.mark.parametrize(("options", "named"), [({"strength": -2.0}, "-2.0"), ({"normalization": "theirs"}, "theirs")])
def test_impossible_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        MMCELoss(**options)
