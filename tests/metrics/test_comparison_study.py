"""How often methods are called different that are not, and that are, in simulated comparisons with fixed seeds.

Two runs of a comparison see the same signal, each with its own noise. With noise of the seeds the strength of a run's
logits and of its noise differ, too, so that any two networks do differ, and methods do not. `pytest -m slow -s` prints
the shares; the quick ones are of fewer comparisons.
"""

import itertools
import time

import numpy as np
import pytest
import scipy.stats
import torch

from calib_lightning.metrics import EvaluationState
from calib_lightning.metrics.exchange import differences, in_own_spread, standard_errors
from calib_lightning.metrics.multiple import holm, step_down_max
from calib_lightning.metrics.resampling import difference_of
from calib_lightning.metrics.row_table import RowTable
from calib_lightning.metrics.spread import over_new_seeds
from calib_lightning.metrics.weights import read_weighted, subsets

SUMS = ("accuracy", "nll", "brier", "ece")
AUROC = ("correctness_auroc",)
KEYS = (*SUMS, *AUROC)
EXCHANGES = 399
SEED_NOISE = 0.1

thousand = pytest.param(1000, marks=pytest.mark.slow)
by_classes = pytest.mark.parametrize(
    ("classes", "total"), [(10, 30), *(pytest.param(classes, 1000, marks=pytest.mark.slow) for classes in (10, 100))]
)


def limits(total, share=0.05):
    """Where the share of a thousand trials lies with a chance of 0.998; of few trials, of 0.9998."""
    outside = 1e-3 if total >= 200 else 1e-4
    return tuple(scipy.stats.binom.ppf([outside, 1 - outside], total, share) / total)


def table_of(logits, labels, metrics):
    state = EvaluationState(metrics, details=True)
    state.update(logits, labels)
    return RowTable.of(state)


def equal_methods(methods, seeds, rows, classes, seed, metrics, scale=2.0, noise=1.0, of_seeds=0.0):
    """The rows of methods that do not differ."""
    generator = torch.Generator().manual_seed(seed)
    signal = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(signal.softmax(1), 1, generator=generator).squeeze(1)

    def run():
        strength, own = torch.randn(2, generator=generator, dtype=torch.float64).mul(of_seeds).exp()
        error = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
        return table_of(strength * (signal + noise * own * error), labels, metrics)

    return [[run() for _ in range(seeds)] for _ in range(methods)]


def values_of(tables, metrics):
    """Values of each run by metric, method and seed."""
    every = subsets(torch.ones(1, len(tables[0][0]), dtype=torch.bool))
    read = [[read_weighted(table, metrics, every) for table in runs] for runs in tables]
    return {key: [[float(found[key]) for found in runs] for runs in read] for key in metrics}


def new_seeds(values):
    """p-values of all pairs."""
    return [over_new_seeds(one, other).p_value for one, other in itertools.combinations(values, 2)]


def say(name, shares, begin):
    print(f"\n{name}: {', '.join(f'{key} {100 * share:.1f}' for key, share in shares.items())} %", end="")
    print(f" ({time.perf_counter() - begin:.0f} s)", end="")


@by_classes
def test_p_values_without_a_difference(classes, total):
    begin, low = time.perf_counter(), dict.fromkeys(KEYS, 0)
    for seed in range(total):
        drawn = differences(equal_methods(2, 1, 800, classes, seed, KEYS), KEYS, EXCHANGES, seed)
        for key in KEYS:
            low[key] += difference_of(drawn[key][0]).p_value <= 0.05
    shares = {key: count / total for key, count in low.items()}
    say(f"exchanges, K = {classes}, {total} comparisons", shares, begin)
    least, most = (0.029, 0.074) if total == 1000 else limits(total)
    for key, share in shares.items():
        assert least <= share <= most, key


