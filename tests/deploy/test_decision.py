"""Operating thresholds against a search over all of them."""

import math

import numpy as np
import pytest
import torch

from calib_lightning.deploy import OperatingPoint, decide, operating_point
from calib_lightning.metrics.functional import coverage_at_risk

from ..metrics.golden import golden_set, random_set


def best_by_search(confidence, correct, risk):
    """Most rows that any threshold accepts within the risk: every distinct confidence is tried."""
    best = 0
    for threshold in np.unique(confidence):
        accepted = confidence >= threshold
        if (~correct[accepted]).mean() <= risk:
            best = max(best, accepted.sum())
    return best


@pytest.mark.parametrize("risk", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.filterwarnings("ignore:operating_point")
def test_the_threshold_accepts_the_most_rows_within_the_risk(risk, digits):
    for logits, labels in (golden_set(), random_set(200, 4, seed=3)):
        log_probs = logits.log_softmax(dim=1)
        confidence = log_probs.exp().amax(dim=1)
        given = None
        if digits is not None:
            given = confidence = (confidence * 10**digits).round() / 10**digits  # many ties
        found = operating_point(log_probs, labels, given, risk=risk)
        correct = (logits.argmax(dim=1) == labels).numpy()
        accepted = ~decide(log_probs, given, found.threshold).abstain.numpy()
        assert accepted.sum() == best_by_search(confidence.numpy(), correct, risk)
        assert found.coverage == accepted.mean()
        assert found.rows == len(labels)
        assert found.wanted_risk == risk
        if accepted.any():
            assert found.risk == pytest.approx((~correct[accepted]).mean(), abs=1e-12)
            assert found.risk <= risk


def test_it_agrees_with_the_metric():
    logits, labels = golden_set()
    found = operating_point(logits.log_softmax(dim=1), labels, risk=0.1)
    assert found.coverage == pytest.approx(coverage_at_risk(logits, labels, risk=0.1).item(), abs=1e-12)


def test_the_threshold_is_half_way_between_accepted_and_rejected():
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]], dtype=torch.float64)
    found = operating_point(probs.log(), torch.tensor([0, 0, 0, 1]), risk=0.1)
    assert found == OperatingPoint(pytest.approx(0.75), 0.1, 0.0, 0.5, 4)


def test_no_limit_where_all_are_accepted():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    found = operating_point(probs.log(), torch.tensor([0, 1]), risk=0.05)
    assert found == OperatingPoint(0.0, 0.05, 0.0, 1.0, 2)


def test_a_risk_out_of_reach_abstains_always_and_warns():
    probs = torch.tensor([[0.99, 0.01], [0.2, 0.8]])
    with pytest.warns(UserWarning, match="always abstains"):
        found = operating_point(probs.log(), torch.tensor([1, 0]), risk=0.05)
    assert (found.threshold, found.coverage) == (math.inf, 0.0)
    assert math.isnan(found.risk)
    assert decide(torch.tensor([[0.0, -torch.inf]]), None, found.threshold).abstain.all()


def test_a_class_without_probability_is_no_fault():
    log_probs = torch.tensor([[1.0, 0.0], [0.4, 0.6]]).log()
    assert operating_point(log_probs, torch.tensor([0, 0]), risk=0.0).coverage == 0.5


def test_a_threshold_between_float32_numbers_is_not_rounded():
    low = torch.tensor(0.7)
    high = torch.nextafter(low, torch.tensor(1.0))
    confidence = torch.stack([low, high])
    log_probs = torch.stack([confidence, 1 - confidence], dim=1).log()
    found = operating_point(log_probs, torch.tensor([1, 0]), confidence, risk=0.0)
    assert decide(log_probs, confidence, found.threshold).abstain.tolist() == [True, False]


def test_a_confidence_that_is_not_a_number_abstains():
    assert decide(torch.zeros(1, 2), torch.tensor([torch.nan]), 0.0).abstain.all()


@pytest.mark.parametrize(
    ("labels", "risk", "message"),
    [([], 0.05, "no rows"), ([0, 2], 0.05, "row 1 has label 2"), ([0, 1], 1.5, r"risk is 1\.5.*\[0, 1\]")],
)
def test_bad_input_is_named(labels, risk, message):
    labels = torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        operating_point(torch.full((len(labels), 2), 0.5).log(), labels, risk=risk)


@pytest.mark.parametrize("point", [OperatingPoint(0.75, 0.05, 0.03, 0.8, 50), OperatingPoint(0.1, 0.2, 0.2, 1.0, 1)])
def test_records_come_back(point):
    assert OperatingPoint.from_record(point.record) == point


def test_the_record_of_one_that_accepts_nothing():
    point = OperatingPoint(math.inf, 0.05, math.nan, 0.0, 10)
    assert point.record == {"threshold": "inf", "wanted_risk": 0.05, "risk": None, "coverage": 0.0, "rows": 10}
    back = OperatingPoint.from_record(point.record)
    assert back.threshold == math.inf
    assert math.isnan(back.risk)


@pytest.mark.parametrize(
    "change", [{"threshold": None}, {"threshold": "high"}, {"rows": math.nan}, {"more": 1}, {"risk": [1]}]
)
def test_damaged_records_are_refused(change):
    with pytest.raises(ValueError, match="operating point"):
        OperatingPoint.from_record({**OperatingPoint(0.5, 0.05, 0.03, 0.8, 50).record, **change})
