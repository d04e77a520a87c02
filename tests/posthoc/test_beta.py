import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from calib_lightning.posthoc.beta import Beta, beta_columns
from calib_lightning.posthoc.platt import Platt
from tests.metrics.golden import golden_set

F64 = torch.float64


@pytest.fixture(scope="module")
def golden():
    logits, labels = golden_set()
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return confidence.logit(), predicted == labels


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("abm", (2.550252, 0.246213, 1.917674)),
        ("am", (0.845392, 0.845392, 0.349300)),
        ("ab", (2.968478, 0.292876, (2.968478 - 0.292876) * np.log(2))),
    ],
)
def test_golden_coefficients(golden, variant, expected):
    beta = Beta(variant)
    optimum = beta.fit(*golden)
    assert beta.coefficients.tolist() == pytest.approx(expected, abs=2e-6)
    assert optimum.converged
    assert not optimum.notes


def test_golden_map(golden):
    beta = Beta()
    beta.fit(*golden)
    probs = torch.sigmoid(beta(torch.tensor([0.3, 0.6, 0.9], dtype=F64).logit()))
    assert probs.tolist() == pytest.approx([0.256366, 0.698579, 0.901669], abs=1e-6)
    log_odds, hits = golden
    likelihood = torch.nn.functional.binary_cross_entropy_with_logits(beta(log_odds), hits.double())
    assert float(likelihood) == pytest.approx(0.466785528, abs=1e-9)


def test_agrees_with_logistic_regression_on_the_columns(golden):
    log_odds, hits = golden
    probs = torch.sigmoid(log_odds).numpy()
    columns = np.stack([np.log(probs), -np.log(1 - probs)], axis=1)
    peer = LogisticRegression(C=1e12, tol=1e-12, max_iter=100_000).fit(columns, hits.numpy())
    beta = Beta()
    beta.fit(log_odds, hits)
    assert beta.coefficients.tolist() == pytest.approx([*peer.coef_[0], peer.intercept_[0]], abs=1e-3)


def test_am_is_platt_scaling(golden):
    beta, platt = Beta("am"), Platt()
    beta.fit(*golden)
    platt.fit(*golden)
    torch.testing.assert_close(beta(golden[0]), platt(golden[0]))


@pytest.mark.parametrize("variant", ["abm", "am", "ab"])
def test_agrees_with_the_authors_package(golden, variant):
    betacal = pytest.importorskip("betacal")
    log_odds, hits = golden
    probs = torch.sigmoid(log_odds).numpy()
    peer = betacal.BetaCalibration(parameters=variant).fit(probs.reshape(-1, 1), hits.numpy())
    beta = Beta(variant)
    beta.fit(log_odds, hits)
    assert torch.sigmoid(beta(log_odds)).numpy() == pytest.approx(peer.predict(probs), abs=2e-3)


def test_ab_leaves_one_half():
    log_odds = torch.linspace(-3, 3, 50, dtype=F64)
    beta = Beta("ab")
    beta.fit(log_odds, torch.arange(50) % 3 > 0)
    assert float(beta(torch.zeros(1, dtype=F64))) == pytest.approx(0.0, abs=1e-12)


def test_ab_is_separated_only_at_one_half():
    log_odds = torch.linspace(-3, 3, 50, dtype=F64)
    assert Beta("ab").fit(log_odds, log_odds > 0).at_bound
    elsewhere = Beta("ab").fit(log_odds, log_odds > 1)
    assert not elsewhere.at_bound
    assert elsewhere.converged
    assert Beta("abm").fit(log_odds, log_odds > 1).at_bound


def test_columns_do_not_saturate():
    columns = beta_columns(torch.tensor([-800.0, 50.0], dtype=F64))
    assert columns[0].tolist() == pytest.approx([-800.0, 0.0])
    assert columns[1].tolist() == pytest.approx([-np.exp(-50.0), 50.0])


def test_a_negative_coefficient_becomes_zero():
    generator = torch.Generator().manual_seed(1)
    log_odds = torch.randn(300, generator=generator, dtype=F64)
    # Non-monotone in truth: sure rows on the upper side are wrong.
    hits = torch.rand(300, generator=generator) < torch.sigmoid(-log_odds.square() + 0.5)
    beta = Beta()
    optimum = beta.fit(log_odds, hits)
    assert (beta.coefficients[:2] >= 0).all()
    assert (beta.coefficients[:2] == 0).any()
    assert any("negative" in note for note in optimum.notes)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="'abm', 'am' or 'ab'"):
        Beta("abc")
