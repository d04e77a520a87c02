"""`compare` with predictions in memory: values, tests and marks against numpy, scipy and cases done by hand."""

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats

from calib_lightning import compare
from calib_lightning.comparison.tables import Method
from tests.comparison.networks import LABELS, accuracies, gaps, losses, network, networks

GOOD, EQUAL, BAD = Method("good"), Method("equal"), Method("bad")


@pytest.fixture(scope="module")
def given():
    """Two methods that err equally often on other rows, and one that errs three times as often."""
    return {
        "good": networks([20, 24, 22], seed=10),
        "equal": networks([22, 21, 24], seed=20),
        "bad": networks([70, 74, 78], seed=30),
    }


@pytest.fixture(scope="module")
def report(given):
    return compare(given, metrics="accuracy,nll,signed_gap", baseline="good")


@pytest.fixture(scope="module")
def table(report):
    (only,) = report.tables
    return only


def _rows(grid):
    """The cells of a grid by method and title of the column."""
    return {row[0]: dict(zip(grid.header, row, strict=False)) for row in grid.rows}


def test_means_and_spreads(given, table):
    by_hand = {"accuracy": accuracies, "nll": losses, "signed_gap": gaps}
    for metric, values_of in by_hand.items():
        for method, pairs in given.items():
            values, runs = values_of(pairs), table.methods[Method(method)]
            assert [found[metric] for found in runs.values.values()] == pytest.approx(values, abs=1e-12)
            spread = runs.spreads[metric]
            assert (spread.mean, spread.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-12)
            assert spread.runs == 3
            assert list(runs.values) == ["0", "1", "2"]


def test_the_best(given, table):
    accuracy = {method: np.mean(accuracies(pairs)) for method, pairs in given.items()}
    assert table.best("accuracy") == Method(max(accuracy, key=accuracy.get))
    nll = {method: np.mean(losses(pairs)) for method, pairs in given.items()}
    assert table.best("nll") == Method(min(nll, key=nll.get))


@pytest.mark.parametrize(("metric", "values_of"), [("accuracy", accuracies), ("nll", losses)])
def test_new_seeds_are_welchs_test_and_holms_adjustment(given, table, metric, values_of):
    tests = {
        both: scipy.stats.ttest_ind(*(values_of(given[name]) for name in both), equal_var=False)
        for both in itertools.combinations(given, 2)
    }
    p_values = sorted(test.pvalue for test in tests.values())
    smallest = min(1.0, 3 * p_values[0])
    second = max(smallest, min(1.0, 2 * p_values[1]))
    by_holm = dict(zip(p_values, [smallest, second, max(second, p_values[2])], strict=True))
    for (first, other), test in tests.items():
        pair = table.pair(metric, Method(first), Method(other))
        interval = test.confidence_interval(0.95)
        value = np.mean(values_of(given[first])) - np.mean(values_of(given[other]))
        assert pair.methods == pytest.approx((value, interval.low, interval.high, test.pvalue, test.df), rel=1e-9)
        assert pair.methods_adjusted == pytest.approx(by_holm[test.pvalue], rel=1e-9)
        turned = table.pair(metric, Method(other), Method(first))
        assert turned.methods == pytest.approx((-value, -interval.high, -interval.low, test.pvalue, test.df), rel=1e-9)
        assert turned.networks.value == pytest.approx(-value)


