"""Differences after random exchanges, against rows exchanged one by one and each metric computed again from them."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from calib_lightning.metrics import CORE, METRICS, EvaluationState, exchange, permutation_test
from calib_lightning.metrics.exchange import differences, in_own_spread, standard_errors
from calib_lightning.metrics.row_table import RowTable
from calib_lightning.metrics.weights import exchanges, read_weighted, resamples, stays
from tests.metrics.golden import random_set, reference
from tests.metrics.test_resampling import detailed, quiet, state_of

OTHERS = ("aurc", "ovo_auroc", "classwise_ece")


def runs_of(methods, seeds, n, classes, ties=False):
    """Logits of each run by method and seed, and the labels that they share; later methods are noisier."""
    signal, labels = random_set(n, classes, seed=classes)
    generator = torch.Generator().manual_seed(n)
    logits = [
        [
            signal + (1.0 + method) * torch.randn(n, classes, generator=generator, dtype=torch.float64)
            for _ in range(seeds)
        ]
        for method in range(methods)
    ]
    return [[run.round() if ties else run for run in runs] for runs in logits], labels


def tables_of(logits, labels, metrics=CORE, **options):
    return [[RowTable.of(detailed(run, labels, metrics=metrics, **options)) for run in runs] for runs in logits]


def exchanged_by_hand(logits, labels, metrics, total, seed, value, distance=False):
    """Differences ``(pairs, 1 + total)`` of each metric: `value` gives the metrics of a run."""
    kept = torch.cat(list(stays(len(labels), total, seed)(7))).bool()
    found = {key: [] for key in metrics}
    for first, second in itertools.combinations(logits, 2):
        drawn = {key: [] for key in metrics}
        for stay in kept:
            both = {key: [] for key in metrics}
            for own, its in zip(first, second, strict=True):
                stay_put = stay.unsqueeze(1)
                one, other = (
                    value(torch.where(stay_put, own, its), labels),
                    value(torch.where(stay_put, its, own), labels),
                )
                for key in metrics:
                    of_two = [abs(v[key]) if distance and key == "signed_gap" else v[key] for v in (one, other)]
                    both[key].append(of_two[0] - of_two[1])
            for key in metrics:
                drawn[key].append(np.mean(both[key]))
        for key in metrics:
            found[key].append(drawn[key])
    return {key: torch.tensor(np.array(rows)) for key, rows in found.items()}


def agree(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key].dtype == torch.float64
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("distance", [False, True])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("classes", "ties"), [(2, True), (2, False), (7, False)])
def test_core_metrics_are_those_of_the_exchanged_rows(classes, ties, seeds, distance):
    logits, labels = runs_of(3, seeds, 60, classes, ties)
    found = differences(tables_of(logits, labels), CORE, 12, 4, distance=distance)
    assert found["nll"].shape == (3, 13)
    agree(found, exchanged_by_hand(logits, labels, CORE, 12, 4, reference, distance))
    if ties:
        ranks = tables_of(logits, labels)[0][0].ranks
        assert len(ranks.unique()) < 20, "most confidences are shared"


@pytest.mark.parametrize("seeds", [1, 3])
def test_other_metrics_are_those_of_the_exchanged_rows(seeds):
    logits, labels = runs_of(3, seeds, 50, 4)
    metrics = ("nll", *OTHERS)

    def of_a_state(run, labels):
        return quiet(state_of(run, labels, metrics=metrics))

    found = differences(tables_of(logits, labels, metrics), metrics, 6, 1)
    agree(found, exchanged_by_hand(logits, labels, metrics, 6, 1, of_a_state))


@pytest.mark.parametrize("kind", ["probs", "confidence", "float32"])
def test_other_inputs(kind):
    logits, labels = runs_of(2, 1, 80, 3)
    (first,), (second,) = logits
    confidence = torch.rand(2, 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states = []
    for run, given in zip((first, second), confidence, strict=True):
        state = EvaluationState(CORE, details=True, input="probs" if kind == "probs" else "logits")
        run = run.softmax(1) if kind == "probs" else run.float() if kind == "float32" else run
        state.update(run, labels, given if kind == "confidence" else None)
        states.append(state)
    one, other = (RowTable.of(state) for state in states)
    found = differences([[one], [other]], CORE, 40, 2)
    drawn = read_weighted(one.joined(other), CORE, exchanges(80, 40, 2))
    agree(found, {key: (values[0::2] - values[1::2]).unsqueeze(0) for key, values in drawn.items()})
    for key, (value,) in ((key, values[:, :1]) for key, values in found.items()):
        assert float(value) == pytest.approx(quiet(states[0])[key] - quiet(states[1])[key], abs=1e-12)


def test_pairs_are_antisymmetric():
    logits, labels = runs_of(3, 2, 70, 5)
    tables = tables_of(logits, labels)
    found, turned = differences(tables, CORE, 20, 0), differences(tables[::-1], CORE, 20, 0)
    # Pairs (0, 1), (0, 2), (1, 2) are (2, 1), (2, 0), (1, 0) of the methods turned round.
    agree(turned, {key: -values[[2, 1, 0]] for key, values in found.items()})


def test_all_pairs_are_exchanged_by_the_same_tosses():
    logits, labels = runs_of(3, 1, 70, 5)
    for key in ("accuracy", "nll", "brier"):
        one, two, three = differences(tables_of(logits, labels), [key], 30, 0)[key]
        torch.testing.assert_close(one + three, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 200, 1500])
def test_pieces_of_any_size_give_the_same(monkeypatch, at_once):
    logits, labels = runs_of(3, 2, 60, 4)
    tables = tables_of(logits, labels, (*CORE, "aurc"))
    expected = differences(tables, (*CORE, "aurc"), 31, 6)
    monkeypatch.setattr(exchange, "_AT_ONCE", at_once)
    agree(differences(tables, (*CORE, "aurc"), 31, 6), expected)


def test_a_method_does_not_differ_from_itself_or_from_one_that_is_right_on_the_same_rows():
    (one, two), labels = runs_of(2, 2, 500, 10)
    tables = tables_of([one, [run / 1.7 for run in one], one, two], labels)
    found = differences(tables, CORE, 99, 0)
    pairs = list(itertools.combinations(range(4), 2))
    for key, values in found.items():
        assert not values[pairs.index((0, 2))].any(), key
        assert values[pairs.index((0, 3))].any(), key
    assert not found["accuracy"][pairs.index((0, 1))].any()
    assert found["nll"][pairs.index((0, 1))].all()
    state = detailed(one[0], labels, metrics=CORE)
    assert set(permutation_test(state, detailed(one[0], labels, metrics=CORE), 50).values()) == {(0.0, 1.0)}


def test_an_infinite_loss_stays_with_the_run_that_has_its_row():
    labels = torch.zeros(20, dtype=torch.int64)
    good = torch.tensor([[0.75, 0.25]], dtype=torch.float64).repeat(20, 1)
    bad = good.clone()
    bad[3] = torch.tensor([0.0, 1.0])
    good, bad = tables_of([[good], [bad]], labels, ("nll", "brier"), input="probs")
    found = differences([good, bad], ["nll", "brier"], 30, 0)
    kept = torch.cat(list(stays(20, 30, 0)(100)))
    assert found["nll"][0].tolist() == [-math.inf if stay else math.inf for stay in kept[:, 3]]
    assert found["brier"].isfinite().all()
    assert differences([bad, bad], ["nll"], 5, 0)["nll"].isnan().all(), "which of two infinite values is larger"


def test_draws_without_wrong_rows_are_undefined():
    labels = torch.zeros(8, dtype=torch.int64)
    logits = torch.zeros(8, 2, dtype=torch.float64)
    logits[:, 0] = torch.linspace(0.5, 4.0, 8)
    first, second = logits.clone(), 2.0 * logits
    first[1] = torch.tensor([0.0, 0.3])
    second[5] = torch.tensor([0.0, 0.7])
    found = differences(tables_of([[first], [second]], labels), ["correctness_auroc"], 40, 0)
    expected = exchanged_by_hand([[first], [second]], labels, ["correctness_auroc"], 40, 0, reference)
    agree(found, expected)
    assert 5 < int(found["correctness_auroc"].isnan().sum()) < 35


def test_p_values_of_accuracy_are_mcnemars():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(120, dtype=torch.int64)
    right = torch.rand(2, 120, generator=generator) < torch.tensor([[0.85], [0.7]])
    first, second = (torch.stack([own.double(), 0.5 * torch.ones(120)], dim=1) for own in right)
    states = [detailed(run.double(), labels, metrics=("accuracy",)) for run in (first, second)]
    value, p_value = permutation_test(*states, 9999, seed=1)["accuracy"]
    won, lost = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    exact = scipy.stats.binomtest(won, won + lost).pvalue
    assert value == pytest.approx((won - lost) / 120, abs=1e-12)
    assert 0.001 < exact < 0.2
    assert p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 9999))


def test_every_metric_has_a_difference():
    logits, labels = runs_of(2, 1, 60, 4)
    found = differences(tables_of(logits, labels, tuple(METRICS)), tuple(METRICS), 3, 0)
    assert tuple(found) == tuple(METRICS)
    assert all(values.shape == (1, 4) for values in found.values())


# --- their own spread


@pytest.mark.parametrize("distance", [False, True])
def test_standard_errors_are_those_of_rows_drawn_again(distance):
    logits, labels = runs_of(3, 2, 60, 4)
    found = standard_errors(tables_of(logits, labels), CORE, 30, 5, distance=distance)
    drawn = {key: [] for key in CORE}
    for weights in torch.cat(list(resamples(60, 30, 5)(30))).long():
        rows = torch.arange(60).repeat_interleave(weights)
        values = [[reference(run[rows], labels[rows]) for run in runs] for runs in logits]
        for key in CORE:
            far = abs if distance and key == "signed_gap" else float
            means = [np.mean([far(one[key]) for one in runs]) for runs in values]
            drawn[key].append([one - other for one, other in itertools.combinations(means, 2)])
    for key in CORE:
        assert found[key].tolist() == pytest.approx(np.std(drawn[key], axis=0), abs=1e-12)


def test_standard_errors_leave_out_resamples_without_wrong_rows():
    labels = torch.zeros(8, dtype=torch.int64)
    logits = torch.stack([torch.linspace(-0.3, 4.0, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)], 1)
    tables = tables_of([[logits], [logits * torch.linspace(2.0, -0.5, 8).unsqueeze(1)]], labels)
    (error,) = standard_errors(tables, ["correctness_auroc"], 50, 0)["correctness_auroc"].tolist()
    assert 0.0 < error < 1.0


def test_a_difference_counts_in_its_own_spread_where_that_is_larger():
    # Under exchanges all have a spread of 1.
    drawn = torch.tensor([[3.0, 1.0, -1.0]] * 5 + [[0.0, 0.0, 0.0], [math.nan, 1.0, 1.0]], dtype=torch.float64)
    errors = torch.tensor([2.0, 0.5, 1.0, math.nan, math.inf, 0.3, 1.0], dtype=torch.float64)
    found = in_own_spread(drawn, errors)
    assert torch.equal(found[:, 1:], drawn[:, 1:])
    assert found[:, 0].tolist() == pytest.approx([1.5, 3.0, 3.0, 3.0, 3.0, 0.0, math.nan], nan_ok=True)
    assert in_own_spread(drawn * math.inf, errors)[0, 0] == math.inf
