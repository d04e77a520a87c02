import math

import numpy as np
import pytest
import torch

from calib_lightning.metrics.multiple import holm, step_down_max
from calib_lightning.metrics.resampling import difference_of

NAN = math.nan


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        # statsmodels 0.14, multipletests(..., method="holm"); by hand: 5 * 0.001, 4 * 0.008, 3 * 0.039, ...
        ([0.039, 0.001, 0.041, 0.008, 0.27], [0.117, 0.005, 0.117, 0.032, 0.27]),
        ([0.2, 0.2, 0.2], [0.6, 0.6, 0.6]),
        ([0.9, 0.6], [1.0, 1.0]),
        ([0.01], [0.01]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([], []),
        # One that could not be made does not count.
        ([NAN, 0.01, NAN, 0.04], [NAN, 0.02, NAN, 0.04]),
        ([NAN], [NAN]),
    ],
)
def test_holm(p_values, adjusted):
    assert holm(p_values) == pytest.approx(adjusted, abs=1e-15, nan_ok=True)


def test_holm_does_not_depend_on_the_order_and_rejects_one_after_another():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = rng.random(12) ** 3
        adjusted = np.array(holm(p_values))
        order = rng.permutation(12)
        assert holm(p_values[order]) == adjusted[order].tolist()
        # Holm's own rule: while the k-th smallest of m is at most 0.05 / (m - k + 1), reject it.
        rejected = set()
        for k, place in enumerate(np.argsort(p_values)):
            if p_values[place] > 0.05 / (12 - k):
                break
            rejected.add(place)
        assert rejected == set(np.flatnonzero(adjusted <= 0.05))


@pytest.mark.parametrize("value", [-0.01, 1.5, math.inf])
def test_holm_refuses_what_is_no_p_value(value):
    with pytest.raises(ValueError, match=f"p_values has {value}; it must be from 0 to 1, or nan"):
        holm([0.5, value, NAN])


def by_loops(drawn):
    """The definition: pairs by descending statistic, each against the largest of itself and those that follow."""
    drawn = np.asarray(drawn, dtype=float)
    values, exchanged = drawn[:, 0], drawn[:, 1:]
    tested = [pair for pair in range(len(drawn)) if not np.isnan(values[pair])]
    z, stars = {}, {}
    for pair in tested:
        known = exchanged[pair][~np.isnan(exchanged[pair])]
        spread = np.sqrt(np.mean(known**2))
        z[pair] = abs(values[pair]) / spread
        stars[pair] = abs(exchanged[pair]) / spread
    left, adjusted, before = sorted(tested, key=lambda pair: -z[pair]), np.full(len(drawn), NAN), 0.0
    while left:
        pair, count = left[0], 0
        for draw in range(exchanged.shape[1]):
            largest = max((stars[one][draw] for one in left if not np.isnan(stars[one][draw])), default=-1)
            count += largest >= z[pair] - 1e-12
        before = adjusted[pair] = max(before, min(1.0, (1 + count) / (1 + (~np.isnan(exchanged[pair])).sum())))
        left = left[1:]
    return adjusted


@pytest.mark.parametrize("seed", range(5))
def test_step_down_max_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((6, 100)) * [[1], [20], [0.1], [1], [1e-6], [3]]
    drawn[:, 0] *= [4.0, 2.0, 1.0, 0.3, 2.5, 1.0]
    drawn[3] = drawn[0] + drawn[3]  # pairs depend on each other
    assert step_down_max(torch.tensor(drawn)).tolist() == pytest.approx(by_loops(drawn), abs=1e-12)
    drawn[2, 0] = NAN
    drawn[5, 4:30] = NAN
    drawn[1, 1:80] = NAN
    found = step_down_max(torch.tensor(drawn)).tolist()
    assert found == pytest.approx(by_loops(drawn), abs=1e-12, nan_ok=True)
    assert [math.isnan(p_value) for p_value in found] == [False, False, True, False, False, False]
    for p_value, one in zip(found, torch.tensor(drawn), strict=True):
        assert math.isnan(p_value) or p_value >= difference_of(one).p_value - 1e-12


def test_step_down_max_does_not_depend_on_scales_and_signs_and_order():
    rng = np.random.default_rng(1)
    drawn = torch.tensor(rng.standard_normal((5, 200)))
    drawn[:, 0] *= 3
    expected = step_down_max(drawn)
    scaled = drawn * torch.tensor([[1.0], [-1e-7], [50.0], [-2.0], [1e5]])
    assert torch.equal(step_down_max(scaled), expected)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(step_down_max(drawn[order]), expected[order])


def test_step_down_max_of_one_pair_is_the_p_value_of_its_exchanges():
    drawn = torch.tensor([[0.2, 0.1, -0.2, 0.3, NAN, 0.0, 0.1]], dtype=torch.float64)
    assert step_down_max(drawn).tolist() == [pytest.approx(3 / 6)]
    assert difference_of(drawn[0]).p_value == pytest.approx(3 / 6)


def test_step_down_max_of_equal_and_infinite_differences_and_of_none():
    strong = torch.full((100,), 1.0, dtype=torch.float64)
    strong[1::2] = -1.0
    strong[0] = 9.0
    equal, infinite = torch.zeros(100, dtype=torch.float64), strong * math.inf
    undefined = torch.full((100,), NAN, dtype=torch.float64)
    never_again = undefined.clone()
    never_again[0] = 0.3
    # What has no p-value of its own does not stand in the way of others.
    undefined_at_first = 50.0 * strong
    undefined_at_first[0] = NAN
    found = step_down_max(torch.stack([equal, strong, infinite, undefined, never_again, undefined_at_first]))
    assert found.tolist() == pytest.approx([1.0, 0.01, 1.0, NAN, 1.0, NAN], nan_ok=True)
    assert step_down_max(undefined.unsqueeze(0)).isnan().all()
    assert found.dtype == torch.float64