@by_classes
def test_both_questions_of_methods_whose_networks_differ(classes, total):
    begin = time.perf_counter()
    low = {name: dict.fromkeys(KEYS, 0) for name in ("networks", "seeds", "both")}
    for seed in range(total):
        tables = equal_methods(2, 3, 400, classes, seed, KEYS, of_seeds=SEED_NOISE)
        drawn, values = differences(tables, KEYS, 199, seed), values_of(tables, KEYS)
        for key in KEYS:
            networks = difference_of(drawn[key][0]).p_value <= 0.05
            seeds = new_seeds(values[key])[0] <= 0.05
            low["networks"][key] += networks
            low["seeds"][key] += seeds
            low["both"][key] += networks and seeds
    shares = {name: {key: count / total for key, count in counts.items()} for name, counts in low.items()}
    for name, found in shares.items():
        say(f"{name}, K = {classes}, {total} comparisons", found, begin)
    most = 0.074 if total == 1000 else limits(total)[1]
    for key in KEYS:
        assert shares["seeds"][key] <= most, key
        assert shares["both"][key] <= most, key
    # Why a mark needs both: these networks do differ, the methods do not.
    assert shares["networks"]["nll"] > 0.2


def tables_with_a_mark(methods, metrics, total, seeds, rows=300, exchanges=EXCHANGES):
    """Share of tables of equal methods in which a pair is marked."""
    begin = time.perf_counter()
    by_seeds, marked = dict.fromkeys(metrics, 0), dict.fromkeys(metrics, 0)
    of_seeds = SEED_NOISE if seeds > 1 else 0.0
    for seed in range(total):
        tables = equal_methods(methods, seeds, rows, 10, seed, metrics, scale=4.0, noise=1.5, of_seeds=of_seeds)
        candidates = {key: np.ones(methods * (methods - 1) // 2, dtype=bool) for key in metrics}
        if seeds > 1:
            values = values_of(tables, metrics)
            candidates = {key: np.array(holm(new_seeds(values[key]))) <= 0.05 for key in metrics}
        # A mark needs both questions: where the first one marks nothing, the second need not be asked.
        asked = [key for key in metrics if candidates[key].any()]
        drawn = differences(tables, asked, exchanges, seed) if asked else {}
        for key in asked:
            by_seeds[key] += 1
            marked[key] += bool((candidates[key] & (step_down_max(drawn[key]).numpy() <= 0.05)).any())
    shares = {key: count / total for key, count in marked.items()}
    if seeds > 1:
        alone = {key: count / total for key, count in by_seeds.items()}
        say(f"{methods} methods, new seeds alone, {total} tables", alone, begin)
    name = "both questions" if seeds > 1 else "exchanges alone"
    say(f"{methods} methods, {name}, {total} tables", shares, begin)
    return shares


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    ("methods", "metrics", "total"),
    [
        (6, KEYS, 20),
        pytest.param(6, KEYS, 1000, marks=pytest.mark.slow),
        pytest.param(33, SUMS, 1000, marks=pytest.mark.slow),
        pytest.param(33, AUROC, 200, marks=pytest.mark.slow),  # 528 pairs: fewer and smaller tables
    ],
)
def test_marks_in_tables_of_equal_methods(methods, metrics, total, seeds):
    smaller = {"rows": 200, "exchanges": 199} if methods == 33 and metrics == AUROC else {}
    for key, share in tables_with_a_mark(methods, metrics, total, seeds, **smaller).items():
        assert share <= limits(total)[1], key


@pytest.mark.parametrize("total", [30, thousand])
def test_networks_that_differ_but_not_in_their_calibration_errors(total):
    keys, rows = ("ece", "signed_gap"), 1000

    def runs(n, seed):
        generator = torch.Generator().manual_seed(seed)
        signal = 2.0 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(signal.softmax(1), 1, generator=generator).squeeze(1)
        noise = 0.3 * torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
        return 1.5 * (signal + noise[0]), 0.6321 * (signal + noise[1]), labels

    *both, labels = runs(400_000, total)
    for logits, sign in zip(both, (1, -1), strict=True):  # over-confident and under-confident by as much
        state = EvaluationState(keys)
        state.update(logits, labels)
        assert state.compute()["ece"].item() == pytest.approx(0.1118, abs=0.002)
        assert state.compute()["signed_gap"].item() == pytest.approx(sign * 0.1118, abs=0.002)
    begin = time.perf_counter()
    exchanged, own = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    for seed in range(total):
        *both, labels = runs(rows, seed)
        tables = [[table_of(logits, labels, keys)] for logits in both]
        drawn = differences(tables, keys, 199, seed, distance=True)
        errors = standard_errors(tables, keys, 199, seed, distance=True)
        for key in keys:
            exchanged[key] += difference_of(drawn[key][0]).p_value <= 0.05
            own[key] += difference_of(in_own_spread(drawn[key], errors[key])[0]).p_value <= 0.05
    say(f"equal ECE, exchanges alone, {total} comparisons", {key: exchanged[key] / total for key in keys}, begin)
    say(f"equal ECE, in their own spread, {total} comparisons", {key: own[key] / total for key in keys}, begin)
    assert exchanged["signed_gap"] / total > 0.15, "the networks do differ"
    for key in keys:
        assert own[key] <= exchanged[key]
        assert own[key] / total <= (0.074 if total == 1000 else limits(total)[1])


@pytest.mark.parametrize("total", [60, thousand])
def test_power_for_accuracy_is_that_of_mcnemars_exact_test(total):
    rows, won, lost, exchanges = 300, 0.12, 0.06, 499
    # Of n rows on which one run alone is right it has w; a p-value of exchanges counts 499 of them by chance.
    power = 0.0
    for n in range(rows + 1):
        w = np.arange(n + 1)
        tail = scipy.stats.binom.cdf(np.minimum(w, n - w), n, 0.5)
        exact = np.minimum(2.0 * tail, 1.0)
        below = scipy.stats.binom.cdf(np.floor(0.05 * (exchanges + 1)) - 1, exchanges, exact)
        chance = scipy.stats.binom.pmf(w, n, won / (won + lost)) if n else np.ones(1)
        power += scipy.stats.binom.pmf(n, rows, won + lost) * float(chance @ below)
    begin, found = time.perf_counter(), 0
    labels = torch.zeros(rows, dtype=torch.int64)
    for seed in range(total):
        place = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        right = place >= lost, (place < lost) | (place >= lost + won)
        right = [one & (place < 0.9) for one in right]  # both are wrong on others
        tables = [[table_of(torch.stack([one.double() - 0.5, torch.zeros(rows)], 1), labels, SUMS)] for one in right]
        found += difference_of(differences(tables, ["accuracy"], exchanges, seed)["accuracy"][0]).p_value <= 0.05
    say(f"power for accuracy, {total} comparisons", {"theory": power, "found": found / total}, begin)
    assert 0.5 < power < 0.95
    least, most = limits(total, power)
    assert least <= found / total <= most


@pytest.mark.parametrize("total", [60, thousand])
@pytest.mark.parametrize(("seeds", "shift"), [(1, 0.04), (3, 0.025)])
def test_power_for_nll_is_that_of_the_paired_t_test(seeds, shift, total):
    rows, spread, exchanges = 200, 0.2, 499
    center = shift / spread * np.sqrt(seeds * rows)
    edge = scipy.stats.t.ppf(0.975, rows - 1)
    power = scipy.stats.nct.sf(edge, rows - 1, center) + scipy.stats.nct.cdf(-edge, rows - 1, center)
    begin, found, by_t = time.perf_counter(), 0, 0
    labels = torch.zeros(rows, dtype=torch.int64)
    for seed in range(total):
        generator = torch.Generator().manual_seed(seed)
        shared = 1.0 + torch.rand(rows, generator=generator, dtype=torch.float64)
        noise = spread / 2**0.5 * torch.randn(2, seeds, rows, generator=generator, dtype=torch.float64)
        losses = shared + noise + torch.tensor([0.0, shift]).view(2, 1, 1)
        # The logit of the label that gives a row its loss.
        logits = torch.stack([-torch.expm1(losses).log(), torch.zeros_like(losses)], dim=-1)
        tables = [[table_of(run, labels, SUMS) for run in runs] for runs in logits]
        found += difference_of(differences(tables, ["nll"], exchanges, seed)["nll"][0]).p_value <= 0.05
        by_t += scipy.stats.ttest_rel(*losses.mean(dim=1).numpy()).pvalue <= 0.05
    shares = {"theory": float(power), "found": found / total, "t test": by_t / total}
    say(f"power for NLL, {seeds} seeds, {total} comparisons", shares, begin)
    assert 0.5 < power < 0.95
    least, most = limits(total, power)
    assert least <= found / total <= most
    assert abs(found - by_t) <= 0.04 * total
