import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from calib_lightning.metrics import functional as F
from tests.metrics.golden import (
    EDGE_CONFIDENCE,
    EDGE_CORRECT,
    GOLDEN,
    GOLDEN_COUNTS,
    KEYS,
    golden_set,
    random_set,
    reference,
)

WITH_CONFIDENCE = ("ece", "signed_gap", "correctness_auroc")


def all_metrics(logits, labels, **kwargs):
    return {key: getattr(F, key)(logits, labels, **kwargs).item() for key in KEYS}


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@pytest.mark.parametrize("key", KEYS)
def test_golden_values(key):
    value = getattr(F, key)(*golden_set())
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(GOLDEN[key], abs=1e-12)


def test_golden_bin_counts():
    logits, labels = golden_set()
    sums = F.bin_sums(logits.softmax(1).amax(1), logits.argmax(1) == labels, 15)
    assert sums.shape == (15, 3)
    assert sums[:, 0].tolist() == GOLDEN_COUNTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_table(dtype):
    confidence = torch.tensor(EDGE_CONFIDENCE, dtype=dtype)
    correct = torch.tensor(EDGE_CORRECT).bool()
    sums = F.bin_sums(confidence, correct, 5)
    assert sums[:, 0].tolist() == [3, 2, 3, 2, 2]
    assert sums[:, 2].tolist() == [1, 1, 2, 1, 2]
    tolerance = 1e-15 if dtype == torch.float64 else 1e-7
    assert F.ece_from_bins(sums).item() == pytest.approx(0.1375, abs=tolerance)
    assert F.auroc(confidence, correct).item() == pytest.approx(5 / 7, abs=1e-15)
    # The same through the metrics: two classes, label 0 where correct.
    logits = torch.tensor([[1.0, 0.0]] * 12)
    labels = 1 - torch.tensor(EDGE_CORRECT)
    assert F.ece(logits, labels, n_bins=5, confidence=confidence).item() == pytest.approx(0.1375, abs=tolerance)
    gap = F.signed_gap(logits, labels, confidence=confidence).item()
    assert gap == pytest.approx(-0.0458333333333, abs=max(tolerance, 1e-12))
    assert F.correctness_auroc(logits, labels, confidence=confidence).item() == pytest.approx(5 / 7, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_bins", [1, 5, 10, 15, 20, 100])
def test_an_edge_belongs_to_the_bin_that_ends_there(n_bins, dtype):
    edges = torch.tensor([k / n_bins for k in range(n_bins + 1)], dtype=dtype)
    counts = F.bin_sums(edges, torch.zeros(n_bins + 1), n_bins)[:, 0]
    assert counts.tolist() == [2.0] + [1.0] * (n_bins - 1)
    above = torch.nextafter(edges[1:-1].float(), torch.tensor(1.0))
    if dtype == torch.float32:
        counts = F.bin_sums(above, torch.zeros(n_bins - 1), n_bins)[:, 0]
        assert counts.tolist() == [0.0] + [1.0] * (n_bins - 1) if n_bins > 1 else [0.0]


def test_probabilities_on_an_edge_stay_there():
    confidence = torch.tensor([k / 15 for k in range(3, 16)])
    probs = torch.cat([confidence[:, None], ((1 - confidence) / 9)[:, None].expand(-1, 9)], dim=1)
    labels = torch.zeros(13, dtype=torch.int64)
    by_hand = (1 - confidence.double()).sum() / 13
    assert F.ece(probs, labels, input="probs").item() == pytest.approx(by_hand.item(), abs=1e-12)
    # Every bin (2/15, 3/15] ... has its own label 0, so that only the right bins give this sum.
    labels[::2] = 1
    expected = torch.where(labels == 0, 1 - confidence.double(), confidence.double()).sum() / 13
    assert F.ece(probs, labels, input="probs").item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_against_numpy(classes, dtype, tolerance):
    logits, labels = random_set(800, classes, scale=3.0)
    assert all_metrics(logits.to(dtype), labels) == pytest.approx(reference(logits.to(dtype), labels), abs=tolerance)


@pytest.mark.parametrize("n_bins", [1, 7, 15, 64])
def test_ece_with_other_bins(n_bins):
    logits, labels = random_set(700, 6)
    expected = reference(logits, labels, n_bins)["ece"]
    assert F.ece(logits, labels, n_bins=n_bins).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_probabilities_give_what_logits_give(dtype, tolerance):
    logits, labels = random_set(600, 7)
    probs = logits.softmax(1).to(dtype)
    assert all_metrics(probs, labels, input="probs") == pytest.approx(reference(logits, labels), abs=tolerance)


def test_float32_probabilities_are_summed_exactly():
    logits, labels = random_set(5000, 10)
    probs = logits.float().softmax(1)
    p = probs.double().numpy()
    expected = ((p - np.eye(10)[labels.numpy()]) ** 2).sum(axis=1).mean()
    assert F.brier(probs, labels, input="probs").item() == pytest.approx(expected, abs=1e-14)
    expected = -np.log(p[np.arange(5000), labels.numpy()]).mean()
    assert F.nll(probs, labels, input="probs").item() == pytest.approx(expected, abs=1e-13)


def test_the_kind_of_input_is_never_guessed():
    generator = torch.Generator().manual_seed(1)
    logits = torch.rand(50, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (50,), generator=generator)
    expected = reference(logits, labels)
    assert all_metrics(logits, labels) == pytest.approx(expected, abs=1e-12)
    as_probs = logits.softmax(1)
    assert all_metrics(as_probs, labels)["ece"] == pytest.approx(reference(as_probs, labels)["ece"], abs=1e-12)


def test_own_confidence_replaces_the_largest_probability():
    logits, labels = random_set(400, 5)
    confidence = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    correct = (logits.argmax(1) == labels).numpy()
    c = confidence.numpy()
    index = np.minimum(np.ceil(c * 10).astype(int) - 1, 9)
    sums = [(correct[index == m].sum() - c[index == m].sum()) for m in range(10)]
    assert F.ece(logits, labels, n_bins=10, confidence=confidence).item() == pytest.approx(np.abs(sums).sum() / 400)
    assert F.signed_gap(logits, labels, confidence=confidence).item() == pytest.approx(c.mean() - correct.mean())
    ranked = F.correctness_auroc(logits, labels, confidence=confidence).item()
    assert ranked == pytest.approx(roc_auc_score(correct, c), abs=1e-12)
    assert confidence.equal(torch.from_numpy(c))


# --- ranking


@pytest.mark.parametrize("case", ["random", "half tied", "all tied", "infinite"])
def test_auroc_against_scikit_learn(case):
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(501, generator=generator, dtype=torch.float64)
    positive = torch.rand(501, generator=generator) < 0.3 + 0.4 * torch.sigmoid(scores)
    if case == "half tied":
        scores[::2] = scores[::2].round()
    elif case == "all tied":
        scores = torch.zeros(501)
    elif case == "infinite":
        scores[scores > 1] = torch.inf
        scores[scores < -1] = -torch.inf
    finite = scores.clamp(-9, 9)
    value = F.auroc(scores, positive)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(roc_auc_score(positive.numpy(), finite.numpy()), abs=1e-12)
    if case == "all tied":
        assert value.item() == 0.5


def test_auroc_refuses_nan_and_wrong_shapes():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        F.auroc(torch.tensor([torch.nan, 1.0]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        F.auroc(torch.zeros(2), torch.zeros(3).bool())


@pytest.mark.parametrize("factor", [1, 8, 50, 1000])
def test_overconfident_logits_keep_their_ranking(factor):
    logits, labels = random_set(4000, 10, scale=3.0, seed=5)
    logits = (factor * logits).float()
    labels = torch.where(torch.arange(4000) % 5 == 0, (labels + 1) % 10, labels)
    expected = reference(logits, labels)
    assert F.correctness_auroc(logits, labels).item() == pytest.approx(expected["correctness_auroc"], abs=1e-6)
    if factor == 8:
        # The float32 confidence itself has lost the order.
        saturated = F.correctness_auroc(logits, labels, confidence=logits.softmax(1).amax(1)).item()
        assert abs(saturated - expected["correctness_auroc"]) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_the_softmax(dtype):
    logits, labels = random_set(2000, 10, scale=4.0)
    narrow = logits.to(dtype)
    assert all_metrics(narrow, labels) == pytest.approx(all_metrics(narrow.float(), labels), abs=0)
    assert all_metrics(narrow, labels) == pytest.approx(reference(narrow, labels), abs=1e-6)


@pytest.mark.parametrize("key", KEYS)
def test_no_rows(key):
    with pytest.warns(UserWarning, match="no rows") as caught:
        value = getattr(F, key)(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert math.isnan(value)
    assert len(caught) == 1


def test_one_row():
    logits, labels = torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    c = 1 / (1 + math.exp(-2.0))
    values = quietly(all_metrics, logits, labels)
    assert math.isnan(values.pop("correctness_auroc"))
    expected = {"accuracy": 1, "nll": -math.log(c), "brier": 2 * (1 - c) ** 2, "ece": 1 - c, "signed_gap": c - 1}
    assert values == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("right", [True, False])
def test_all_correct_and_all_wrong(right):
    logits, _ = random_set(100, 4)
    labels = logits.argmax(1) if right else logits.argmin(1)
    mean = logits.softmax(1).amax(1).mean().item()
    assert F.accuracy(logits, labels).item() == float(right)
    assert F.ece(logits, labels).item() == pytest.approx(1 - mean if right else mean, abs=1e-12)
    with pytest.warns(UserWarning, match=f"all 100 rows are {'positive' if right else 'negative'}") as caught:
        assert math.isnan(F.correctness_auroc(logits, labels))
    assert len(caught) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_logits(dtype):
    logits = torch.full((10, 5), 7.5, dtype=dtype)
    labels = torch.tensor([0] * 4 + [1, 2, 3, 4, 1, 2])
    values = all_metrics(logits, labels)
    fifth = torch.tensor(0.2, dtype=dtype).item()  # a float32 softmax cannot say one fifth
    expected = {"accuracy": 0.4, "nll": math.log(5), "brier": 0.8, "ece": 0.4 - fifth, "signed_gap": fifth - 0.4}
    assert values == pytest.approx(expected | {"correctness_auroc": 0.5}, abs=1e-12)


def test_one_class():
    values = quietly(all_metrics, torch.randn(6, 1), torch.zeros(6, dtype=torch.int64))
    assert math.isnan(values.pop("correctness_auroc"))
    assert values == {"accuracy": 1.0, "nll": 0.0, "brier": 0.0, "ece": 0.0, "signed_gap": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0], [0.0, 1e4, 1e4]], dtype=dtype)
    values = all_metrics(logits, torch.tensor([0, 1, 0]))
    assert values["nll"] == pytest.approx((1e4 + math.log(2)) / 3)
    assert values["brier"] == pytest.approx(1.5 / 3)
    assert values["correctness_auroc"] == 1.0


def test_a_label_without_probability_costs_infinitely():
    assert F.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), input="probs").item() == math.inf


