import copy
import importlib
import math
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from calib_lightning.metrics import (
    CORE,
    FULL,
    METRICS,
    EvaluationState,
    GroupTable,
    Interval,
    bootstrap_intervals,
    by_class,
    by_frequency,
    over_seeds,
    permutation_test,
)
from calib_lightning.metrics import weights as W
from tests.metrics.golden import golden_set, random_set, reference

# The tempered fits of resamples are read from a table, within 1e-6; all else is the same sums in another order.
FITTED = {"calibration_nll", "refinement_nll"}


def state_of(logits, labels, confidence=None, metrics=FULL, **options):
    state = EvaluationState(metrics, **options)
    for start in range(0, len(labels), 97):
        cut = slice(start, start + 97)
        state.update(logits[cut], labels[cut], None if confidence is None else confidence[cut])
    return state


detailed = partial(state_of, details=True)


def quiet(state):
    """The numbers, without the warnings of undefined ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {key: value.item() for key, value in state.compute().items()}


def agree(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        margin = 2e-6 if key in FITTED else 1e-10
        assert found[key] == pytest.approx(value, abs=margin, rel=1e-10, nan_ok=True), key


def case_of(kind, dtype, classes, ties, n=150):
    """A set, and the options of its states."""
    logits, labels = random_set(n, classes, seed=classes)
    logits = logits.round() if ties else logits
    logits, confidence, options = logits.to(dtype), None, {}
    if kind == "probs":
        logits, options = logits.softmax(1), {"input": "probs"}
    elif kind == "confidence":
        confidence = torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        # Multiples of 1/15 lie on the borders of bins.
        confidence = ((confidence * 15).round() / 15 if ties else confidence).to(dtype)
    return logits, labels, confidence, options


def picked(case, rows):
    logits, labels, confidence, options = case
    rows = torch.as_tensor(rows)
    return state_of(logits[rows], labels[rows], None if confidence is None else confidence[rows], **options)


# --- weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["logits", "probs", "confidence"])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("ties", [False, True])
def test_weights_are_repeated_or_left_out_rows(dtype, kind, classes, ties):
    case = case_of(kind, dtype, classes, ties)
    state = detailed(*case[:3], **case[3])
    n = len(case[1])
    rng = np.random.default_rng(0)
    weights = np.concatenate(
        [
            np.ones((1, n)),
            rng.multinomial(n, np.full(n, 1 / n), size=3),
            rng.integers(0, 4, size=(2, n)),
            rng.random((3, n)) < [[0.5], [0.1], [0.9]],
        ]
    )
    view = W.WeightedView(W.RowTable.of(state), torch.from_numpy(weights).double())
    assert view.count.tolist() == weights.sum(axis=1).tolist()
    values = {key: METRICS[key].value(view) for key in FULL}
    for b, row in enumerate(weights):
        found = {key: value[b].item() for key, value in values.items()}
        agree(found, quiet(picked(case, np.repeat(np.arange(n), row.astype(int)))))
    agree({key: value[0].item() for key, value in values.items()}, quiet(state))


def test_subsets_of_one_row_one_class_only_right_and_only_wrong_rows():
    case = case_of("logits", torch.float64, 10, False)
    state = detailed(*case[:3])
    right = case[0].argmax(1) == case[1]
    one = torch.zeros_like(right)
    one[17] = True
    member = torch.stack([one, case[1] == 4, right, ~right, torch.zeros_like(one)])
    found = W.read_weighted(W.RowTable.of(state), FULL, W.subsets(member))
    for b, rows in enumerate(member):
        agree({key: value[b].item() for key, value in found.items()}, quiet(picked(case, rows)))


def test_an_infinite_loss_stays_in_the_subsets_that_hold_its_row():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [0.25, 0.75]])
    case = probs, torch.tensor([1, 0, 0, 1]), None, {"input": "probs"}
    state = detailed(*case[:3], metrics=("nll", "brier"), input="probs")
    member = torch.tensor([[True] * 4, [False, True, True, True]])
    found = W.read_weighted(W.RowTable.of(state), ("nll", "brier"), W.subsets(member))
    assert found["nll"].tolist() == [math.inf, pytest.approx(-math.log(0.5 * 0.75 * 0.75) / 3)]
    assert found["brier"].tolist() == pytest.approx([(2 + 0.5 + 0.125 + 0.125) / 4, 0.25])
    interval = bootstrap_intervals(state, 50)["nll"]
    assert (interval.value, math.isnan(interval.low), math.isnan(interval.high)) == (math.inf, True, True)
    assert state.compute()["nll"].item() == math.inf


@pytest.mark.parametrize("at_once", [1, 700, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pieces_of_any_size_give_the_same(monkeypatch, at_once, dtype):
    case = case_of("logits", dtype, 10, True)
    table = W.RowTable.of(detailed(*case[:3]))
    weights = W.resamples(150, 37, seed=4)
    expected = W.read_weighted(table, FULL, weights)
    for limit in ("_AT_ONCE", "_AT_ONCE_WITH_SCORES", "_CLASS_BINS_AT_ONCE"):
        monkeypatch.setattr(W, limit, at_once)
    found = W.read_weighted(table, FULL, weights)
    for key in FULL:
        assert found[key].shape == (37,)
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("make", [W.resamples, W.exchanges])
def test_draws_depend_on_the_seed_alone(make):
    whole = [torch.cat(list(make(20, 30, 5)(at_once))) for at_once in (1, 2, 7, 30, 1000)]
    assert all(torch.equal(whole[0], other) for other in whole)
    weights = make(20, 30, 5)
    assert torch.equal(torch.cat(list(weights(4))), torch.cat(list(weights(4)))), "the same ones each time"
    assert not torch.equal(whole[0], torch.cat(list(make(20, 30, 6)(1000))))


def test_resamples_are_multinomial_draws():
    n, total = 40, 6000
    weights = torch.cat(list(W.resamples(n, total, 0)(1000))).numpy()
    assert weights.shape == (total, n)
    assert (weights.sum(axis=1) == n).all()
    assert (weights == weights.round()).all()
    assert (weights >= 0).all()
    # Mean and variance of Binomial(n, 1/n); limits of five standard errors.
    assert weights.mean(axis=0) == pytest.approx(1.0, abs=5 / math.sqrt(total))
    assert weights.var() == pytest.approx(1 - 1 / n, abs=5 * math.sqrt(2 / (total * n)))
    covariance = np.cov(weights.T)[~np.eye(n, dtype=bool)]
    assert covariance.mean() == pytest.approx(-1 / n, abs=1e-3)
    assert (weights == 0).mean() == pytest.approx((1 - 1 / n) ** n, abs=5 * math.sqrt(0.24 / (total * n)))
    assert len(np.unique(weights, axis=0)) == total


def test_exchanges_swap_whole_rows():
    weights = torch.cat(list(W.exchanges(50, 2000, 0)(64))).view(-1, 2, 2, 50)
    assert len(weights) == 2001
    first, second = weights[:, 0], weights[:, 1]
    assert torch.equal(first + second, torch.ones_like(first))
    assert torch.equal(first[:, 0] + first[:, 1], torch.ones(2001, 50, dtype=torch.float64))
    assert torch.equal(first[0, 0], torch.ones(50, dtype=torch.float64))
    assert first[1:, 0].mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2000 * 50))


# --- intervals


OTHERS = ("ks", "debiased_l2", "aurc", "corp_miscalibration", "corp_discrimination")


def repeats(n, total, seed):
    for row in torch.cat(list(W.resamples(n, total, seed)(1000))).long().numpy():
        yield np.repeat(np.arange(n), row)


@pytest.fixture(scope="module")
def drawn():
    """The golden set, and the figures of 60 resamples of it by plain numpy (and of the states for what has none)."""
    logits, labels = golden_set()
    draws = [torch.from_numpy(rows) for rows in repeats(500, 60, 9)]
    figures = [reference(logits[rows], labels[rows]) for rows in draws]
    others = [quiet(state_of(logits[r], labels[r], metrics=OTHERS)) for r in draws]
    state = detailed(logits, labels)
    table = {key: np.array([row[key] for row in figures]) for key in figures[0]}
    table |= {key: np.array([row[key] for row in others]) for key in others[0]}
    return SimpleNamespace(
        state=state, table=table, value=quiet(state), intervals=bootstrap_intervals(state, 60, seed=9)
    )


@pytest.mark.parametrize("key", ["accuracy", "nll", "brier", "signed_gap", "correctness_auroc", "aurc"])
def test_percentile_intervals(drawn, key):
    assert METRICS[key].interval == "percentile"
    low, high = np.percentile(drawn.table[key], [2.5, 97.5])
    assert drawn.intervals[key] == pytest.approx((drawn.value[key], low, high), abs=1e-10)


@pytest.mark.parametrize("key", ["corp_miscalibration", "corp_discrimination"])
def test_basic_intervals(drawn, key):
    assert METRICS[key].interval == "basic"
    low, high = np.percentile(drawn.table[key], [2.5, 97.5])
    value = drawn.value[key]
    assert drawn.intervals[key] == pytest.approx((value, max(0, 2 * value - high), 2 * value - low), abs=1e-10)


@pytest.mark.parametrize("key", ["ece", "ks", "debiased_l2"])
def test_hull_intervals(drawn, key):
    assert METRICS[key].interval == "hull"
    figures, value = drawn.table[key], drawn.value[key]
    low, high = np.percentile(figures, [2.5, 97.5])
    below, above = high - figures.mean(), figures.mean() - low
    bias = figures.mean() - value
    # Around the figure as it is, and the same turned over around the figure less its bias.
    low, high = min(value - above, value - bias - below), max(value + below, value - bias + above)
    assert drawn.intervals[key] == pytest.approx((value, max(0, low), high), abs=1e-10)
    assert low < value < high


def test_intervals_of_a_seed_are_the_same_again():
    state = detailed(*golden_set())
    first = bootstrap_intervals(state, 30, seed=2)
    assert tuple(first) == FULL
    assert all(isinstance(interval, Interval) for interval in first.values())
    again = bootstrap_intervals(state, 30, seed=2)
    assert first == again
    assert bootstrap_intervals(state, 30, seed=3)["nll"] != first["nll"]
    assert bootstrap_intervals(state, 31, seed=2)["nll"] != first["nll"]


def test_a_lower_level_gives_narrower_intervals_and_none_leaves_the_possible_values():
    state = detailed(*random_set(120, 5))
    wide, narrow = (bootstrap_intervals(state, 60, level=level) for level in (0.95, 0.5))
    for key, (value, low, high) in wide.items():
        row = METRICS[key]
        assert value == narrow[key].value
        assert row.low <= low <= narrow[key].low <= narrow[key].high <= high <= row.high, key
        if key != "top5_accuracy":  # 1 with five classes
            assert high - low > narrow[key].high - narrow[key].low, key


@pytest.mark.filterwarnings("error")
def test_ends_of_basic_intervals_are_cut_to_the_possible_values():
    # Calibrated rows: by chance alone the error is above zero, and what is taken off is more than there is.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    state = detailed(logits, labels, metrics=("ks", "murphy_reliability"))
    found = bootstrap_intervals(state, 100)
    assert found["murphy_reliability"].low == 0.0
    assert found["ks"].low == 0.0
    assert found["ks"].high > 0.0


def test_undefined_figures_have_no_ends():
    logits, _ = random_set(40, 4)
    state = detailed(logits, logits.argmax(1))
    with pytest.warns(UserWarning, match="all 40 rows are correct") as caught:
        found = bootstrap_intervals(state, 20)
    assert len(caught) == 1
    undefined = {key for key, value in quiet(state).items() if math.isnan(value)}
    assert {"correctness_auroc", "aupr_error", "fpr95"} <= undefined < set(FULL)
    for key, interval in found.items():
        assert [math.isnan(number) for number in interval] == [key in undefined] * 3, key
    assert found["accuracy"] == (1.0, 1.0, 1.0)


def test_resamples_without_a_wrong_row_are_left_out():
    logits, labels = random_set(30, 3)
    labels = logits.argmax(1)
    labels[3] = (labels[3] + 1) % 3
    state = detailed(logits, labels, metrics=("correctness_auroc",))
    figures = np.array(
        [quiet(state_of(logits[r], labels[r], metrics=state.metrics))["correctness_auroc"] for r in repeats(30, 50, 0)]
    )
    assert 5 < np.isnan(figures).sum() < 45
    found = bootstrap_intervals(state, 50)["correctness_auroc"]
    assert found[1:] == pytest.approx(np.nanpercentile(figures, [2.5, 97.5]), abs=1e-12)


def test_one_row():
    state = detailed(torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([0]))
    with pytest.warns(UserWarning, match="all 1 rows are correct"):
        found = bootstrap_intervals(state, 5)
    values = quiet(state)
    for key, (value, low, high) in found.items():
        assert value == pytest.approx(values[key], nan_ok=True)
        # Each resample is the row itself.
        expected = value if math.isnan(value) else min(max(value, METRICS[key].low), METRICS[key].high)
        assert (low, high) == pytest.approx((expected, expected), abs=2e-6, nan_ok=True), key


@pytest.mark.parametrize("updates", [0, 1])
def test_no_rows(updates):
    state = EvaluationState(FULL, details=True)
    for _ in range(updates):
        state.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.warns(UserWarning, match="no rows|before the ``update``") as caught:
        found = bootstrap_intervals(state, 5)
    assert len(caught) == 1
    assert tuple(found) == FULL
    assert all(math.isnan(number) for interval in found.values() for number in interval)
    groups = by_class(state)
    assert groups.names == (("0", "1", "2") if updates else ())
    assert all(values.isnan().all() for values in groups.values.values())
    assert groups.rows.tolist() == [0, 0, 0][: len(groups.names)]
    assert groups.worst("ece")[0] == ""
    other = permutation_test(state, state, 5)
    assert all(math.isnan(number) for difference in other.values() for number in difference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_resamples": 1}, "n_resamples is 1; it must be an integer >= 2"),
        ({"n_resamples": 10.0}, "n_resamples is 10.0"),
        ({"n_resamples": True}, "n_resamples is True"),
        ({"level": 0.0}, "level is 0.0; it must be between 0 and 1"),
        ({"level": 1.0}, "level is 1.0"),
        ({"level": 95}, "level is 95"),
        ({"level": math.nan}, "level is nan"),
    ],
)
def test_arguments_of_intervals_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_intervals(detailed(*random_set(10, 3)), **options)


@pytest.mark.parametrize("call", [bootstrap_intervals, by_class, lambda state: permutation_test(state, state)])
def test_a_state_without_rows_is_refused(call):
    with pytest.raises(ValueError, match="details is False; it must be True"):
        call(state_of(*random_set(10, 3)))


def test_what_needs_scores_says_so():
    state = detailed(*random_set(10, 3), metrics=CORE)
    with pytest.raises(ValueError, match="keeps no scores of all classes"):
        W.read_weighted(W.RowTable.of(state), ("classwise_ece",), W.resamples(10, 2, 0))


def test_the_state_is_left_as_it_was():
    logits, labels = random_set(60, 4)
    state = detailed(logits[:40], labels[:40])
    before = copy.deepcopy(state.metric_state)
    bootstrap_intervals(state, 5)
    by_class(state)
    permutation_test(state, state, 5)
    for name, held in state.metric_state.items():
        kept = before[name]
        assert len(held) == len(kept) if isinstance(held, list) else torch.equal(held, kept)
        if isinstance(held, list):
            assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
    state.update(logits[40:], labels[40:])
    assert quiet(state) == pytest.approx(quiet(state_of(logits, labels)), abs=1e-12)


def on_each_process(rank, world):
    """Intervals and groups of a process that holds a share of the rows, and what is left in its state."""
    logits, labels = random_set(90, 5)
    share = (slice(0, 50), slice(50, 90))[rank]
    state = detailed(logits[share], labels[share])
    found = bootstrap_intervals(state, 20)
    groups = by_class(state)
    left = int(state.count), sum(len(rows) for rows in state.rank_scores)
    other = permutation_test(state, detailed(logits[share].roll(1, 1), labels[share]), 10)
    return found, {key: values.tolist() for key, values in groups.values.items()}, left, other


def test_all_processes_find_the_intervals_of_all_rows(pool2):
    state = detailed(*random_set(90, 5))
    whole, groups = bootstrap_intervals(state, 20), by_class(state)
    logits, labels = random_set(90, 5)
    differences = permutation_test(state, detailed(logits.roll(1, 1), labels), 10)
    results = pool2.run(on_each_process)
    assert repr(results[0][:2]) == repr(results[1][:2])
    for rank, (found, by_group, left, other) in enumerate(results):
        assert left == ((50, 50), (40, 40))[rank]
        for key in FULL:
            assert found[key] == pytest.approx(whole[key], abs=1e-12, nan_ok=True)
            assert by_group[key] == pytest.approx(groups.values[key].tolist(), abs=1e-12, nan_ok=True)
            assert other[key] == pytest.approx(differences[key], abs=1e-12, nan_ok=True)


# --- groups


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["logits", "probs", "confidence"])
def test_groups_are_the_rows_picked_by_hand(dtype, kind):
    case = case_of(kind, dtype, 6, False, n=200)
    labels = case[1].clone()
    labels[labels == 3] = 2
    case = (case[0], labels, *case[2:])
    state = detailed(*case[:3], **case[3])
    groups = by_class(state)
    assert groups.names == ("0", "1", "2", "3", "4", "5")
    assert groups.rows.tolist() == torch.bincount(labels, minlength=6).tolist()
    for label in range(6):
        found = {key: values[label].item() for key, values in groups.values.items()}
        agree(found, quiet(picked(case, labels == label)))
        assert all(map(math.isnan, found.values())) == (label == 3)
    counts = torch.tensor([101, 100, 20, 500, 19, 0])
    groups = by_frequency(state, counts)
    assert groups.names == ("many", "medium", "few")
    for index, members in enumerate([(0, 3), (1, 2), (4, 5)]):
        rows = torch.isin(labels, torch.tensor(members))
        assert int(groups.rows[index]) == int(rows.sum())
        agree({key: values[index].item() for key, values in groups.values.items()}, quiet(picked(case, rows)))


def test_borders_of_the_frequency_groups_can_be_set():
    logits, labels = random_set(60, 3)
    state = detailed(logits, labels, metrics=("accuracy",))
    sizes = torch.bincount(labels, minlength=3).tolist()
    counts = torch.tensor([50, 30, 10])
    assert by_frequency(state, counts).rows.tolist() == [0, sizes[0] + sizes[1], sizes[2]]
    assert by_frequency(state, counts, many=30, few=30).rows.tolist() == [sizes[0], sizes[1], sizes[2]]
    assert by_frequency(state, counts, many=29, few=10).rows.tolist() == [sizes[0] + sizes[1], sizes[2], 0]


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        (
            torch.tensor([1, 2]),
            {},
            r"train_counts is torch.int64 of shape \(2,\); it must be 3 integers >= 0, one per class",
        ),
        (torch.tensor([1, -2, 3]), {}, "train_counts .* must be 3 integers >= 0"),
        (torch.tensor([1.0, 2.0, 3.0]), {}, "train_counts is torch.float32 .* must be 3 integers"),
        (torch.ones(3, 1, dtype=torch.int64), {}, "train_counts .* must be 3 integers"),
        (torch.tensor([1, 2, 3]), {"many": 5, "few": 6}, "few is 6 and many is 5; they must satisfy 0 <= few <= many"),
        (torch.tensor([1, 2, 3]), {"few": -1}, "few is -1"),
    ],
)
def test_train_counts_that_are_refused(counts, options, message):
    with pytest.raises(ValueError, match=message):
        by_frequency(detailed(*random_set(20, 3), metrics=CORE), counts, **options)


def test_worst_group():
    nan = math.nan
    values = {
        "accuracy": torch.tensor([0.5, nan, 0.3, 0.9]),
        "ece": torch.tensor([0.1, nan, 0.2, 0.3]),
        "signed_gap": torch.tensor([0.1, nan, -0.4, 0.3]),
        "entropy": torch.tensor([0.1, nan, 0.4, 0.3]),
        "nll": torch.full((4,), nan),
    }
    groups = GroupTable(("a", "b", "c", "d"), torch.tensor([5, 0, 5, 5]), values)
    assert groups.worst("accuracy") == ("c", pytest.approx(0.3))
    assert groups.worst("ece") == ("d", pytest.approx(0.3))
    assert groups.worst("signed_gap") == ("c", pytest.approx(-0.4))
    name, value = groups.worst("nll")
    assert name == ""
    assert math.isnan(value)
    for key in ("entropy", "brier", "exactness"):
        with pytest.raises(ValueError, match=rf"'{key}'; it must be one of accuracy, ece, signed_gap, nll\.$"):
            groups.worst(key)


# --- two runs


def two_runs(n, classes, seed, noise=(1.0, 1.0), scale=2.0):
    """Logits of two runs that see the same signal, each with its own noise."""
    generator = torch.Generator().manual_seed(seed)
    signal = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(signal.softmax(1), 1, generator=generator).squeeze(1)
    first, second = (
        signal + share * torch.randn(n, classes, generator=generator, dtype=torch.float64) for share in noise
    )
    return first, second, labels


def test_a_run_does_not_differ_from_itself():
    logits, labels = random_set(80, 4)
    found = permutation_test(detailed(logits, labels), detailed(logits, labels), 50)
    assert tuple(found) == FULL
    assert all(difference == (0.0, 1.0) for difference in found.values())


def test_a_better_run_is_told_apart_and_the_test_has_two_sides():
    good, bad, labels = two_runs(400, 5, 0, noise=(0.1, 3.0))
    one, other = detailed(good, labels), detailed(bad, labels)
    found, turned = permutation_test(one, other, 199), permutation_test(other, one, 199)
    ours, theirs = quiet(one), quiet(other)
    for key, (value, p_value) in found.items():
        margin = 2e-6 if key in FITTED else 1e-10
        assert value == pytest.approx(ours[key] - theirs[key], abs=margin)
        assert turned[key] == pytest.approx((-value, p_value), abs=margin)
    for key in ("accuracy", "nll", "brier", "ece", "signed_gap", "aurc", "classwise_ece", "ovo_auroc"):
        assert found[key].p_value == 1 / 200
    assert permutation_test(one, other, 199, seed=1) != found
    assert permutation_test(one, other, 199) == found


def test_p_values_are_those_of_all_exchanges():
    first, second, labels = two_runs(10, 3, 5, noise=(0.3, 1.5))
    one, other = detailed(first, labels, metrics=CORE), detailed(second, labels, metrics=CORE)
    found = permutation_test(one, other, 6000, seed=3)
    tables = W.RowTable.of(one), W.RowTable.of(other)
    for key, column in {"accuracy": "correct", "nll": "nll", "brier": "brier"}.items():
        exact = scipy.stats.permutation_test(
            [table.columns[column].double().numpy() for table in tables],
            lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        assert found[key].value == pytest.approx(exact.statistic, abs=1e-12)
        assert found[key].p_value == pytest.approx(exact.pvalue, abs=5 * math.sqrt(0.25 / 6000))
        assert 0.01 < exact.pvalue < 1.0 or key == "accuracy"


def test_p_values_of_runs_that_do_not_differ_are_uniform():
    keys = ("nll", "brier", "ece", "correctness_auroc", "aurc")
    sets = 200
    p_values = {key: [] for key in keys}
    for seed in range(sets):
        first, second, labels = two_runs(40, 4, 100 + seed)
        one, other = (detailed(logits, labels, metrics=keys) for logits in (first, second))
        for key, difference in permutation_test(one, other, 99, seed=seed).items():
            p_values[key].append(difference.p_value)
    # Three standard errors of a share of 0.1 among 200 are 6.4 %, of 0.5 they are 10.6 %.
    for key in keys:
        found = np.array(p_values[key])
        assert 0.04 <= (found <= 0.1).mean() <= 0.17, key
        assert 0.39 <= (found <= 0.5).mean() <= 0.61, key


def test_only_exchanges_that_are_defined_are_counted():
    # Three rows: of eight exchanges two leave one of the runs without a wrong row, so without an AUROC.
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0, 0])
    second = torch.tensor([[0.0, 2.0], [0.5, 0.0], [0.0, 1.0]], dtype=torch.float64)
    states = [detailed(rows, labels, metrics=("correctness_auroc",)) for rows in (logits, second)]
    value, p_value = permutation_test(*states, 4000)["correctness_auroc"]
    table, defined = W.RowTable.of(states[0]).joined(W.RowTable.of(states[1])), []
    for code in range(8):
        stays = torch.tensor([float(code >> i & 1) for i in range(3)], dtype=torch.float64)
        kept = torch.cat([stays, 1 - stays])
        view = W.WeightedView(table, torch.stack([kept, 1 - kept]))
        defined.append(float(view.auroc[0] - view.auroc[1]))
    defined = [d for d in defined if not math.isnan(d)]
    assert 0 < len(defined) < 8
    expected = np.mean([abs(d) >= abs(value) for d in defined])
    assert p_value == pytest.approx(expected, abs=0.04)


def test_runs_with_other_metrics_are_compared_by_those_they_share():
    first, second, labels = two_runs(50, 4, 0)
    wide, narrow = detailed(first, labels), detailed(second, labels, metrics=("nll", "ece"))
    found = permutation_test(wide, narrow, 20)
    assert tuple(found) == ("nll", "ece")
    assert tuple(permutation_test(narrow, wide, 20)) == ("nll", "ece")
    both = permutation_test(wide, detailed(second, labels), 20)
    assert all(found[key] == pytest.approx(both[key], abs=1e-12) for key in found)


def test_runs_that_are_refused():
    first, second, labels = two_runs(30, 4, 0)
    one = detailed(first, labels, metrics=CORE)
    with pytest.raises(ValueError, match=r"30 and 29 rows, .* same samples in the same order"):
        permutation_test(one, detailed(second[:29], labels[:29], metrics=CORE))
    with pytest.raises(ValueError, match="or different labels"):
        permutation_test(one, detailed(second, labels.roll(1), metrics=CORE))
    with pytest.raises(ValueError, match=r"n_bins and input are \(15, 'logits'\) and \(10, 'logits'\)"):
        permutation_test(one, detailed(second, labels, metrics=CORE, n_bins=10))
    with pytest.raises(ValueError, match="n_bins and input are"):
        permutation_test(one, detailed(second.softmax(1), labels, metrics=CORE, input="probs"))
    with pytest.raises(ValueError, match="4 and 6 classes; the number must be the same"):
        permutation_test(one, detailed(torch.cat([second, second[:, :2]], 1), labels, metrics=CORE))
    for count in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"n_permutations is {count}"):
            permutation_test(one, one, count)


# --- over seeds


def test_over_seeds_is_students_interval():
    values = [0.93, 0.941, 0.925, 0.95]
    found = over_seeds(iter(values), level=0.9)
    low, high = scipy.stats.t.interval(0.9, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert found == pytest.approx((np.mean(values), np.std(values, ddof=1), low, high, 4), abs=1e-14)
    assert str(found) == "0.9365 ± 0.0112 (4 runs)"
    default = scipy.stats.t.interval(0.95, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert over_seeds(values)[2:4] == pytest.approx(default, abs=1e-14)
    tensors = [torch.tensor(value, dtype=torch.float64) for value in values]
    assert over_seeds(tensors) == over_seeds(values)


def test_over_seeds_of_one_run_of_equal_runs_and_of_a_failed_run():
    single = over_seeds([0.5])
    assert (single.mean, single.runs) == (0.5, 1)
    assert all(map(math.isnan, single[1:4]))
    assert over_seeds([0.25, 0.25]) == (0.25, 0.0, 0.25, 0.25, 2)
    failed = over_seeds([0.5, math.nan, 0.6])
    assert all(map(math.isnan, failed[:4]))
    assert failed.runs == 3


def test_over_seeds_refusals():
    with pytest.raises(ValueError, match="values is empty; it must hold"):
        over_seeds([])
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match=f"level is {level}"):
            over_seeds([0.1, 0.2], level)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_resamples_use_the_bins_of_the_figure(dtype):
    # Confidences on the edges of bins: which bin they belong to depends on the dtype that they had.
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 4, generator=generator), torch.randint(4, (300,), generator=generator)
    confidence = (torch.randint(0, 11, (300,), generator=generator) / 10).to(dtype)
    state = EvaluationState(["ece", "mce"], n_bins=10, details=True)
    state.update(logits[:100], labels[:100], confidence[:100])
    state.update(logits[100:], labels[100:], confidence[100:].double() if dtype == torch.float32 else confidence[100:])
    whole = W.read_weighted(W.RowTable.of(state), state.metrics, W.subsets(torch.ones(1, 300, dtype=torch.bool)))
    for key, value in state.compute().items():
        assert whole[key].item() == pytest.approx(value.item(), abs=1e-12)


def test_tables_of_groups_have_the_path_of_before_too():
    assert importlib.import_module("calib_lightning.metrics.resampling").GroupTable is GroupTable
