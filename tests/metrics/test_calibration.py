import doctest
import importlib
import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_calibration_error

from calib_lightning.metrics.functional.adaptive import (
    aece_official,
    aece_official_from_ordered,
    aece_split,
    aece_split_from_ordered,
    debiased_l2,
    debiased_l2_from_ordered,
    ks,
    ks_from_ordered,
)
from calib_lightning.metrics.functional.bins import bin_index, bin_sums
from calib_lightning.metrics.functional.calibration import (
    ece,
    ece_from_bins,
    mce,
    mce_from_bins,
    over_ece,
    over_ece_from_bins,
    overconfidence_error,
    overconfidence_error_from_bins,
    rmsce,
    rmsce_from_bins,
    signed_gap,
    under_ece,
    under_ece_from_bins,
)
from calib_lightning.metrics.functional.decomposition import (
    corp_decomposition,
    corp_from_ordered,
    moment_sums,
    murphy_decomposition,
    murphy_from_bins,
)
from calib_lightning.metrics.functional.ordered import Ordered, order_rows
from calib_lightning.metrics.functional.smooth import (
    residual_grid,
    smece,
    smece_at_from_grid,
    smece_from_grid,
    smece_from_ordered,
)
from tests.metrics.golden import EDGE_CONFIDENCE, EDGE_CORRECT, golden_set, random_set

BINNED = {
    "ece": ece_from_bins,
    "mce": mce_from_bins,
    "rmsce": rmsce_from_bins,
    "overconfidence_error": overconfidence_error_from_bins,
    "over_ece": over_ece_from_bins,
    "under_ece": under_ece_from_bins,
}
EQUAL_MASS = {
    "aece_split": aece_split_from_ordered,
    "aece_official": aece_official_from_ordered,
    "debiased_l2": debiased_l2_from_ordered,
}
RANKED = EQUAL_MASS | {"ks": ks_from_ordered, "smece": smece_from_ordered}
TWINS = {
    f.__name__: f
    for f in (ece, mce, rmsce, overconfidence_error, over_ece, under_ece, aece_split, aece_official, debiased_l2)
} | {"ks": ks, "smece": smece}
DECOMPOSITIONS = {"murphy": murphy_decomposition, "corp": corp_decomposition}

GOLDEN = {
    "ece": 0.054325825305,
    "mce": 0.224808729360,
    "rmsce": 0.083423867093,
    "overconfidence_error": 0.005615080083,
    "aece_official": 0.052463887788,
    "aece_split": 0.053568794839,
    "ks": 0.048559045042,
    "debiased_l2": 0.049396426285,
}
GOLDEN_MURPHY = [0.1553595, 0.0069595, 0.0326998, 0.1803040, 0.0003379, -0.0004579]
GOLDEN_CORP = [0.1553595, 0.0099709, 0.0349153, 0.1803040]


# --- references in float64 numpy, written from the definitions


def reference_binned(c, a, n_bins):
    n = len(c)
    out = dict.fromkeys(BINNED, 0.0)
    squares = 0.0
    for m in range(n_bins):
        inside = (c > m / n_bins) & (c <= (m + 1) / n_bins) | ((m == 0) & (c == 0))
        if not inside.any():
            continue
        weight, conf, acc = inside.sum() / n, c[inside].mean(), a[inside].mean()
        out["ece"] += weight * abs(acc - conf)
        out["mce"] = max(out["mce"], abs(acc - conf))
        squares += weight * (acc - conf) ** 2
        out["overconfidence_error"] += weight * conf * max(conf - acc, 0)
        out["over_ece"] += weight * max(conf - acc, 0)
        out["under_ece"] += weight * max(acc - conf, 0)
    return out | {"rmsce": math.sqrt(squares)}


def expected_order(c, a):
    """Sort by confidence, and give each row the mean correctness of those tied with it."""
    mean = np.array([a[c == x].mean() for x in c])
    order = np.argsort(c, kind="stable")
    return c[order], mean[order]


def reference_split(c, a, n_bins):
    c, a = expected_order(c, a)
    parts = zip(np.array_split(c, n_bins), np.array_split(a, n_bins), strict=True)
    return sum(abs((x - y).sum()) for x, y in parts) / len(c)