def test_these_networks_are_an_exchange_of_rows_all_seeds_together(given, table):
    random = np.random.default_rng(7)
    kept = random.integers(0, 2, (20_000, len(LABELS))).astype(float)
    drawn = {}
    for both in itertools.combinations(given, 2):
        right = [[(logits.argmax(1) == LABELS).astype(float) for logits, _ in given[name].values()] for name in both]
        block = np.mean([one - other for one, other in zip(*right, strict=True)], axis=0)
        drawn[both] = block.mean(), ((2 * kept - 1) @ block) / len(LABELS)
    scaled = {both: (abs(value), abs(tossed), tossed.std()) for both, (value, tossed) in drawn.items()}
    for both, (value, tossed, std) in scaled.items():
        pair = table.pair("accuracy", *map(Method, both))
        raw = (tossed >= value - 1e-12).mean()
        assert pair.networks.value == pytest.approx(drawn[both][0], abs=1e-12)
        assert pair.networks.p_value == pytest.approx(raw, abs=0.05)
        # Stepping down: the largest statistic of this pair and those that differ less.
        after = [other for other, found in scaled.items() if found[0] / found[2] <= value / std]
        largest = np.max([scaled[other][1] / scaled[other][2] for other in after], axis=0)
        assert pair.networks_adjusted == pytest.approx((largest >= value / std - 1e-12).mean(), abs=0.05)


def test_only_a_clear_difference_is_marked(report, table):
    best = table.best("accuracy")
    like = EQUAL if best == GOOD else GOOD
    assert table.is_worse("accuracy", BAD, best, 0.05)
    assert not table.is_worse("accuracy", like, best, 0.05)
    assert not table.is_worse("accuracy", best, BAD, 0.05)
    cells = {method: row["accuracy % ↑"] for method, row in _rows(next(report.grids())).items()}
    assert cells[str(best)].startswith("**")
    assert "≈" in cells[str(like)]
    assert "≈" not in cells["bad"]
    assert cells["bad"].endswith("‡")


def test_marks_against_the_baseline(given):
    report = compare(given, metrics="accuracy", baseline="equal")
    means = {method: np.mean(accuracies(pairs)) for method, pairs in given.items()}
    cells = {method: row["accuracy % ↑"] for method, row in _rows(next(report.grids())).items()}
    assert means["equal"] < means["good"]
    assert not cells["good"].strip("*").endswith(("†", "‡"))
    assert not cells["equal"].endswith(("†", "‡"))
    assert cells["bad"].endswith("‡")
    below = compare(given, metrics="accuracy", baseline="good")
    cells = {method: row["accuracy % ↑"] for method, row in _rows(next(below.grids())).items()}
    assert cells["equal"].endswith("≈ †")
    assert "† mean worse than that of good; ‡ significantly worse." in list(below.remarks())


def test_a_wide_spread_over_seeds_is_not_marked():
    wild = {"good": networks([20, 22, 21], seed=1), "wild": networks([25, 160, 40], seed=2)}
    report = compare(wild, metrics="accuracy")
    (table,) = report.tables
    pair = table.pair("accuracy", Method("wild"), GOOD)
    welch = scipy.stats.ttest_ind(*map(accuracies, wild.values()), equal_var=False)
    assert pair.networks_adjusted < 0.01
    assert pair.methods_adjusted == pytest.approx(welch.pvalue)
    assert welch.pvalue > 0.05
    assert not table.is_worse("accuracy", Method("wild"), GOOD, 0.05)
    assert "≈" in _rows(next(report.grids()))["wild"]["accuracy % ↑"]


def test_seeds_that_hide_no_difference_in_the_rows_are_not_marked():
    """A tiny difference that each seed repeats: the methods on new seeds differ, these networks may by chance."""
    steady = {}
    for name, wrong in (("good", 20), ("near", 24)):
        steady[name] = {
            seed: (network(wrong + (seed == 2), seed=99 if name == "good" else 98), LABELS) for seed in range(3)
        }
    (table,) = compare(steady, metrics="accuracy").tables
    pair = table.pair("accuracy", Method("near"), GOOD)
    assert pair.methods_adjusted < 0.05
    assert pair.networks_adjusted > 0.05
    assert not table.is_worse("accuracy", Method("near"), GOOD, 0.05)


