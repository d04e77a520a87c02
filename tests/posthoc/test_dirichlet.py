"""Dirichlet calibration; what it shares with matrix scaling is tested there."""

import numpy as np
import pytest
import torch

from calib_lightning.posthoc.dirichlet import Dirichlet
from tests.metrics.golden import golden_set


def golden():
    logits, labels = golden_set()
    return logits / 1.6, labels


@pytest.mark.parametrize(
    ("strength", "objective", "nll"),
    [(0.01, 0.623946398, 0.623332192), (1.0, 0.636591802, 0.629193368), (100.0, 0.661092883, 0.660007848)],
)
def test_golden_values(strength, objective, nll):
    logits, labels = golden()
    fitted = Dirichlet((strength,)).fit(logits, labels)
    assert fitted.report.converged
    assert fitted.report.nll_after == pytest.approx(nll, abs=2e-9)
    w, b = fitted.weight.numpy(), fitted.bias.numpy()
    off = (w**2).sum() - (np.diag(w) ** 2).sum()
    penalty = strength * off / 20 + strength * (b**2).sum() / 5
    assert fitted.report.nll_after + penalty == pytest.approx(objective, abs=1e-9)


def test_transform_is_the_equation():
    logits, labels = golden()
    fitted = Dirichlet((1.0,)).fit(logits, labels)
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    q = np.exp(np.log(p) @ fitted.weight.numpy().T + fitted.bias.numpy())
    q /= q.sum(1, keepdims=True)
    assert np.allclose(fitted(logits).exp().numpy(), q, atol=1e-12)


def test_a_constant_added_to_a_row_changes_nothing():
    logits, labels = golden()
    fitted = Dirichlet((1.0,)).fit(logits, labels)
    shifted = logits + torch.linspace(-50, 50, 500, dtype=torch.float64).unsqueeze(1)
    other = Dirichlet((1.0,)).fit(shifted, labels)
    assert torch.allclose(fitted.weight, other.weight, atol=1e-5)
    assert torch.allclose(fitted(logits), fitted(shifted), atol=1e-10)


def test_log_probabilities_have_a_floor():
    fitted = Dirichlet((1.0,)).fit(*golden())
    far, farther = torch.zeros(1, 5), torch.zeros(1, 5)
    far[0, 0], farther[0, 0] = 200.0, 1e30
    assert fitted(farther).isfinite().all()
    assert torch.equal(fitted(far), fitted(farther))
    nearer = far.clone()
    nearer[0, 0] = 80.0
    assert not torch.equal(fitted(far), fitted(nearer))


def test_recovers_a_known_map():
    """Rows whose labels were drawn from a known Dirichlet map of their probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    weight = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.5, 0.1], [0.1, 0.0, 0.6]]).double()
    truth = torch.log_softmax(logits.log_softmax(1) @ weight.T + torch.tensor([0.5, -0.2, -0.3]), dim=1)
    labels = torch.multinomial(truth.exp(), 1, generator=generator).squeeze(1)
    fitted = Dirichlet().fit(logits, labels)
    assert float((fitted(logits).exp() - truth.exp()).abs().mean()) < 0.01
    assert fitted.report.nll_after < fitted.report.nll_before - 0.05