def reference_debiased(c, a, n_bins):
    c, a = expected_order(c, a)
    total = 0.0
    for x, y in zip(np.array_split(c, n_bins), np.array_split(a, n_bins), strict=True):
        if len(x) >= 2:
            noise = y.mean() * (1 - y.mean()) / (len(x) - 1)
            total += len(x) / len(c) * ((x.mean() - y.mean()) ** 2 - noise)
    return math.sqrt(max(total, 0.0))


def reference_official(c, a, n_bins):
    n = len(c)
    # N m / M with the product first: rounded only once, unlike linspace.
    edges = np.interp(np.arange(n_bins + 1) * n / n_bins, np.arange(n), np.sort(c))
    total = 0.0
    for low, high in pairwise(edges):
        inside = (c > low) & (c <= high)
        if inside.any():
            total += inside.mean() * abs(c[inside].mean() - a[inside].mean())
    return total


def reference_ks(c, a):
    return max(abs((c - a)[c <= x].sum()) for x in c) / len(c)


def reference_smooth(c, a, sigma, points=4001):
    """Direct integration, with all images of a confidence at distances below 4."""
    t = np.linspace(0, 1, points)[:, None]
    curve = np.zeros(points)
    for center in [x + shift for x in (c, -c) for shift in (-4, -2, 0, 2, 4)]:
        near = np.abs(np.clip(center, 0, 1) - center) < 9 * sigma
        curve += np.exp(-0.5 * ((t - center[near]) / sigma) ** 2) @ (a - c)[near]
    return np.trapezoid(np.abs(curve), dx=1 / (points - 1)) / (len(c) * sigma * math.sqrt(2 * math.pi))


def sure_rows():
    """Confidences of a network that is sure of most rows: four of five round to 1, and one in 25 of these is wrong."""
    c, a = random_rows(2000, seed=3)
    c[:1600] = 1 - np.geomspace(1e-12, 1e-4, 1600)
    a[:1600] = np.arange(1600) % 25 > 0
    return c, a


def reference_corp(c, a):
    """Isotonic regression by its max-min formula over the distinct confidences."""
    values = np.unique(c)
    count = np.array([(c == v).sum() for v in values], dtype=float)
    hits = np.array([a[c == v].sum() for v in values], dtype=float)
    fit = [
        max(min(hits[j : k + 1].sum() / count[j : k + 1].sum() for k in range(i, len(values))) for j in range(i + 1))
        for i in range(len(values))
    ]
    best = ((np.array(fit)[np.searchsorted(values, c)] - a) ** 2).mean()
    brier, uncertainty = ((c - a) ** 2).mean(), a.mean() * (1 - a.mean())
    return brier, brier - best, uncertainty - best, uncertainty


REFERENCES = {
    "aece_split": reference_split,
    "aece_official": reference_official,
    "debiased_l2": reference_debiased,
    "ks": lambda c, a, n_bins: reference_ks(c, a),
}


# --- helpers


def ordered_of(c, a):
    return order_rows(torch.logit(torch.as_tensor(c, dtype=torch.float64)), torch.as_tensor(a).bool())


def rows_of(logits, labels):
    probs = logits.softmax(1).numpy()
    return probs.max(axis=1), (logits.argmax(1) == labels).numpy().astype(float)


def random_rows(n, tied=False, seed=0):
    rng = np.random.default_rng(seed)
    c = rng.random(n) ** 0.4
    a = (rng.random(n) < c**1.5).astype(float)
    # Multiples of 1/8 survive the way to log-odds and back only up to rounding, so ties must be found in log-odds.
    return (np.round(c * 8) / 8 if tied else c), a


def as_scores(a):
    """Two classes, label 0 where correct: logits and labels that go with a given confidence."""
    return torch.tensor([[1.0, 0.0]] * len(a)), 1 - torch.as_tensor(np.asarray(a)).long()


def weighted_groups(c, a, weights):
    """Groups of distinct confidences, with the weights ``(B, N)`` of their rows added up."""
    values, group = np.unique(c, return_inverse=True)
    member = torch.from_numpy((group[:, None] == np.arange(len(values))).astype(float))
    weights, c, a = torch.from_numpy(weights.astype(float)), torch.from_numpy(c), torch.from_numpy(a)
    return Ordered(weights @ member, (weights * a) @ member, (weights * c) @ member)