def test_two_seeds_have_no_marks_but_a_note():
    report = compare({"good": networks([20, 21], seed=1), "bad": networks([80, 81], seed=2)}, metrics="accuracy")
    (table,) = report.tables
    pair = table.pair("accuracy", BAD, GOOD)
    assert pair.networks_adjusted < 0.01
    assert math.isnan(pair.methods_adjusted)
    cells = _rows(next(report.grids()))
    assert not any(mark in str(cells) for mark in ("≈", "†", "‡"))
    assert any("≈ and ‡ need 3 seeds of each method" in line for line in report.remarks())


def test_two_seeds_have_one_short_table_of_differences():
    sets = {"good": networks([20, 21], seed=1), "bad": networks([80, 81], seed=2)}
    _, short = compare(sets, metrics="accuracy", baseline="bad").grids()
    assert (short.title, short.header) == (
        "test: differences from bad",
        ["method", "difference", "p networks", "p networks adj."],
    )
    assert [len(row) for row in short.rows] == [1, 4]
    more = {"good": networks([20, 21, 22], seed=1), "bad": networks([80, 81, 82], seed=2)}
    _, *long = compare(more, metrics="accuracy", baseline="bad").grids()
    assert [len(grid.header) for grid in long] == [8, 8]


def test_one_method_has_nothing_to_compare_with():
    report = compare({"good": networks([20, 21, 22], seed=1)}, metrics="accuracy")
    assert report.tables[0].pairs == {}
    assert report.tables[0].best("accuracy") == GOOD
    assert "good" in report.to_markdown()


def test_what_is_best_at_0_counts_by_its_distance():
    sets = {
        "over": networks([60, 62, 64], margin=5.0, seed=1),
        "near": networks([40, 42, 41], margin=3.3, seed=2),
        "under": networks([10, 12, 11], margin=1.0, seed=3),
    }
    report = compare(sets, metrics="signed_gap", baseline="near")
    (table,) = report.tables
    values = {method: np.array(gaps(pairs)) for method, pairs in sets.items()}
    assert values["over"].min() > 0.1
    assert values["under"].max() < -0.2
    assert table.best("signed_gap") == Method("near")
    assert all(table.is_worse("signed_gap", Method(name), Method("near"), 0.05) for name in ("over", "under"))
    pair = table.pair("signed_gap", Method("over"), Method("under"))
    by_distance = [np.abs(values[name]) for name in ("over", "under")]
    assert pair.networks.value == pytest.approx(by_distance[0].mean() - by_distance[1].mean())
    assert pair.methods.p_value == pytest.approx(scipy.stats.ttest_ind(*by_distance, equal_var=False).pvalue)
    assert any("compared by the mean over seeds of its distance from 0" in line for line in report.remarks())


def test_json_has_all_pairs_and_every_seed(given, report, table):
    content = json.loads(report.to_json())
    (found,) = content["tables"]
    assert content["baseline"] == "good"
    assert content["settings"]["alpha"] == 0.05
    assert {entry["method"]: entry["seeds"]["1"]["accuracy"] for entry in found["methods"]} == {
        method: pytest.approx(accuracies(pairs)[1]) for method, pairs in given.items()
    }
    assert found["best"]["accuracy"] == str(table.best("accuracy"))
    assert set(found["pairs"]) == {"accuracy", "nll", "signed_gap"}
    for metric, values_of in (("accuracy", accuracies), ("nll", losses)):
        pairs = found["pairs"][metric]
        assert [(pair["first"], pair["second"]) for pair in pairs] == list(itertools.combinations(given, 2))
        for pair in pairs:
            one, other = (values_of(given[pair[name]]) for name in ("first", "second"))
            assert pair["difference"] == pytest.approx(np.mean(one) - np.mean(other))
            assert pair["new_seeds"]["p_value"] == pytest.approx(
                scipy.stats.ttest_ind(one, other, equal_var=False).pvalue
            )
            assert pair["these_networks"]["adjusted"] >= pair["these_networks"]["p_value"]
            assert pair["new_seeds"]["adjusted"] >= pair["new_seeds"]["p_value"]
            assert pair["marked"] == ("bad" in (pair["first"], pair["second"]))


