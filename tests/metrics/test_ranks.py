"""Average ranks against hand-computed cases, scipy, and the figures of Demšar (2006)."""

import math

import numpy as np
import pytest
from scipy.stats import f, friedmanchisquare

from calib_lightning.metrics.ranks import average_ranks, compare_ranks, critical_difference, friedman

# Demšar (2006), Table 5 (a): critical values of the two-tailed Nemenyi test
Q_05 = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
Q_10 = [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]

# Demšar (2006), Table 6: AUC of C4.5 and three variants on 14 data sets; average ranks 3.143, 2.000, 2.893, 1.964
DEMSAR = [
    [0.763, 0.768, 0.771, 0.798],
    [0.599, 0.591, 0.590, 0.569],
    [0.954, 0.971, 0.968, 0.967],
    [0.628, 0.661, 0.654, 0.657],
    [0.882, 0.888, 0.886, 0.898],
    [0.936, 0.931, 0.916, 0.931],
    [0.661, 0.668, 0.609, 0.685],
    [0.583, 0.583, 0.563, 0.625],
    [0.775, 0.838, 0.866, 0.875],
    [1.000, 1.000, 1.000, 1.000],
    [0.940, 0.962, 0.965, 0.962],
    [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.9751, 0.975],
    [0.957, 0.978, 0.946, 0.970],
]


@pytest.mark.parametrize(("level", "table"), [(0.95, Q_05), (0.9, Q_10)])
def test_quantiles_of_the_paper(level, table):
    for methods, quantile in enumerate(table, start=2):
        found = critical_difference(methods, 10, level) / math.sqrt(methods * (methods + 1) / 60)
        assert found == pytest.approx(quantile, abs=1.01e-3)  # the paper rounds, and cuts some


def test_the_example_of_the_paper():
    names = ["C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf"]
    found = compare_ranks(DEMSAR, "higher", names, level=0.9)
    assert dict(zip(found.names, found.ranks, strict=True)) == pytest.approx(
        {"C4.5": 3.143, "C4.5+m": 2.0, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}, abs=5e-4
    )
    assert found.names == ("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5")
    assert found.critical_difference == pytest.approx(2.291 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    # the paper: "C4.5 is significantly worse than C4.5+m and C4.5+m+cf" at 0.10
    assert found.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf"), ("C4.5+cf", "C4.5"))
    # the paper computes 9.28 and 3.69 without the correction for ties
    uncorrected = 12 * 14 / (4 * 5) * (sum(rank**2 for rank in found.ranks) - 4 * 25 / 4)
    assert uncorrected == pytest.approx(9.28, abs=0.01)
    assert found.friedman.chi2 == pytest.approx(friedmanchisquare(*np.transpose(DEMSAR)).statistic, rel=1e-12)
    assert found.data_sets == 14


def test_ranks_by_hand():
    values = [[3.0, 1.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [math.inf, 0.0, -1.0, 7.0]]
    assert average_ranks(values, "lower").tolist() == pytest.approx([10.5 / 3, 6 / 3, 6.5 / 3, 7 / 3])
    assert average_ranks(values, "higher").tolist() == pytest.approx([4.5 / 3, 9 / 3, 8.5 / 3, 8 / 3])
    signed = [[-3.0, 1.0, 2.0], [-0.1, 0.1, -0.2]]
    assert average_ranks(signed, "zero").tolist() == [(3 + 1.5) / 2, (1 + 1.5) / 2, (2 + 3) / 2]


def test_friedman_by_hand_with_ties():
    # ranks (1, 2.5, 2.5), (1, 2, 3), (1, 2, 3), (2, 1, 3); sums 5, 7.5, 11.5; squares about 2: 1.5, 2, 2, 2
    values = [[1, 2, 2], [1, 2, 3], [1, 2, 3], [2, 1, 3]]
    expected = (3 - 1) * ((5 - 8) ** 2 + (7.5 - 8) ** 2 + (11.5 - 8) ** 2) / 7.5
    found = friedman(values)
    assert found.chi2 == pytest.approx(expected)
    assert found.f == pytest.approx(3 * expected / (8 - expected))
    assert found.f_p_value == pytest.approx(f.sf(found.f, 2, 6))


@pytest.mark.parametrize("shape", [(2, 3), (8, 3), (12, 5), (5, 20)])
def test_friedman_is_that_of_scipy(shape):
    generator = np.random.default_rng(shape[0])
    for values in (generator.normal(size=shape), generator.integers(0, 3, size=shape).astype(float)):
        theirs = friedmanchisquare(*values.T)
        for better in ("higher", "lower"):
            ours = friedman(values, better)
            assert ours[:2] == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-9)


def test_friedman_at_its_limits():
    assert friedman([[1, 2, 3]] * 6)[::2] == (pytest.approx(12.0), math.inf)
    assert friedman([[1, 2, 3]] * 6).f_p_value == 0.0
    assert friedman([[1, 1, 1]] * 6) == (0.0, 1.0, 0.0, 1.0)


def test_groups_are_maximal_and_ordered():
    data = np.tile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], (12, 1))  # ranks 1 to 6, critical difference 2.177
    found = compare_ranks(data, "lower", list("abcdef"))
    assert found.critical_difference == pytest.approx(2.850 * math.sqrt(42 / 72), abs=1e-3)
    assert found.groups == tuple(tuple(text) for text in ("abc", "bcd", "cde", "def"))
    apart = compare_ranks(np.tile([1.0, 2.0], (40, 1)), "higher", ["low", "high"])
    assert (apart.names, apart.groups) == (("high", "low"), ())
    same = compare_ranks(np.ones((5, 3)), "lower", ["x", "y", "z"])
    assert same.groups == (("x", "y", "z"),)


def test_equal_methods_differ_rarely():
    generator = np.random.default_rng(0)
    least = critical_difference(5, 30)
    runs = [average_ranks(generator.normal(size=(30, 5)), "lower") for _ in range(2000)]
    share = np.mean([np.ptp(ranks) >= least for ranks in runs])
    assert 0.03 < share < 0.06


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: critical_difference(3, 4), "data_sets is 4; a critical difference needs at least 5. .* Add data sets"),
        (lambda: critical_difference(1, 9), "methods is 1; it must be at least 2"),
        (lambda: critical_difference(3, 9, 95), "level is 95; it must be between 0 and 1"),
        (lambda: compare_ranks([[1, 2]] * 3, "lower", ["a", "b"]), "data_sets is 3"),
        (lambda: average_ranks([1, 2], "lower"), r"values has shape \(2,\)"),
        (lambda: average_ranks([[1], [2]], "lower"), "at least two methods"),
        (lambda: average_ranks([[1, 2]], "none"), "better is 'none'"),
        (lambda: average_ranks([[1, 2]], "lower", methods=["a"]), "methods has 1 names; it must have 2"),
        (lambda: average_ranks([[1, 2], [1, math.nan]], "lower"), "the value of method 1 on data set 1 is nan"),
        (
            lambda: average_ranks([[math.nan, 2]], "lower", methods=["ls", "mx"], data_sets=["digits"]),
            "the value of ls on digits is nan",
        ),
        (lambda: friedman([[1, 2]]), "data_sets is 1; Friedman's test needs at least 2"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