# --- invalid input

GOOD = torch.zeros(4, 3)
LABELS = torch.tensor([0, 1, 2, 0])


def _with(tensor, row, value):
    changed = tensor.clone()
    changed[row] = value
    return changed


INVALID = {
    "nan": (_with(GOOD, (2, 1), torch.nan), LABELS, {}, ValueError, r"1 of 4 rows.*logits; row 2 has nan for class 1"),
    "inf": (_with(GOOD, (1, 0), torch.inf), LABELS, {}, ValueError, r"row 1 has inf for class 0; it must be finite"),
    "-inf": (_with(GOOD, (3, 2), -torch.inf), LABELS, {}, ValueError, r"row 3 has -inf for class 2"),
    "inf cancels": (_with(_with(GOOD, (3, 2), -torch.inf), (1, 0), torch.inf), LABELS, {}, ValueError, r"2 of 4 rows"),
    "label K": (
        GOOD,
        _with(LABELS, 3, 3),
        {},
        ValueError,
        r"1 of 4 rows.*; row 3 has label 3; it must be in 0\.\.2",
    ),
    "label -1": (
        GOOD,
        _with(LABELS, 0, -1),
        {},
        ValueError,
        r"label -1; it must be in 0\.\.2\. A set without",
    ),
    "float labels": (GOOD, LABELS.float(), {}, TypeError, "labels is torch.float32.*must be class numbers"),
    "soft labels": (GOOD, GOOD + 1 / 3, {}, TypeError, r"labels is .*\(4, 3\); it must be class numbers"),
    "bool labels": (GOOD, LABELS.bool(), {}, TypeError, "labels is torch.bool.*must be class numbers"),
    "long labels": (GOOD, LABELS.repeat(2), {}, ValueError, r"labels has shape \(8,\); it must have shape \(4,\)"),
    "column labels": (GOOD, LABELS[:, None], {}, ValueError, r"labels has shape \(4, 1\); it must have shape \(4,\)"),
    "1-d logits": (GOOD[0], LABELS, {}, ValueError, r"shape \(N, K\)"),
    "no classes": (GOOD[:, :0], LABELS, {}, ValueError, r"shape \(N, K\)"),
    "integer logits": (GOOD.long(), LABELS, {}, TypeError, "is torch.int64; it must be floating point"),
    "list": (GOOD.tolist(), LABELS, {}, TypeError, "logits is list; it must be a tensor"),
    "unknown kind": (GOOD, LABELS, {"input": "auto"}, ValueError, "input is 'auto'"),
    "unnormalised": (_with(GOOD + 1 / 3, (2, 0), 0.336), LABELS, {"input": "probs"}, ValueError, "row 2 .*1.00267"),
    "negative": (
        _with(GOOD + 1 / 3, 1, torch.tensor([-0.1, 0.5, 0.6])),
        LABELS,
        {"input": "probs"},
        ValueError,
        r"1 of 4 rows.*probs; row 1 has -0\.1.* for class 0",
    ),
    "nan prob": (_with(GOOD + 1 / 3, (1, 1), torch.nan), LABELS, {"input": "probs"}, ValueError, "row 1 has nan"),
}
BAD_CONFIDENCE = {
    "above": (
        torch.tensor([0.5, 1.001, 0.5, 2.0]),
        ValueError,
        r"2 of 4 rows.*confidence; row 1 has confidence 1\.001",
    ),
    "below": (torch.tensor([0.5, 0.5, -1e-8, 0.5]), ValueError, "row 2 has confidence -9.99"),
    "nan": (torch.tensor([0.5, 0.5, 0.5, torch.nan]), ValueError, "row 3 has confidence nan"),
    "shape": (torch.full((4, 1), 0.5), ValueError, r"confidence has shape \(4, 1\); it must have shape \(4,\)"),
    "integer": (torch.ones(4, dtype=torch.int64), TypeError, "confidence is torch.int64; it must be floating point"),
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("case", INVALID)
def test_invalid_input_is_named(key, case):
    logits, labels, options, error, message = INVALID[case]
    if case == "soft labels" and key in ("nll", "brier"):
        assert math.isfinite(getattr(F, key)(logits, labels))  # the labels of these may be soft
        return
    with pytest.raises(error, match=message):
        getattr(F, key)(logits, labels, **options)


@pytest.mark.parametrize("key", WITH_CONFIDENCE)
@pytest.mark.parametrize("case", BAD_CONFIDENCE)
def test_invalid_confidence_is_named(key, case):
    confidence, error, message = BAD_CONFIDENCE[case]
    with pytest.raises(error, match=message):
        getattr(F, key)(GOOD, LABELS, confidence=confidence)


@pytest.mark.parametrize("n_bins", [0, -3, 1.5, True])
def test_invalid_number_of_bins(n_bins):
    with pytest.raises(ValueError, match="n_bins is "):
        F.ece(GOOD, LABELS, n_bins=n_bins)


def test_huge_finite_logits_are_not_taken_for_infinite():
    logits = torch.full((4, 3), 3e38)
    assert F.accuracy(logits, LABELS).item() == 0.5


def test_tolerance_of_probabilities():
    probs = _with(GOOD + 1 / 3, 2, torch.tensor([1.0009, 0.0, 0.0]))
    assert math.isfinite(F.ece(probs, LABELS, input="probs"))
    assert F.correctness_auroc(probs, LABELS, input="probs").item() == 0.25


# --- properties


@st.composite
def sets(draw):
    n = draw(st.integers(1, 40))
    classes = draw(st.integers(2, 6))
    values = st.floats(-30, 30, allow_nan=False, width=32)
    logits = draw(st.lists(values, min_size=n * classes, max_size=n * classes))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return torch.tensor(logits, dtype=torch.float64).reshape(n, classes), torch.tensor(labels)


@settings(max_examples=60, deadline=None)
@given(sets(), st.integers(1, 20))
def test_bounds(data, n_bins):
    logits, labels = data
    values = quietly(all_metrics, logits, labels)
    assert 0 <= values["accuracy"] <= 1
    assert 0 <= values["nll"] < math.inf
    assert -1e-15 <= values["brier"] <= 2 + 1e-15
    assert 0 <= values["ece"] <= 1
    assert F.ece(logits, labels, n_bins=n_bins).item() >= abs(values["signed_gap"]) - 1e-12
    # Merging bins never makes the error larger.
    assert F.ece(logits, labels, n_bins=n_bins).item() <= F.ece(logits, labels, n_bins=2 * n_bins).item() + 1e-12
    if not math.isnan(values["correctness_auroc"]):
        assert 0 <= values["correctness_auroc"] <= 1


@settings(max_examples=60, deadline=None)
@given(sets(), st.randoms(use_true_random=False))
def test_order_of_rows_and_constants_do_not_matter(data, random):
    logits, labels = data
    before = quietly(all_metrics, logits, labels)
    order = list(range(len(labels)))
    random.shuffle(order)
    assert quietly(all_metrics, logits[order], labels[order]) == pytest.approx(before, abs=1e-12, nan_ok=True)
    # Multiples of 1/4 up to 64 leave logits that are themselves rounded to 2^-20 exact.
    logits = (logits * 2**20).round() / 2**20
    shift = torch.tensor([random.randint(-256, 256) / 4 for _ in order], dtype=torch.float64)
    before = quietly(all_metrics, logits, labels)
    assert quietly(all_metrics, logits + shift[:, None], labels) == pytest.approx(before, abs=1e-12, nan_ok=True)