def test_csv_comes_back(given, report):
    rows = {(row["method"], row["metric"]): row for row in csv.DictReader(io.StringIO(report.to_csv()))}
    assert len(rows) == 9
    for method, pairs in given.items():
        row, values = rows[method, "nll"], losses(pairs)
        assert (float(row["mean"]), float(row["std"])) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert [float(row[f"seed {seed}"]) for seed in range(3)] == pytest.approx(values)
        assert (row["rows"], row["seeds"], row["set"]) == ("400", "3", "test")
    assert [name for name in given if rows[name, "accuracy"]["worse_than_best"] == "true"] == ["bad"]
    assert [name for name in given if rows[name, "accuracy"]["worse_than_baseline"] == "true"] == ["bad"]
    assert sum(rows[name, "accuracy"]["best"] == "true" for name in given) == 1


def test_markdown_latex_and_terminal_have_the_figures(given, report):
    values = np.array(accuracies(given["bad"]))
    mean, std = f"{100 * values.mean():.2f}", f"{100 * values.std(ddof=1):.2f}"
    assert f"{mean} ± {std} ‡ |" in report.to_markdown()
    assert f"{mean} ± {std} ‡" in report.table()
    assert rf"{mean} $\pm$ {std} $^{{\ddagger}}$" in report.to_latex()
    best = np.mean(accuracies(given["good"]))
    assert f"**{100 * best:.2f} ± " in report.to_markdown()
    assert rf"\textbf{{{100 * best:.2f} $\pm$" in report.to_latex()
    assert "**" not in report.table()


def test_intervals_over_rows(given):
    report = compare(given, metrics="accuracy", intervals=500)
    for method, pairs in given.items():
        interval = report.tables[0].methods[Method(method)].intervals["accuracy"]
        right = np.mean([(logits.argmax(1) == LABELS) for logits, _ in pairs.values()], axis=0)
        error = right.std(ddof=1) / math.sqrt(len(LABELS))
        assert interval.low < right.mean() < interval.high
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    text = report.to_markdown()
    assert "95 % bootstrap intervals of the means, over 400 rows" in text
    assert "500 resamples of the rows" in text
    entry = json.loads(report.to_json())["tables"][0]["methods"][0]
    assert entry["intervals"]["accuracy"][0] < entry["spreads"]["accuracy"]["mean"]


def test_other_test_rows_are_a_table_of_their_own(given):
    other = np.roll(LABELS, 1)
    report = compare(given | {"elsewhere": networks([20, 21, 22], labels=other)}, metrics="accuracy")
    assert [list(map(str, table.methods)) for table in report.tables] == [["good", "equal", "bad"], ["elsewhere"]]
    assert any("the test rows differ, hence separate tables" in line for line in report.remarks())


def test_other_classes_are_a_table_of_their_own(given):
    five = {seed: (network(20, seed=seed, classes=5), LABELS) for seed in range(3)}
    report = compare(given | {"five": five}, metrics="accuracy")
    assert [table.classes for table in report.tables] == [4, 5]


def test_other_numbers_of_seeds_are_said(given):
    report = compare({"good": given["good"], "bad": networks([70, 74, 78, 90, 75], seed=30)}, metrics="accuracy")
    (table,) = report.tables
    assert any(
        "different numbers of seeds (good 3, bad 5): rows are exchanged between 3 of each" in line
        for line in report.remarks()
    )
    pair = table.pair("accuracy", GOOD, BAD)
    five = accuracies(networks([70, 74, 78, 90, 75], seed=30))
    assert pair.networks.value == pytest.approx(np.mean(accuracies(given["good"])) - np.mean(five[:3]))
    assert pair.methods.value == pytest.approx(np.mean(accuracies(given["good"])) - np.mean(five))
    assert table.is_worse("accuracy", BAD, GOOD, 0.05)


