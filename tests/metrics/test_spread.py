import math

import numpy as np
import pytest
import scipy.stats
import torch

from calib_lightning.metrics import CORE, METRICS, bootstrap_intervals, over_seeds
from calib_lightning.metrics import weights as W
from calib_lightning.metrics.spread import over_new_seeds
from tests.metrics.golden import random_set
from tests.metrics.test_resampling import detailed


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.90, 0.92, 0.91], [0.80, 0.83, 0.83]),
        ([0.90, 0.92, 0.91, 0.95, 0.87], [0.915, 0.914, 0.913]),
        ([0.5, 0.5, 0.5], [0.4, 0.6, 0.7]),
        ([-3.0, 12.0, 5.5, 7.25], [100.0, 90.0, 20.0, 3.0]),
    ],
)
@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, of equal values
def test_over_new_seeds_is_welchs(first, second, level):
    found = over_new_seeds(iter(first), iter(second), level)
    test = scipy.stats.ttest_ind(first, second, equal_var=False)
    interval = test.confidence_interval(level)
    expected = np.mean(first) - np.mean(second), interval.low, interval.high, test.pvalue, test.df
    assert found == pytest.approx(expected, rel=1e-9)
    turned = over_new_seeds(second, first, level)
    assert turned == pytest.approx((-found.value, -found.high, -found.low, found.p_value, found.freedom), rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([0.9], [0.8]),
        ([0.9, 0.91], [0.8, 0.81, 0.82]),
        ([0.9, 0.91, 0.92], [0.8, 0.81]),
        ([0.9, math.nan, 0.92], [0.8, 0.81, 0.82]),
        # Equal numbers have a mean that differs from them in the last bit; that is no spread.
        ([0.1, 0.1, 0.1], [0.2, 0.2, 0.2]),
        ([0.96, 0.96, 0.96], [0.97, 0.97, 0.97]),
    ],
)
def test_what_says_nothing_about_new_seeds_has_no_p_value(first, second):
    found = over_new_seeds(first, second)
    assert found.value == pytest.approx(np.mean(first) - np.mean(second), nan_ok=True)
    assert all(map(math.isnan, found[1:]))


def test_over_new_seeds_refusals():
    with pytest.raises(ValueError, match="values is empty"):
        over_new_seeds([0.5, 0.4, 0.6], [])
    with pytest.raises(ValueError, match="level is 95"):
        over_new_seeds([0.5, 0.4, 0.6], [0.5, 0.4, 0.7], 95)


def test_equal_runs_have_no_spread_at_all():
    assert over_seeds([0.1, 0.1, 0.1])[1] == 0.0
    assert over_seeds([0.1, 0.1, 0.1]).low == over_seeds([0.1, 0.1, 0.1]).high


# --- several networks on the same rows


def networks(count, metrics=CORE):
    signal, labels = random_set(150, 4)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(count, *signal.shape, generator=generator, dtype=torch.float64)
    return [detailed(signal + one, labels, metrics=metrics) for one in noise]


@pytest.mark.parametrize("key", ["accuracy", "nll", "brier", "correctness_auroc", "signed_gap"])
def test_intervals_of_a_mean_draw_the_same_rows_for_all_networks(key):
    assert METRICS[key].interval == "percentile"
    states = networks(3)
    found = bootstrap_intervals(states, 80, level=0.9, seed=4)[key]
    tables = [W.RowTable.of(state) for state in states]
    means = []
    for drawn in torch.cat(list(W.resamples(150, 80, 4)(100))).numpy():
        rows = torch.from_numpy(np.repeat(np.arange(150), drawn.astype(int)))
        values = []
        for table in tables:
            correct = table.columns["correct"][rows].double().numpy()
            if key == "correctness_auroc":
                ranks = table.ranks[rows].numpy()
                pairs = ranks[correct == 1][:, None] - ranks[correct == 0][None, :]
                values.append(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
            elif key == "signed_gap":
                values.append(table.columns["confidence"][rows].double().numpy().mean() - correct.mean())
            else:
                column = "correct" if key == "accuracy" else key
                values.append(table.columns[column][rows].double().numpy().mean())
        means.append(np.mean(values))
    low, high = np.quantile(means, [0.05, 0.95])
    value = np.mean([state.compute()[key].item() for state in states])
    assert found == pytest.approx((value, low, high), abs=1e-12)


def test_the_mean_of_one_network_is_its_own_value():
    (state,) = networks(1, (*CORE, "murphy_reliability"))
    assert bootstrap_intervals([state], 40, seed=1) == bootstrap_intervals(state, 40, seed=1)
    for key, interval in bootstrap_intervals([state, state], 40, seed=1).items():
        assert interval == pytest.approx(bootstrap_intervals(state, 40, seed=1)[key], abs=1e-14)


def test_a_mean_over_networks_varies_less_than_one_of_them():
    states = networks(5)
    together = bootstrap_intervals(states, 200)["nll"]
    alone = [bootstrap_intervals(state, 200)["nll"] for state in states]
    assert together.high - together.low < np.mean([one.high - one.low for one in alone])


def test_networks_that_do_not_belong_together():
    one, other = networks(2)
    narrow = networks(1, ("nll", "ece"))[0]
    assert tuple(bootstrap_intervals([one, narrow], 20)) == ("nll", "ece")
    fewer = detailed(*random_set(149, 4), metrics=CORE)
    with pytest.raises(ValueError, match="150 and 149 rows"):
        bootstrap_intervals([one, other, fewer], 20)
    moved = detailed(random_set(150, 4)[0], random_set(150, 4)[1].roll(1), metrics=CORE)
    with pytest.raises(ValueError, match="different labels"):
        bootstrap_intervals([one, moved], 20)
    with pytest.raises(ValueError, match="state is empty; it must hold"):
        bootstrap_intervals([], 20)


def test_before_and_after_a_calibrator_the_seeds_are_paired():
    before, after = [0.031, 0.052, 0.043], [0.021, 0.043, 0.030]
    found = over_new_seeds(before, after, 0.9, paired=True)
    known = scipy.stats.ttest_rel(before, after)
    low, high = known.confidence_interval(0.9)
    assert (found.low, found.high, found.p_value, found.freedom) == pytest.approx((low, high, known.pvalue, 2.0))
    assert found.p_value < over_new_seeds(before, after).p_value
    assert over_new_seeds(before, before, paired=True) == (0.0, 0.0, 0.0, 1.0, 2.0)
    assert math.isnan(over_new_seeds(before[:2], after[:2], paired=True).p_value)
    with pytest.raises(ValueError, match="shorter"):
        over_new_seeds(before, after[:2], paired=True)