def weighted_bins(c, a, weights, n_bins):
    index = np.clip(np.ceil(c * n_bins) - 1, 0, n_bins - 1)
    member = torch.from_numpy((index[:, None] == np.arange(n_bins)).astype(float))
    weights, c, a = torch.from_numpy(weights.astype(float)), torch.from_numpy(c), torch.from_numpy(a)
    bins = torch.stack([(weights * x) @ member for x in (torch.ones_like(c), c, a)], dim=-1)
    return bins, torch.stack([(weights * x) @ member for x in (c * c, c * a)], dim=-1)


# --- golden values


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    value = TWINS[name](*golden_set())
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value.item() == pytest.approx(GOLDEN[name], abs=1.01e-12)


def test_golden_parts_of_the_error():
    logits, labels = golden_set()
    over, under = over_ece(logits, labels).item(), under_ece(logits, labels).item()
    assert over + under == pytest.approx(GOLDEN["ece"], abs=1e-12)
    assert over - under == pytest.approx(-0.039006782131, abs=1e-12)


def test_golden_smece():
    logits, labels = golden_set()
    value = smece(logits, labels).item()
    assert value == pytest.approx(0.052749, abs=1e-6)
    c, a = rows_of(logits, labels)
    # The width at which the error equals the width, by direct integration.
    assert reference_smooth(c, a, value) == pytest.approx(value, abs=2e-6)
    grid, count = residual_grid(ordered_of(c, a)), torch.tensor(500.0)
    for sigma, golden in ((0.05, 0.053123), (0.1, 0.046165)):
        ours = smece_at_from_grid(grid, count, sigma).item()
        assert ours == pytest.approx(golden, abs=1e-6)
        assert ours == pytest.approx(reference_smooth(c, a, sigma), abs=2e-6)


def test_golden_decompositions():
    assert torch.stack(murphy_decomposition(*golden_set())).tolist() == pytest.approx(GOLDEN_MURPHY, abs=5.1e-8)
    assert torch.stack(corp_decomposition(*golden_set())).tolist() == pytest.approx(GOLDEN_CORP, abs=5.1e-8)


# --- edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edge_table(dtype):
    c, (logits, labels) = torch.tensor(EDGE_CONFIDENCE, dtype=dtype), as_scores(EDGE_CORRECT)
    tolerance = 1e-15 if dtype == torch.float64 else 1e-7
    # By hand, with gaps of -0.6, -0.25, -0.25, 0.55 and 0 rows in bins of 3, 2, 3, 2 and 2.
    expected = {
        "ece": 0.1375,
        "mce": 0.275,
        "rmsce": math.sqrt((0.36 / 3 + 0.0625 / 2 + 0.0625 / 3 + 0.3025 / 2) / 12),
        "overconfidence_error": 0.775 * 0.55 / 12,
        "over_ece": 0.55 / 12,
        "under_ece": 1.1 / 12,
    }
    found = {name: TWINS[name](logits, labels, n_bins=5, confidence=c).item() for name in BINNED}
    assert found == pytest.approx(expected, abs=tolerance)
    assert ks(logits, labels, confidence=c).item() == pytest.approx(0.1125, abs=tolerance)
    for terms in (
        murphy_decomposition(logits, labels, n_bins=5, confidence=c),
        corp_decomposition(logits, labels, confidence=c),
    ):
        assert terms.brier.item() == pytest.approx(0.215625, abs=tolerance)


def test_edge_table_in_the_convention_of_torchmetrics():
    """Bins closed on the left and a bin of its own for 1: other numbers for the same rows."""
    c, a = torch.tensor(EDGE_CONFIDENCE), torch.tensor(EDGE_CORRECT)
    assert binary_calibration_error(c, a, n_bins=5, norm="l1").item() == pytest.approx(0.1791667, abs=1e-6)
    assert binary_calibration_error(c, a, n_bins=5, norm="max").item() == pytest.approx(0.8, abs=1e-6)
    sums = bin_sums(c, a.bool(), 5)
    assert ece_from_bins(sums).item() == pytest.approx(0.1375, abs=1e-7)
    assert mce_from_bins(sums).item() == pytest.approx(0.275, abs=1e-7)


