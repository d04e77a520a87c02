"""What temperature scaling costs beside the packages that people use for it; reported, never judged.

Run with ``pytest tests/benchmarks/test_temperature.py -m slow -n0 --benchmark-enable -s``: some ten minutes. Without
``--benchmark-enable`` a few rows pass through everything, which only shows that it still works. Peers are the extra
``bench``; what is not installed is skipped.

Ours and the peer take turns, on one thread; a time is the CPU time of the process, the least of the rounds. The time of
our fits includes their checks and their report.
"""

import math
import time
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from calib_lightning.posthoc.ece_grid import ECETemperature
from calib_lightning.posthoc.solver import GradientDescent, PlainLBFGS
from calib_lightning.posthoc.temperature import Temperature
from tests.benchmarks.test_metrics import Line, in_turn

pytestmark = [
    pytest.mark.benchmark(timer=time.process_time),
    pytest.mark.filterwarnings("ignore:.*before the optimum", "ignore:.*bound"),
]

FEW = 200
SIZES = [(5_000, 10), (5_000, 100), (50_000, 100), (5_000, 1000)]


@pytest.fixture(scope="module")
def table():
    lines = []
    yield lines
    print("\n\n| goal | case | ours | peer | ours / peer | limit | reached |\n|---|---|---|---|---|---|---|")
    print("\n".join(map(str, lines)))


def over_confident(rows, classes, seed=0):
    """float32 logits whose best temperature is 2.5."""
    generator = torch.Generator().manual_seed(seed)
    z = 2.0 * torch.randn(rows, classes, generator=generator)
    return 2.5 * z, torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)


def gap(logits, labels, temperature, best):
    tempered = [F.cross_entropy(logits.double() / t, labels).item() for t in (temperature, best)]
    return tempered[0] - tempered[1]


@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_fit(benchmark, table, rows, classes):
    """B1: against the quickest peer that finds the optimum."""
    calibrators = pytest.importorskip("probmetrics.calibrators")
    distributions = pytest.importorskip("probmetrics.distributions")
    logits, labels = over_confident(FEW if benchmark.disabled else rows, classes)

    def peer():
        theirs = calibrators.TemperatureScalingCalibrator()
        theirs.fit_torch(distributions.CategoricalLogits(logits), labels)
        return 1.0 / float(theirs.invtemp_)

    (ours, other), values = in_turn(
        benchmark, lambda: Temperature().fit(logits, labels).temperature, peer, rounds=10 if classes == 10 else 5
    )
    size = f"N={rows:,}, K={classes}"
    table.append(Line("B1", f"temperature, {size} / probmetrics", 1000 * ours, 1000 * other, 0.6, "ms"))
    best = Temperature().fit(logits.double(), labels).temperature
    table.append(Line("B1", f"gap, {size}", gap(logits, labels, values[0], best), None, 1e-7, "nats"))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def ece_of_loop(logits, labels, temperature):
    """Softmax and a loop over bins, as in many repositories."""
    confidence, predicted = (logits / temperature).softmax(1).max(1)
    correct, edges, error = predicted == labels, torch.linspace(0, 1, 16), 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        share = inside.double().mean()
        if share > 0:
            error += (correct[inside].double().mean() - confidence[inside].double().mean()).abs() * share
    return float(error)


@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_grid(benchmark, table, rows, classes):
    """B2: against one softmax and one loop over bins for each of 5000 temperatures; 50 of them are timed."""
    logits, labels = over_confident(FEW if benchmark.disabled else rows, classes)
    every = 100
    (ours, loop), values = in_turn(
        benchmark,
        lambda: ECETemperature().fit(logits, labels),
        lambda: [ece_of_loop(logits, labels, 0.001 * j) for j in range(every, 5001, every)],
        rounds=2,
    )
    size = f"N={rows:,}, K={classes}"
    table.append(Line("B2", f"ECE grid, {size} / loop (50 T, scaled)", ours, every * loop, 1 / 15))
    lowest = values[0].report.ece_after
    assert lowest <= min(values[1]) + 1e-4
    assert ece_of_loop(logits, labels, values[0].temperature) == pytest.approx(lowest, abs=1e-2)


def test_grid_is_the_full_grid(benchmark, table):
    """B2: in how many of 20 seeds the fast search ends at another temperature than the full grid."""
    rows, classes = (FEW, 3) if benchmark.disabled else (5_000, 10)
    different = 0
    for seed in range(2 if benchmark.disabled else 20):
        logits, labels = over_confident(rows, classes, seed)
        found = {ECETemperature(exhaustive=way).fit(logits, labels).temperature for way in (False, True)}
        different += len(found) - 1
    benchmark.pedantic(lambda: ECETemperature().fit(logits, labels), rounds=1)
    table.append(Line("B2", f"other T than the full grid, 20 seeds, N={rows:,}, K={classes}", different, None, 0, ""))
    assert different == 0


@pytest.mark.parametrize("classes", [10, 100])
def test_recipes_of_papers(benchmark, table, classes):
    """B6: how far above the optimum, in nats, the recipes of papers end, and what they cost."""
    logits, labels = over_confident(FEW if benchmark.disabled else 5_000, classes)
    best = Temperature().fit(logits, labels).temperature
    solvers = [PlainLBFGS(), PlainLBFGS(steps=200), GradientDescent()]
    makes = [lambda solver=solver: Temperature(solver).fit(logits, labels) for solver in solvers]
    (ours, *times), values = in_turn(benchmark, lambda: Temperature().fit(logits, labels), *makes, rounds=1)
    for solver, seconds, fitted in zip(solvers, times, values[1:], strict=True):
        above = gap(logits, labels, fitted.temperature, best)
        table.append(Line("B6", f"gap of {solver.name}, K={classes}", above, None, None, "nats"))
        table.append(Line("B6", f"temperature, K={classes} / {solver.name}", ours, seconds, None))
        assert math.isfinite(above)
        assert above > 1e-4
