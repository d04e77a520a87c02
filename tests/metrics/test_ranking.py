import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma
from sklearn.metrics import average_precision_score, roc_auc_score

from calib_lightning.metrics import OODDetection
from calib_lightning.metrics.functional.ood import max_prob_log_odds, ood_aupr, ood_aupr_out, ood_auroc, ood_fpr95
from calib_lightning.metrics.functional.ordered import Ordered, group_ends, order_rows, sums_of_groups
from calib_lightning.metrics.functional.refinement import (
    aupr_error,
    aupr_error_from_ordered,
    aupr_success,
    auroc_from_ordered,
    average_precision_from_ordered,
    correctness_auroc,
    fpr95,
    fpr_at_tpr_from_ordered,
)
from calib_lightning.metrics.functional.selective import (
    augrc,
    augrc_from_ordered,
    aurc,
    aurc_from_ordered,
    coverage_at_risk,
    coverage_at_risk_from_ordered,
    e_aurc,
    e_aurc_from_ordered,
    risk_at_coverage,
    risk_at_coverage_from_ordered,
)
from tests.metrics.golden import EDGE_CONFIDENCE, EDGE_CORRECT, golden_set, pair_auroc, random_set


def exact_e_aurc_from_ordered(ordered):
    return e_aurc_from_ordered(ordered, exact=True)


FROM_ORDERED = {
    "auroc": auroc_from_ordered,
    "aupr_success": average_precision_from_ordered,
    "aupr_error": aupr_error_from_ordered,
    "fpr95": fpr_at_tpr_from_ordered,
    "aurc": aurc_from_ordered,
    "e_aurc": e_aurc_from_ordered,
    "e_aurc exact": exact_e_aurc_from_ordered,
    "augrc": augrc_from_ordered,
    "coverage": lambda ordered: coverage_at_risk_from_ordered(ordered, 0.3),
    "risk": risk_at_coverage_from_ordered,
}
# What does not change where all weights are multiplied by a number: it knows no single rows.
RATES = ("auroc", "aupr_success", "aupr_error", "fpr95", "coverage")
PUBLIC = {
    "correctness_auroc": correctness_auroc,
    "aupr_success": aupr_success,
    "aupr_error": aupr_error,
    "fpr95": fpr95,
    "aurc": aurc,
    "e_aurc": e_aurc,
    "augrc": augrc,
    "coverage_at_risk": coverage_at_risk,
    "risk_at_coverage": risk_at_coverage,
}
GOLDEN_RANKING = {
    "correctness_auroc": 0.755213417340,
    "aupr_success": 0.900983402140,
    "aupr_error": 0.513351413361,
    "fpr95": 0.796610169492,
    "aurc": 0.111777532010,
    "e_aurc": 0.081436774229,
    "augrc": 0.07222,
}


def cases(n=400):
    """Scores with and without ties, and what is positive."""
    generator = np.random.default_rng(0)
    scores = generator.normal(size=n)
    positive = generator.random(n) < 0.3 + 0.5 / (1 + np.exp(-scores))
    half = scores.copy()
    half[::2] = half[::2].round()
    return {
        "random": (scores, positive),
        "half tied": (half, positive),
        "few values": (scores.round(), positive),
        "all tied": (np.zeros(n), positive),
    }


CASES = cases()


def ordered_of(scores, positive):
    return order_rows(torch.from_numpy(np.array(scores, dtype=float)), torch.from_numpy(np.array(positive, dtype=bool)))


def groups_of(scores, positive):
    """(rows, errors) of every distinct score, the highest first."""
    scores, positive = np.asarray(scores), np.asarray(positive, dtype=bool)
    return [(int((scores == s).sum()), int((~positive[scores == s]).sum())) for s in sorted(set(scores.tolist()))[::-1]]


def expected_errors(scores, positive):
    """Expected number of errors among the first j rows, j = 1..N, as exact fractions."""
    errors, total = [], Fraction(0)
    for rows, wrong in groups_of(scores, positive):
        errors += [total + Fraction(j * wrong, rows) for j in range(1, rows + 1)]
        total += wrong
    return errors