HAND = [  # confidence, bins, its bin
    (0.0, 5, 0),
    (0.2, 5, 0),
    (0.20001, 5, 1),
    (0.6, 5, 2),
    (0.8, 5, 3),
    (1.0, 5, 4),
    (1 / 15, 15, 0),
    (0.2, 15, 2),
    (14 / 15, 15, 13),
    (0.7, 10, 6),
    (0.5, 2, 0),
    (1.0, 1, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("c", "n_bins", "expected"), HAND)
def test_bins_by_hand(c, n_bins, expected, dtype):
    confidence = torch.tensor([c], dtype=dtype)
    assert bin_index(confidence, n_bins).tolist() == [expected]
    sums, moments = bin_sums(confidence, torch.tensor([True]), n_bins), moment_sums(confidence, torch.ones(1), n_bins)
    value = confidence.double().item()
    assert sums[expected].tolist() == [1.0, value, 1.0]
    assert moments[expected].tolist() == [value**2, value]
    assert sums.count_nonzero() == sums[expected].count_nonzero()
    for name in ("ece", "mce", "rmsce", "under_ece"):
        assert BINNED[name](sums).item() == 1 - value
    assert over_ece_from_bins(sums).item() == overconfidence_error_from_bins(sums).item() == 0


# --- against the references


@pytest.mark.parametrize("n_bins", [1, 7, 15, 64])
@pytest.mark.parametrize("n", [1, 12, 999])
def test_binned_against_numpy(n, n_bins):
    c, a = random_rows(n)
    sums = bin_sums(torch.from_numpy(c), torch.from_numpy(a), n_bins)
    found = {name: function(sums).item() for name, function in BINNED.items()}
    assert found == pytest.approx(reference_binned(c, a, n_bins), abs=1e-12)


def test_many_rows_are_summed_exactly():
    c, a = random_rows(300_000)
    parts = [
        bin_sums(x, y, 15)
        for x, y in zip(torch.from_numpy(c).split(1000), torch.from_numpy(a).split(1000), strict=True)
    ]
    found = {name: function(torch.stack(parts).sum(0)).item() for name, function in BINNED.items()}
    assert found == pytest.approx(reference_binned(c, a, 15), abs=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("n", "n_bins"), [(1, 15), (2, 15), (9, 15), (15, 15), (16, 15), (60, 15), (301, 15), (301, 1)]
)
def test_ranked_against_numpy(name, n, n_bins, tied):
    c, a = random_rows(n, tied, seed=n)
    options = {} if name == "ks" else {"n_bins": n_bins}
    value = RANKED[name](ordered_of(c, a), **options).item()
    assert value == pytest.approx(REFERENCES[name](c, a, n_bins), abs=1e-9)


def test_official_convention_against_the_literal_edges():
    """The published recipe as it is written, with linspace, on confidences that are all different."""
    c, a = random_rows(480, seed=2)
    edges = np.interp(np.linspace(0, 480, 16), np.arange(480), np.sort(c))
    expected = 0.0
    for low, high in pairwise(edges):
        inside = (c > low) & (c <= high)
        expected += abs(c[inside].mean() - a[inside].mean()) * inside.mean()
    assert aece_official_from_ordered(ordered_of(c, a)).item() == pytest.approx(expected, abs=1e-12)
    # The row of the smallest confidence is in no bin, whatever it says.
    a[c.argmin()] = 1 - a[c.argmin()]
    assert aece_official_from_ordered(ordered_of(c, a)).item() == pytest.approx(expected, abs=1e-12)
    assert abs(aece_split_from_ordered(ordered_of(c, a)).item() - expected) > 1e-4


def test_a_cut_group_counts_by_the_mean_over_orders():
    # Three rows at 0.5, two of them correct, in two bins of sizes 2 and 1: sums over orders average to 4/3 and 2/3.
    value = aece_split_from_ordered(ordered_of(np.full(3, 0.5), np.array([1, 1, 0])), n_bins=2).item()
    assert value == pytest.approx((abs(4 / 3 - 1) + abs(2 / 3 - 0.5)) / 3, abs=1e-15)


def test_debiased_error_by_hand():
    ordered = ordered_of(np.array([0.7, 0.8, 0.9]), np.array([0, 0, 1]))
    # One bin: a squared gap of (0.8 - 1/3)^2, less 2/9 over n - 1 = 2.
    assert debiased_l2_from_ordered(ordered, 1).item() == pytest.approx(math.sqrt((7 / 15) ** 2 - 1 / 9), abs=1e-14)
    # Bins of two rows and of one, which does not count.
    assert debiased_l2_from_ordered(ordered, 2).item() == pytest.approx(math.sqrt(0.75**2 * 2 / 3), abs=1e-14)
    # More noise than gap.
    assert debiased_l2_from_ordered(ordered_of(np.full(2, 0.5), np.array([0, 1])), 1).item() == 0


@pytest.mark.parametrize("sigma", [0.005, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 40, 2000])
def test_smooth_error_at_a_width(n, sigma):
    c, a = random_rows(n, seed=n)
    grid = residual_grid(ordered_of(c, a))
    assert grid.sum().item() == pytest.approx((a - c).sum(), abs=1e-10)
    value = smece_at_from_grid(grid, torch.tensor(float(n)), sigma).item()
    assert value == pytest.approx(reference_smooth(c, a, sigma), abs=1e-5)


@pytest.mark.parametrize("n", [3, 50, 5000])
def test_smece_is_its_own_width(n):
    c, a = random_rows(n, seed=n + 1)
    value = smece_from_ordered(ordered_of(c, a)).item()
    assert value > 0.002
    assert reference_smooth(c, a, value) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("border", [0.0, 1.0])
def test_smooth_error_at_a_border(border):
    """The reflection keeps all mass of confidences 0 and 1 inside: their gap counts in full."""
    c, a = np.full(10, border), np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0]) == 1
    a = (a ^ (border == 1)).astype(float)
    assert smece_from_ordered(ordered_of(c, a)).item() == pytest.approx(0.3, abs=1e-9)
    c, a = sure_rows()
    c = c if border else 1 - c
    a = a if border else 1 - a
    value = smece_from_ordered(ordered_of(c, a)).item()
    assert reference_smooth(c, a, value) == pytest.approx(value, abs=1e-5)
    grid = residual_grid(ordered_of(c, a))
    for sigma in (0.01, 0.1, 0.5):
        ours = smece_at_from_grid(grid, torch.tensor(float(len(c))), sigma).item()
        assert ours == pytest.approx(reference_smooth(c, a, sigma), abs=1e-5)