def test_sets_are_pairs_lists_or_by_seed(given, tmp_path):
    first = given["good"][0]
    np.savez(tmp_path / "bad.npz", logits=given["bad"][0][0], labels=LABELS)
    report = compare(
        {"pair": first, "list": [first, given["good"][1]], "file": tmp_path / "bad.npz", "seeds": {7: first}},
        metrics="accuracy",
    )
    seeds = {str(method): list(runs.values) for method, runs in report.tables[0].methods.items()}
    assert seeds == {"pair": ["0"], "list": ["0", "1"], "file": ["0"], "seeds": ["7"]}
    accuracy = report.tables[0].methods[Method("file")].values["0"]["accuracy"]
    assert accuracy == pytest.approx(accuracies(given["bad"])[0])


def test_equal_predictions_are_not_apart(given):
    (table,) = compare({"one": given["good"], "other": given["good"]}, metrics="core").tables
    for metric in table.pairs:
        pair = table.pair(metric, Method("one"), Method("other"))
        assert (pair.networks.value, pair.networks.p_value) == (0.0, 1.0)
        assert not pair.is_marked(0.05)


def test_bins_and_all_metrics(given):
    report = compare(given, metrics="ece", bins=(5, 15))
    assert list(report.tables[0].pairs) == ["ece@5", "ece@15"]
    every = compare({name: given[name] for name in ("good", "bad")}, metrics="all", exchanges=20)
    assert len(every.tables[0].pairs) > 20
    assert "good" in every.to_latex()


PROBS = np.full((400, 4), 0.25)


@pytest.mark.parametrize(
    ("runs", "options", "said"),
    [
        ({}, {}, r"the predictions are empty.*Give \{method"),
        ({"a": []}, {}, "the predictions of a are empty.*at least one seed"),
        ({"a": {}}, {}, "the predictions of a are empty.*at least one seed"),
        ({"a": (network(3), LABELS[:-1])}, {}, "a, seed 0: .*399"),
        ({"a": (network(3)[0], LABELS)}, {}, "a, seed 0: .*4 rows of scores but 400 labels"),
        ({"a": (network(3), LABELS + 1)}, {}, "a, seed 0: .*labels.*4"),
        ({"a": {3: (network(3) * np.nan, LABELS)}}, {}, "a, seed 3: .*nan"),
        ({"a": (PROBS, LABELS)}, {}, "a, seed 0: .*probabilities.*input"),
        ({"a": (network(3), LABELS)}, {"baseline": "b"}, "baseline is 'b'; it must be one of a"),
        ({"a": (network(3), LABELS)}, {"alpha": 0}, "alpha is 0; it must be between 0 and 1"),
        ({"a": (network(3), LABELS)}, {"alpha": 2}, "alpha is 2; it must be between 0 and 1"),
        ({"a": (network(3), LABELS)}, {"alpha": math.nan}, "alpha is nan; it must be between 0 and 1"),
        ({"a": (network(3), LABELS)}, {"exchanges": 3}, "exchanges is 3; it must be"),
        ({"a": (network(3), LABELS)}, {"metrics": "magic"}, "magic"),
        ({"a": (network(3), LABELS)}, {"bins": 0}, "bins is 0; it must be whole numbers"),
        ([], {}, "there is no finished run to compare. Give folders of runs"),
        ("nowhere", {}, "nowhere is not the folder of a run .*or of a benchmark"),
    ],
)
def test_bad_input(runs, options, said):
    with pytest.raises(ValueError, match=said):
        compare(runs, **options)


def test_unknown_options():
    with pytest.raises(TypeError, match="there is no option 'bin'; it must be one of bins"):
        compare({"a": (network(3), LABELS)}, bin=3)


def test_probabilities_are_taken_if_they_are_said(given):
    (table,) = compare({"a": (PROBS, LABELS)}, input="probs", metrics="nll").tables
    assert table.methods[Method("a")].values["0"]["nll"] == pytest.approx(math.log(4))