def by_definition(scores, positive):
    """Every metric by loops over rows and thresholds; nan where there is nothing to divide by."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    n, hits = len(scores), int(positive.sum())
    misses = n - hits
    errors = expected_errors(scores, positive)
    result = dict.fromkeys(FROM_ORDERED, math.nan)
    result["auroc"] = float(pair_auroc(scores, positive))
    if hits:
        result["aupr_success"] = average_precision_score(positive, scores)
    if misses:
        result["aupr_error"] = average_precision_score(~positive, -scores)
    if hits and misses:
        result["fpr95"] = next(
            float((scores[~positive] >= t).mean())
            for t in sorted(set(scores.tolist()))[::-1]
            if Fraction(int((scores[positive] >= t).sum()), hits) >= Fraction(95, 100)
        )
    if n:
        result["aurc"] = math.fsum(e / j for j, e in enumerate(errors, 1)) / n
        result["augrc"] = float(sum(errors) / n**2)
        rate = misses / n
        limit = rate + ((1 - rate) * math.log(1 - rate) if hits else 0.0)
        result["e_aurc"] = result["aurc"] - limit
        result["e_aurc exact"] = result["aurc"] - math.fsum(max(0, j - hits) / j for j in range(1, n + 1)) / n
        k = -(-8 * n // 10)
        result["risk"] = float(errors[k - 1] / k)
        ends = np.cumsum([rows for rows, _ in groups_of(scores, positive)]).tolist()
        within = [end for end in ends if errors[end - 1] / end <= Fraction(3, 10)]
        result["coverage"] = max(within) / n if within else math.nan
    return result


def all_values(ordered):
    return {name: function(ordered) for name, function in FROM_ORDERED.items()}


def same(values, expected, tolerance=1e-12):
    numbers = {name: value.item() for name, value in values.items()}
    assert numbers == pytest.approx(expected, abs=tolerance, rel=0, nan_ok=True)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def logits_for(correct):
    """Two-class rows that are predicted as class 0, and labels that make them right or wrong."""
    correct = torch.as_tensor(correct).long()
    return torch.tensor([[1.0, 0.0]]).expand(len(correct), 2), 1 - correct


# --- known numbers


@pytest.mark.parametrize("name", GOLDEN_RANKING)
def test_golden_values(name):
    value = PUBLIC[name](*golden_set())
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(GOLDEN_RANKING[name], abs=1e-12)


def test_golden_exact_excess():
    assert e_aurc(*golden_set(), exact=True).item() == pytest.approx(0.081200955862, abs=1e-12)


def test_edge_table():
    logits, labels = logits_for(EDGE_CORRECT)
    confidence = torch.tensor(EDGE_CONFIDENCE, dtype=torch.float64)
    values = {name: function(logits, labels, confidence=confidence).item() for name, function in PUBLIC.items()}
    assert values["correctness_auroc"] == pytest.approx(0.7142857, abs=5e-8)
    assert values["aupr_success"] == pytest.approx(0.788188, abs=5e-7)
    assert values["aupr_error"] == pytest.approx(0.683333, abs=5e-7)
    assert values["fpr95"] == pytest.approx(0.8, abs=1e-15)
    assert values["aurc"] == pytest.approx(0.2680014, abs=5e-8)
    assert values["aurc"] - values["e_aurc"] == pytest.approx(0.1022520, abs=5e-8)
    exact = e_aurc(logits, labels, exact=True, confidence=confidence).item()
    assert values["aurc"] - exact == pytest.approx(0.1189604, abs=5e-8)
    # By hand: the two at 1.0 are right; among the best 10 of 12 are the errors at 0.8, 0.6 and 0.35, and one of the two
    # rows at 0.2, which is half an error.
    assert values["coverage_at_risk"] == pytest.approx(2 / 12, abs=1e-15)
    assert values["risk_at_coverage"] == pytest.approx(3.5 / 10, abs=1e-15)


def test_a_stable_order_of_ties_would_give_another_aurc():
    confidence, correct = np.array(EDGE_CONFIDENCE), np.array(EDGE_CORRECT)
    order = np.argsort(-confidence, kind="stable")
    stable = (np.cumsum(1 - correct[order]) / np.arange(1, 13)).mean()
    assert stable == pytest.approx(0.2805014, abs=5e-8)
    backwards = np.argsort(-confidence[::-1], kind="stable")
    other = (np.cumsum(1 - correct[::-1][backwards]) / np.arange(1, 13)).mean()
    assert abs(other - stable) > 0.02
    ours = [
        aurc_from_ordered(ordered_of(c, a)).item()
        for c, a in [(confidence, correct), (confidence[::-1], correct[::-1])]
    ]
    assert ours[0] == ours[1] == pytest.approx(0.2680014, abs=5e-8)


# --- against the definitions


@pytest.mark.parametrize("case", CASES)
def test_against_the_definitions(case):
    scores, positive = CASES[case]
    same(all_values(ordered_of(scores, positive)), by_definition(scores, positive))


@pytest.mark.parametrize("case", CASES)
def test_against_scikit_learn(case):
    scores, positive = CASES[case]
    ordered = ordered_of(scores, positive)
    assert auroc_from_ordered(ordered).item() == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    success = average_precision_score(positive, scores)
    assert average_precision_from_ordered(ordered).item() == pytest.approx(success, abs=1e-12)
    error = average_precision_score(~positive, -scores)
    assert aupr_error_from_ordered(ordered).item() == pytest.approx(error, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "correct"),
    [
        ([1, 1, 0, 0, 0, 2], [1, 0, 0, 1, 1, 1]),
        ([0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]),
        ([3, 3, 3, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0, 1]),
    ],
)
def test_ties_give_the_mean_over_all_orders(scores, correct):
    sums = dict.fromkeys(("aurc", "augrc", "risk"), Fraction(0))
    orders = 0
    n = len(scores)
    k = math.ceil(Fraction(8, 10) * n)
    for order in itertools.permutations(range(n)):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            errors = list(itertools.accumulate(1 - correct[i] for i in order))
            sums["aurc"] += sum(Fraction(e, j) for j, e in enumerate(errors, 1)) / n
            sums["augrc"] += Fraction(sum(errors), n * n)
            sums["risk"] += Fraction(errors[k - 1], k)
            orders += 1
    values = all_values(ordered_of(scores, correct))
    for name, total in sums.items():
        assert values[name].item() == pytest.approx(float(total / orders), abs=1e-13)


def test_aurc_of_many_rows_in_small_groups():
    generator = np.random.default_rng(1)
    rows = generator.integers(1, 4, 100_000)
    errors = generator.binomial(rows, np.linspace(0.6, 0.01, 100_000))
    ordered = Ordered(*(torch.from_numpy(x).double() for x in (rows, rows - errors, rows)))
    rows, errors = rows[::-1], errors[::-1]
    share = np.repeat(errors / rows, rows)
    expected = math.fsum(np.cumsum(share) / np.arange(1, len(share) + 1)) / len(share)
    assert aurc_from_ordered(ordered).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("above", "rows"), [(1, 1), (1, 2), (2, 3), (7, 2), (40, 50_000), (3_000_000, 2), (10**8, 7)])
def test_one_tied_group_below_many_rows(above, rows):
    # All rows above are wrong, those of the group right: the sum of above / (above + j).
    ordered = Ordered(*(torch.tensor(x, dtype=torch.float64) for x in ([rows, above], [rows, 0], [0, 0])))
    expected = above + float(sum(Fraction(above, above + j) for j in range(1, min(rows, 10) + 1)))
    expected += math.fsum(above / (above + j) for j in range(11, rows + 1))
    total = aurc_from_ordered(ordered).item() * (above + rows)
    assert total == pytest.approx(expected, abs=1e-12, rel=1e-15)


def test_fractional_weights_of_the_aurc():
    generator = np.random.default_rng(2)
    rows = generator.exponential(size=300)
    errors = rows * generator.random(300)
    ordered = Ordered(*(torch.from_numpy(x) for x in (rows, rows - errors, rows)))
    m, e, total = 0.0, 0.0, 0.0
    for n, wrong in zip(rows[::-1], errors[::-1], strict=True):
        total += wrong + (e - m * wrong / n) * (digamma(m + n + 1) - digamma(m + 1))
        m, e = m + n, e + wrong
    assert aurc_from_ordered(ordered).item() == pytest.approx(total / m, abs=1e-12)


@pytest.mark.parametrize("coverage", [0.01, 0.07, 0.29, 0.5, 0.8, 0.9, 0.951, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_risk_at_coverage_counts_whole_rows(case, coverage):
    scores, positive = (x[:100] for x in CASES[case])
    k = math.ceil(Fraction(str(coverage)) * 100)
    expected = float(expected_errors(scores, positive)[k - 1] / k)
    value = risk_at_coverage_from_ordered(ordered_of(scores, positive), coverage).item()
    assert value == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("hits", [20, 40, 100, 220])
def test_a_rate_that_is_met_exactly_is_reached(hits):
    # 95 % of the hits outrank all misses but the lowest; a threshold below 0.95 would take in the miss in between.
    first = hits * 95 // 100
    correct = [1] * first + [0] + [1] * (hits - first) + [0]
    ordered = ordered_of(-np.arange(hits + 2.0), correct)
    assert fpr_at_tpr_from_ordered(ordered).item() == 0.0
    assert fpr_at_tpr_from_ordered(ordered, (first + 0.5) / hits).item() == 0.5
    # One error in 20 rows is a risk of 0.05; another would exceed it.
    errors = hits // 20
    correct = [1] * (hits - errors) + [0] * (errors + 1)
    assert coverage_at_risk_from_ordered(ordered_of(-np.arange(hits + 1.0), correct)).item() == hits / (hits + 1)


def test_coverage_returns_after_an_early_error():
    correct = [0, 1, 1, 1, 0, 0]
    ordered = ordered_of(-np.arange(6.0), correct)
    assert coverage_at_risk_from_ordered(ordered, 0.25).item() == pytest.approx(4 / 6)
    assert coverage_at_risk_from_ordered(ordered, 0.2).isnan()
    # Five of six would do if the tied pair could be split.
    tied = ordered_of([5, 4, 3, 2, 1, 1], [1, 1, 1, 1, 1, 0])
    assert coverage_at_risk_from_ordered(tied, 0.1).item() == pytest.approx(4 / 6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("risk", [0.2, 0.35, 0.45, 1.0])
def test_coverage_and_risk_agree(case, risk):
    ordered = ordered_of(*CASES[case])
    coverage = coverage_at_risk_from_ordered(ordered, risk).item()
    if math.isnan(coverage):
        ends = np.cumsum([n for n, _ in groups_of(*CASES[case])]) / 400
        assert all(risk_at_coverage_from_ordered(ordered, end).item() > risk for end in ends)
    else:
        assert risk_at_coverage_from_ordered(ordered, coverage).item() <= risk
        assert coverage == 1.0 or risk_at_coverage_from_ordered(ordered, 1.0).item() > risk


# --- leading dimensions and weights


@pytest.mark.parametrize("case", CASES)
def test_weights_stand_for_repeated_rows(case):
    scores, positive = (x[:120] for x in CASES[case])
    weights = np.random.default_rng(3).multinomial(120, np.full(120, 1 / 120), size=(2, 3))
    order = np.argsort(scores, kind="stable")
    ends = group_ends(torch.from_numpy(scores[order]))
    w = torch.from_numpy(weights[..., order]).double()
    hits = torch.from_numpy(positive[order]).double()
    sums = [sums_of_groups(x, ends) for x in (w, w * hits, w)]
    assert bool((sums[0] == 0).any()) == (case in ("random", "half tied"))
    values = all_values(Ordered(*sums))
    for b in itertools.product(range(2), range(3)):
        repeated = np.repeat(np.arange(120), weights[b])
        expected = by_definition(scores[repeated], positive[repeated])
        same({name: value[b] for name, value in values.items()}, expected)
    assert {value.shape for value in values.values()} == {(2, 3)}
    assert {value.dtype for value in values.values()} == {torch.float64}


@pytest.mark.parametrize("factor", [0.1, 0.3, 1 / 3, 0.7, 1e-6, 1e6])
def test_rates_do_not_depend_on_the_unit_of_the_weights(factor):
    # 95 % of the hits stand first, and one error among 20 rows is 5 %: sums of weights may miss what counts meet.
    sets = [
        ordered_of(-np.arange(2002.0), [1] * 1900 + [0] + [1] * 100 + [0]),
        ordered_of(-np.arange(21.0), [1] * 19 + [0] * 2),
    ]
    for ordered in (*sets, ordered_of(*CASES["half tied"])):
        scaled = Ordered(*(x * factor for x in ordered))
        functions = {name: FROM_ORDERED[name] for name in RATES} | {"coverage 5 %": coverage_at_risk_from_ordered}
        expected = {name: function(ordered).item() for name, function in functions.items()}
        same({name: function(scaled) for name, function in functions.items()}, expected)


def test_empty_groups_change_nothing():
    ordered = ordered_of(*CASES["few values"])
    expected = {name: value.item() for name, value in all_values(ordered).items()}
    pad = torch.zeros(3, dtype=torch.float64)
    between = [torch.stack([x, torch.zeros_like(x)], dim=-1).flatten() for x in ordered]
    same(all_values(Ordered(*(torch.cat([pad, x, pad]) for x in between))), expected, 1e-15)


@pytest.mark.parametrize("lead", [(), (3,), (2, 0)])
@pytest.mark.parametrize("groups", [0, 4])
def test_no_rows_are_silent_nan(lead, groups):
    ordered = Ordered(*(torch.zeros(*lead, groups, dtype=torch.float64) for _ in range(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = all_values(ordered)
    for value in values.values():
        assert value.shape == lead
        assert bool(value.isnan().all())


@pytest.mark.parametrize("name", FROM_ORDERED)
def test_inputs_are_left_alone(name):
    ordered = ordered_of(*CASES["half tied"])
    before = [x.clone() for x in ordered]
    FROM_ORDERED[name](ordered)
    assert all(x.equal(y) for x, y in zip(ordered, before, strict=True))


# --- sets with one kind of rows


NAN = math.nan
DEGENERATE = {
    # n, correct of them: auroc, aupr_success, aupr_error, fpr95, aurc, e_aurc, augrc, coverage at 5 %, risk at 80 %
    (1, 1): (NAN, 1, NAN, NAN, 0, 0, 0, 1, 0),
    (1, 0): (NAN, NAN, 1, NAN, 1, 0, 1, NAN, 1),
    (50, 50): (NAN, 1, NAN, NAN, 0, 0, 0, 1, 0),
    (50, 0): (NAN, NAN, 1, NAN, 1, 0, 0.51, NAN, 1),
    (0, 0): (NAN,) * 9,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("n", "correct"), DEGENERATE)
def test_degenerate_sets(n, correct, tied):
    logits = torch.arange(1.0, n + 1)[:, None] * torch.tensor([0.1, 0.0])
    logits = torch.ones_like(logits) * torch.tensor([1.0, 0.0]) if tied else logits
    labels = torch.full((n,), 0 if correct else 1)
    for (name, function), expected in zip(PUBLIC.items(), DEGENERATE[n, correct], strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = function(logits, labels).item()
        assert value == pytest.approx(expected, abs=1e-14, nan_ok=True), name
        assert len(caught) == int(math.isnan(expected)), name
        for warning in caught:
            assert warning.filename == __file__
            text = str(warning.message)
            assert text.startswith(f"{name}: ")
            assert text.endswith("the result is nan")
            assert ("no rows" in text) == (n == 0)


@pytest.mark.parametrize("right", [True, False])
def test_the_missing_side_is_named(right):
    logits, _ = random_set(40, 3)
    labels = logits.argmax(1) if right else logits.argmin(1)
    present, missing = ("positive", "negative") if right else ("negative", "positive")
    with pytest.warns(UserWarning, match=f"fpr95: all 40 rows are {present}; {missing} rows are needed"):
        fpr95(logits, labels)


def test_an_unreached_risk_is_named():
    logits, labels = logits_for([0, 1, 1])
    with pytest.warns(UserWarning, match=r"coverage_at_risk: no threshold accepts rows with a risk of at most 0\.1"):
        coverage_at_risk(logits, labels, risk=0.1)


def test_constant_scores_have_no_skill():
    ordered = ordered_of(np.zeros(10), [1] * 4 + [0] * 6)
    values = {name: value.item() for name, value in all_values(ordered).items()}
    assert values["auroc"] == 0.5
    assert values["aupr_success"] == pytest.approx(0.4)
    assert values["aupr_error"] == pytest.approx(0.6)
    assert values["fpr95"] == 1.0
    assert values["aurc"] == pytest.approx(0.6)
    assert values["risk"] == pytest.approx(0.6)


def test_perfect_order_has_no_excess():
    ordered = ordered_of(np.arange(20.0), [0] * 6 + [1] * 14)
    assert exact_e_aurc_from_ordered(ordered).item() == pytest.approx(0.0, abs=1e-15)
    assert e_aurc_from_ordered(ordered).item() > 1e-3


# --- settings


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, 0.0])
def test_rates_outside_their_range_are_refused(value):
    ordered = ordered_of([0, 1], [0, 1])
    with pytest.raises(ValueError, match=f"tpr is {value}.*\\(0, 1\\]"):
        fpr_at_tpr_from_ordered(ordered, value)
    with pytest.raises(ValueError, match=f"coverage is {value}.*\\(0, 1\\]"):
        risk_at_coverage_from_ordered(ordered, value)
    if value != 0.0:
        with pytest.raises(ValueError, match=f"risk is {value}.*\\[0, 1\\]"):
            coverage_at_risk_from_ordered(ordered, value)
    else:
        assert coverage_at_risk_from_ordered(ordered, 0.0).item() == 0.5


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_check_their_input(name):
    with pytest.raises(ValueError, match=f"{name}.*label"):
        PUBLIC[name](torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=f"{name}.*labels"):
        PUBLIC[name](torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("name", PUBLIC)
def test_probabilities_and_logits_agree(name):
    logits, labels = golden_set()
    expected = PUBLIC[name](logits, labels).item()
    assert not math.isnan(expected)
    assert PUBLIC[name](logits.softmax(1), labels, input="probs").item() == pytest.approx(expected, abs=1e-12)
    confidence = logits.softmax(1).amax(1)
    assert PUBLIC[name](logits, labels, confidence=confidence).item() == pytest.approx(expected, abs=1e-12)
    assert quietly(PUBLIC[name], logits, labels, confidence=1 - confidence).item() != pytest.approx(expected, abs=1e-3)


def test_options_reach_the_arithmetic():
    logits, labels = golden_set()
    ordered = order_rows(logits.softmax(1).amax(1), logits.argmax(1) == labels)
    expected = coverage_at_risk_from_ordered(ordered, 0.15).item()
    assert coverage_at_risk(logits, labels, risk=0.15).item() == expected
    assert expected != coverage_at_risk(logits, labels, risk=1.0).item()
    expected = risk_at_coverage_from_ordered(ordered, 0.3).item()
    assert risk_at_coverage(logits, labels, coverage=0.3).item() == expected
    assert expected != risk_at_coverage(logits, labels, coverage=1.0).item()


# --- out of distribution


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ood_takes_in_distribution_as_positive(case, dtype):
    scores, is_id = (torch.from_numpy(x) for x in CASES[case])
    scores = scores.to(dtype)
    s, a = scores.double().numpy(), is_id.numpy()
    assert ood_auroc(scores, is_id).item() == pytest.approx(roc_auc_score(a, s), abs=1e-12)
    assert ood_aupr(scores, is_id).item() == pytest.approx(average_precision_score(a, s), abs=1e-12)
    assert ood_aupr_out(scores, is_id).item() == pytest.approx(average_precision_score(~a, -s), abs=1e-12)
    assert ood_fpr95(scores, is_id).item() == pytest.approx(by_definition(s, a)["fpr95"], abs=1e-12)
    together = OODDetection()
    together.update(scores, is_id)
    one_by_one = {"ood_auroc": ood_auroc, "ood_aupr": ood_aupr, "ood_aupr_out": ood_aupr_out, "ood_fpr95": ood_fpr95}
    assert together.compute() == {key: function(scores, is_id) for key, function in one_by_one.items()}


def test_ood_by_hand():
    scores = torch.tensor([torch.inf, 3.0, 2.0, 1.0, -torch.inf])
    is_id = torch.tensor([True, False, True, False, False])
    assert ood_auroc(scores, is_id).item() == pytest.approx(5 / 6)
    assert ood_aupr(scores, is_id).item() == pytest.approx((1 + 2 / 3) / 2)
    assert ood_aupr_out(scores, is_id).item() == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert ood_fpr95(scores, is_id).item() == pytest.approx(1 / 3)


def test_the_score_orders_rows_as_the_largest_probability_and_does_not_saturate():
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)).double()
    largest = logits.softmax(1).amax(1)
    assert max_prob_log_odds(logits).numpy() == pytest.approx(torch.log(largest / (1 - largest)).numpy(), abs=1e-12)
    assert max_prob_log_odds(logits.softmax(1), "probs").numpy() == pytest.approx(max_prob_log_odds(logits).numpy())
    sure = torch.tensor([[60.0, 0.0], [0.0, 90.0]])
    assert sure.softmax(1).amax(1).unique().tolist() == [1.0]
    assert max_prob_log_odds(sure).tolist() == [60.0, 90.0]


@pytest.mark.parametrize("function", [ood_auroc, ood_aupr, ood_aupr_out, ood_fpr95])
def test_ood_needs_both_sides(function):
    for n, inside, text in [
        (0, True, "no rows"),
        (3, True, "all 3 rows are in-d"),
        (3, False, "all 3 rows are out-of"),
    ]:
        with pytest.warns(UserWarning, match=f"{function.__name__}: {text}") as caught:
            value = function(torch.randn(n), torch.full((n,), inside))
        assert value.isnan()
        assert value.dtype == torch.float64
        assert len(caught) == 1
        assert caught[0].filename == __file__


@pytest.mark.parametrize("function", [ood_auroc, ood_aupr, ood_aupr_out, ood_fpr95])
def test_ood_refuses_bad_input(function):
    yes = torch.tensor([True, False])
    name = function.__name__
    for scores in (torch.tensor([1, 2]), [0.1, 0.2]):
        with pytest.raises(TypeError, match=f"{name}: scores is .*; it must be a floating-point tensor"):
            function(scores, yes)
    for is_id in (torch.tensor([1, 0]), [True, False]):
        with pytest.raises(TypeError, match=f"{name}: is_id is .*; it must be a bool tensor"):
            function(torch.zeros(2), is_id)
    for scores in (torch.zeros(3), torch.zeros(2, 1)):
        with pytest.raises(ValueError, match=f"{name}: the shapes of scores and is_id are .*; both must be"):
            function(scores, yes)
    with pytest.raises(ValueError, match=f"{name}: 1 of 2 scores are NaN"):
        function(torch.tensor([0.0, torch.nan]), yes)


# --- properties

ROWS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 99))
def test_neither_row_order_nor_the_scale_of_the_score_matters(rows, seed):
    scores, positive = (np.array(x) for x in zip(*rows, strict=True))
    expected = {name: value.item() for name, value in all_values(ordered_of(scores, positive)).items()}
    order = np.random.default_rng(seed).permutation(len(rows))
    for changed in (scores, 0.1 * scores - 7, np.arctan(scores / 3.0), scores.astype(float) ** 3):
        same(all_values(ordered_of(changed[order], positive[order])), expected, 0.0)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS)
def test_any_small_set_follows_the_definitions(rows):
    scores, positive = (np.array(x) for x in zip(*rows, strict=True))
    values = all_values(ordered_of(scores, positive))
    same(values, by_definition(scores, positive))
    n = len(rows)
    for name, value in values.items():
        assert value.isnan() or value >= -1e-14 or name == "e_aurc"
        assert value.isnan() or value <= (1 if name != "augrc" else (1 + 1 / n) / 2) + 1e-14
    # Limits of the excess: the optimum of the limit lies below that of the finite set.
    assert values["e_aurc"] >= values["e_aurc exact"] - 1e-14
    # The pairs of the area under the ROC curve are the errors that outrank a hit.
    if not values["auroc"].isnan():
        right, wrong = positive.sum(), (~positive).sum()
        pairs = (1 - values["auroc"]) * right * wrong + wrong * (wrong + 1) / 2
        assert values["augrc"].item() == pytest.approx(pairs.item() / n**2, abs=1e-13)