def test_smece_of_calibrated_rows_is_zero():
    # Residuals cancel at every confidence: no fixed point above the smallest width.
    c = np.repeat([0.25, 0.5, 0.75], 4)
    a = np.array([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0])
    assert smece_from_ordered(ordered_of(c, a)).item() == pytest.approx(0, abs=1e-12)


def test_murphy_against_numpy():
    c, a = random_rows(400, seed=5)
    terms = np.zeros(6)
    terms[0] = ((c - a) ** 2).mean()
    terms[3] = a.mean() * (1 - a.mean())
    for m in range(15):
        inside = (c > m / 15) & (c <= (m + 1) / 15)
        if inside.any():
            weight, x, y = inside.mean(), c[inside], a[inside]
            terms[1] += weight * (x.mean() - y.mean()) ** 2
            terms[2] += weight * (y.mean() - a.mean()) ** 2
            terms[4] += weight * x.var()
            terms[5] += weight * 2 * ((x - x.mean()) * (y - y.mean())).mean()
    rows = torch.from_numpy(c), torch.from_numpy(a)
    found = murphy_from_bins(bin_sums(*rows, 15), moment_sums(*rows, 15))
    assert torch.stack(found).tolist() == pytest.approx(terms, abs=1e-13)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 2, 45])
def test_corp_against_numpy(n, tied):
    c, a = random_rows(n, tied, seed=n + 3)
    found = torch.stack(corp_from_ordered(ordered_of(c, a))).tolist()
    assert found == pytest.approx(reference_corp(c, a), abs=1e-13)


# --- weights and leading dimensions


def resamples(n, replicates=4, seed=0):
    """Replicates of different sizes, so that many rows and whole bins are empty in some of them."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(size, np.full(n, 1 / n)) for size in (n, n, 3 * n, 10)[:replicates]])


@pytest.mark.parametrize("tied", [False, True])
def test_weights_equal_repeated_rows(tied):
    c, a = random_rows(80, tied, seed=9)
    weights = resamples(80)
    bins, moments = weighted_bins(c, a, weights, 15)
    groups = weighted_groups(c, a, weights)
    murphy, corp = murphy_from_bins(bins, moments), corp_from_ordered(groups)
    for b, row_weights in enumerate(weights):
        x, y = np.repeat(c, row_weights), np.repeat(a, row_weights)
        repeated, tensors = ordered_of(x, y), (torch.from_numpy(x), torch.from_numpy(y))
        for function in BINNED.values():
            assert function(bins).shape == (4,)
            assert function(bins)[b].item() == pytest.approx(function(bin_sums(*tensors, 15)).item(), abs=1e-13)
        for name, function in RANKED.items():
            assert function(groups).shape == (4,)
            tolerance = 1e-9 if name == "smece" else 1e-13
            assert function(groups)[b].item() == pytest.approx(function(repeated).item(), abs=tolerance)
        expected = murphy_from_bins(bin_sums(*tensors, 15), moment_sums(*tensors, 15))
        assert [t[b].item() for t in murphy] == pytest.approx([t.item() for t in expected], abs=1e-13)
        expected = corp_from_ordered(repeated)
        assert [t[b].item() for t in corp] == pytest.approx([t.item() for t in expected], abs=1e-13)


def test_more_leading_dimensions_and_an_empty_replicate():
    c, a = random_rows(50, seed=4)
    weights = resamples(50)
    weights[2] = 0
    bins, moments = weighted_bins(c, a, weights, 7)
    groups = weighted_groups(c, a, weights)
    cube = Ordered(*(x.reshape(2, 2, -1) for x in groups))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [f(bins) for f in BINNED.values()] + [f(groups) for f in RANKED.values()]
        found += [*murphy_from_bins(bins, moments), *corp_from_ordered(groups)]
        cubes = [f(bins.reshape(2, 2, 7, 3)) for f in BINNED.values()] + [f(cube) for f in RANKED.values()]
        cubes += [*murphy_from_bins(bins.reshape(2, 2, 7, 3), moments.reshape(2, 2, 7, 2)), *corp_from_ordered(cube)]
    for flat, shaped in zip(found, cubes, strict=True):
        assert flat.isnan().tolist() == [False, False, True, False]
        assert torch.equal(flat[~flat.isnan()], shaped.reshape(4)[~flat.isnan()])
        assert shaped.shape == (2, 2)


@pytest.mark.parametrize("name", ["ks", "smece"])
def test_fractional_weights_only_count_by_their_ratio(name):
    c, a = random_rows(60, seed=6)
    groups = weighted_groups(c, a, np.random.default_rng(1).random((3, 60)))
    scaled = Ordered(*(0.37 * x for x in groups))
    assert RANKED[name](scaled).tolist() == pytest.approx(RANKED[name](groups).tolist(), abs=1e-12)


def test_inputs_are_left_alone():
    c, a = random_rows(60, seed=6)
    weights = resamples(60)
    (bins, moments), groups = weighted_bins(c, a, weights, 15), weighted_groups(c, a, weights)
    grid = residual_grid(groups)
    before = [x.clone() for x in (bins, moments, *groups, grid)]
    for function in BINNED.values():
        function(bins)
    for function in (*RANKED.values(), corp_from_ordered):
        function(groups)
    murphy_from_bins(bins, moments)
    smece_from_grid(grid, groups.count.sum(-1))
    assert all(torch.equal(x, y) for x, y in zip(before, (bins, moments, *groups, grid), strict=True))


# --- degenerate and bad input


@pytest.mark.parametrize("name", [*TWINS, *DECOMPOSITIONS])
def test_no_rows(name):
    function = (TWINS | DECOMPOSITIONS)[name]
    with pytest.warns(UserWarning, match="no rows") as caught:
        value = function(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(math.isnan(x) for x in (value if isinstance(value, tuple) else [value]))


def test_one_row():
    logits = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    c = 1 / (1 + math.exp(-2.0))
    found = {name: function(logits, torch.tensor([1])).item() for name, function in TWINS.items()}
    # A single wrong row: dropped by the one convention, too few for the other.
    expected = dict.fromkeys(TWINS, c) | {"overconfidence_error": c**2, "under_ece": 0}
    assert found == pytest.approx(expected | {"aece_official": 0, "debiased_l2": 0}, abs=1e-12)


@pytest.mark.parametrize("right", [True, False])
def test_all_correct_and_all_wrong(right):
    logits, _ = random_set(100, 4)
    labels = logits.argmax(1) if right else logits.argmin(1)
    mean = logits.softmax(1).amax(1).mean().item()
    error = 1 - mean if right else mean
    for name in ("ece", "aece_split", "ks", "smece", "under_ece" if right else "over_ece"):
        assert TWINS[name](logits, labels).item() == pytest.approx(error, abs=1e-6 if name == "smece" else 1e-12)
    assert TWINS["over_ece" if right else "under_ece"](logits, labels).item() == 0
    terms = corp_decomposition(logits, labels)
    assert [t.item() for t in terms[1:]] == pytest.approx([terms.brier.item(), 0, 0], abs=1e-12)


def test_constant_logits():
    logits, labels = torch.full((10, 5), 7.5), torch.tensor([0] * 4 + [1, 2, 3, 4, 1, 2])
    found = {name: function(logits, labels).item() for name, function in TWINS.items()}
    expected = dict.fromkeys(TWINS, 0.2) | {"overconfidence_error": 0, "over_ece": 0, "aece_official": 0}
    # With 15 bins for 10 rows each row is a bin of its own.
    assert found == pytest.approx(expected | {"debiased_l2": 0}, abs=1e-6)
    assert debiased_l2(logits, labels, n_bins=1).item() == pytest.approx(math.sqrt(0.04 - 0.24 / 9), abs=1e-7)
    terms = murphy_decomposition(logits, labels)
    assert [t.item() for t in terms] == pytest.approx([0.28, 0.04, 0, 0.24, 0, 0], abs=1e-7)


def test_one_class():
    logits, labels = torch.randn(6, 1), torch.zeros(6, dtype=torch.int64)
    assert {f(logits, labels).item() for f in TWINS.values()} == {0.0}


@pytest.mark.parametrize("name", [*TWINS, *DECOMPOSITIONS])
def test_bad_input(name):
    function = (TWINS | DECOMPOSITIONS)[name]
    good, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    who = name if name in TWINS else f"{name}_decomposition"
    with pytest.raises(ValueError, match=f"{who}: 1 of 3 rows.*row 0 has nan"):
        function(torch.tensor([[torch.nan, 0.0], [1.0, 0.0], [1.0, 0.0]]), labels)
    with pytest.raises(ValueError, match="label 2; it must"):
        function(good, labels + 2)
    with pytest.raises(ValueError, match=r"confidence 1\.5"):
        function(good, labels, confidence=torch.tensor([0.5, 1.5, 0.5]))
    with pytest.raises(TypeError, match=r"labels is .*; it must be class numbers"):
        function(good, labels.float())
    with pytest.raises(ValueError, match="input is 'auto'"):
        function(good, labels, input="auto")
    if name not in ("ks", "smece", "corp"):
        with pytest.raises(ValueError, match="n_bins is 0"):
            function(good, labels, n_bins=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TWINS)
def test_half_precision_is_widened(name, dtype):
    logits, labels = random_set(500, 6)
    narrow = logits.to(dtype)
    assert TWINS[name](narrow, labels).item() == TWINS[name](narrow.float(), labels).item()


@pytest.mark.parametrize("name", TWINS)
def test_probabilities_give_what_logits_give(name):
    logits, labels = random_set(500, 6)
    as_probs = TWINS[name](logits.softmax(1), labels, input="probs").item()
    assert as_probs == pytest.approx(TWINS[name](logits, labels).item(), abs=1e-9)


# --- other libraries


def test_against_torchmetrics():
    """Random confidences are on no edge, so the conventions agree."""
    c, a = (torch.from_numpy(x) for x in random_rows(2000, seed=8))
    sums = bin_sums(c, a, 15)
    for norm, function in (("l1", ece_from_bins), ("l2", rmsce_from_bins), ("max", mce_from_bins)):
        theirs = binary_calibration_error(c, a.long(), n_bins=15, norm=norm).item()
        assert function(sums).item() == pytest.approx(theirs, abs=1e-6)


def test_against_relplot(monkeypatch):
    relplot = pytest.importorskip("relplot")
    for c, a in (rows_of(*golden_set()), random_rows(3000, seed=1)):
        assert smece_from_ordered(ordered_of(c, a)).item() == pytest.approx(relplot.smECE(f=c, y=a), rel=0.01)
    c, a = sure_rows()
    ours = smece_from_ordered(ordered_of(c, a)).item()
    assert relplot.smECE(f=c, y=a) > 1.1 * ours  # half of the mass at the border is lost
    round_to_grid = relplot.kernels.smooth_round_to_grid

    def with_whole_borders(*arguments, **options):
        mass = round_to_grid(*arguments, **options)
        mass[[0, -1]] *= 2
        return mass

    monkeypatch.setattr(relplot.kernels, "smooth_round_to_grid", with_whole_borders)
    assert relplot.smECE(f=c, y=a) == pytest.approx(ours, rel=0.02)


def test_against_netcal():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        netcal = pytest.importorskip("netcal.metrics")
    c, a = random_rows(2000, seed=8)
    sums = bin_sums(torch.from_numpy(c), torch.from_numpy(a), 15)
    assert ece_from_bins(sums).item() == pytest.approx(netcal.ECE(15).measure(c, a.astype(int)), abs=1e-12)
    assert mce_from_bins(sums).item() == pytest.approx(netcal.MCE(15).measure(c, a.astype(int)), abs=1e-12)


# --- properties


@st.composite
def confidences(draw):
    n = draw(st.integers(1, 30))
    value = st.one_of(st.floats(0, 1, width=32), st.integers(0, 10).map(lambda k: k / 10))
    c = draw(st.lists(value, min_size=n, max_size=n))
    a = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return torch.tensor(c, dtype=torch.float64), torch.tensor(a)


@settings(max_examples=100, deadline=None)
@given(confidences(), st.integers(1, 20))
def test_order_of_the_errors(rows, n_bins):
    c, a = rows
    scores, ordered = as_scores(a.numpy()), ordered_of(c, a)
    gap = signed_gap(*scores, confidence=c).item()
    sums = bin_sums(c, a, n_bins)
    found = {name: function(sums).item() for name, function in BINNED.items()}
    found |= {name: function(ordered, n_bins).item() for name, function in EQUAL_MASS.items()}
    found |= {"ks": ks_from_ordered(ordered).item(), "smece": smece_from_ordered(ordered).item()}
    for value in found.values():
        assert -1e-15 <= value <= 1 + 1e-6
    slack = 1e-12
    assert abs(gap) <= found["ece"] + slack
    assert abs(gap) <= found["ks"] + slack
    assert abs(gap) <= found["aece_split"] + slack
    assert abs(gap) <= found["smece"] + 1e-5
    assert found["ece"] <= found["rmsce"] + slack
    assert found["rmsce"] <= found["mce"] + slack
    assert found["overconfidence_error"] <= found["over_ece"] + slack
    assert found["over_ece"] + found["under_ece"] == pytest.approx(found["ece"], abs=slack)
    assert found["over_ece"] - found["under_ece"] == pytest.approx(gap, abs=slack)
    # Merging pairs of bins never makes the error larger.
    finer = ece_from_bins(bin_sums(c, a, 2 * n_bins)).item()
    merged = ece_from_bins(bin_sums(c, a, 2 * n_bins).reshape(n_bins, 2, 3).sum(1)).item()
    assert merged <= finer + slack


@settings(max_examples=60, deadline=None)
@given(confidences(), st.randoms(use_true_random=False), st.integers(1, 20))
def test_order_of_rows_does_not_matter(rows, random, n_bins):
    c, a = rows
    order = list(range(len(c)))
    random.shuffle(order)
    for function in EQUAL_MASS.values():
        assert function(ordered_of(c, a), n_bins).item() == function(ordered_of(c[order], a[order]), n_bins).item()
    for function in (ks_from_ordered, smece_from_ordered):
        assert function(ordered_of(c, a)).item() == function(ordered_of(c[order], a[order])).item()
    assert torch.allclose(bin_sums(c, a, n_bins), bin_sums(c[order], a[order], n_bins), rtol=0, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(confidences(), st.integers(1, 20))
def test_decompositions_add_up(rows, n_bins):
    c, a = rows
    brier = (c - a.double()).square().mean().item()
    terms = murphy_from_bins(bin_sums(c, a, n_bins), moment_sums(c, a, n_bins))
    total = terms.reliability - terms.resolution + terms.uncertainty + terms.within_variance - terms.within_covariance
    assert terms.brier.item() == pytest.approx(brier, abs=1e-12)
    assert total.item() == pytest.approx(brier, abs=1e-12)
    assert min(t.item() for t in terms[:5]) >= -1e-15
    corp = corp_from_ordered(ordered_of(c, a))
    assert corp.brier.item() == pytest.approx(brier, abs=1e-12)
    assert (corp.miscalibration - corp.discrimination + corp.uncertainty).item() == pytest.approx(brier, abs=1e-12)
    assert min(t.item() for t in corp) >= -1e-15


@pytest.mark.parametrize("module", ["calibration", "adaptive", "smooth", "decomposition"])
def test_examples(module):
    result = doctest.testmod(importlib.import_module(f"calib_lightning.metrics.functional.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
