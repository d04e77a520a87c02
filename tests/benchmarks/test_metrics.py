"""What the metrics cost beside the packages that people use for them; reported, never judged.

Run with ``pytest tests/benchmarks/test_metrics.py -m slow -n0 --benchmark-enable -s``: five to seven minutes. The table
that is printed at the end is kept in ``METRICS.md``. Without ``--benchmark-enable`` a few rows pass through everything,
which only shows that it still works. Peers are the extra ``bench``; what is not installed is skipped.

Ours and the peer take turns, on one thread; a time is the CPU time of the process, the least of the rounds.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.classification import BinaryAUROC, MulticlassCalibrationError

from calib_lightning.metrics import (
    FULL,
    METRICS,
    REPORT,
    AdaptiveCalibrationError,
    ClasswiseCalibrationError,
    CorrectnessAUROC,
    EvaluationState,
    ExpectedCalibrationError,
    bootstrap_intervals,
)
from tests.conftest import REPOSITORY
from tests.ddp.pool import ProcessPool

pytestmark = pytest.mark.benchmark(timer=time.process_time)

BATCH, ROWS, FEW = 1000, 1_000_000, 2_000
CLASSES = (10, 100, 1000)
RANK_BINS = 16384
TEST_REPORT = ("ece", "aece_split", "classwise_ece", "mce", "nll", "brier", "correctness_auroc", "aurc", "accuracy")


class Line(NamedTuple):
    """A line of the table; what is compared with the limit is the ratio, or ``ours`` where there is no peer."""

    goal: str
    case: str
    ours: float
    peer: float | None
    limit: float | None
    unit: str = "s"

    def __str__(self):
        judged = self.ours if self.peer is None else self.ours / self.peer
        reached = "" if self.limit is None else "yes" if judged <= self.limit else "**no**"
        peer, ratio = ("", "") if self.peer is None else (f"{self.peer:.3g} {self.unit}", f"{judged:.3g}")
        limit = "" if self.limit is None else f"{self.limit:.3g}" if self.peer else f"{self.limit:.3g} {self.unit}"
        return f"| {self.goal} | {self.case} | {self.ours:.3g} {self.unit} | {peer} | {ratio} | {limit} | {reached} |"


@pytest.fixture(scope="module")
def table():
    lines = []
    yield lines
    print("\n\n| goal | case | ours | peer | ours / peer | limit | reached |\n|---|---|---|---|---|---|---|")
    print("\n".join(map(str, sorted(lines, key=lambda line: int(line.goal.removeprefix("A") or 99)))))


@pytest.fixture
def rows(benchmark):
    if benchmark.disabled:
        return FEW
    return 200_000 if benchmark.params and benchmark.params.get("classes") == 1000 else ROWS


@pytest.fixture
def uncertainty(benchmark):
    if benchmark.disabled:
        pytest.skip("importing torch_uncertainty takes a quarter of a minute; --benchmark-enable")
    return pytest.importorskip("torch_uncertainty.metrics")


class Batches:
    """Batches of 1000 rows, all of them different, cut out of 40 MB: the memory of a million rows is not needed.

    The numbers are read as rows of K, and once they are used up again from the next number on.
    """

    def __init__(self, classes, rows, kind="logits"):
        generator = torch.Generator().manual_seed(classes)
        size = BATCH * classes
        numbers = 3.0 * torch.randn(min(10_000_000, rows * classes) + 1000, generator=generator)
        blocks = (len(numbers) - 1000) // size
        starts = [i % blocks * size + i // blocks for i in range(rows // BATCH)]
        views = [numbers[start : start + size].view(BATCH, classes) for start in starts]
        if kind == "probs":  # rows that sum to one cannot be shifted
            views = [view.softmax(dim=1) for view in views[:blocks]]
            views = [views[i % blocks] for i in range(rows // BATCH)]
        self.batches = []
        for view in views:
            labels = torch.from_numpy(view.numpy().argmax(axis=1))
            wrong = torch.rand(BATCH, generator=generator) > 0.7
            labels[wrong] = torch.randint(classes, (int(wrong.sum()),), generator=generator)
            self.batches.append((view, labels))

    def __iter__(self):
        return iter(self.batches)


def size_of(classes):
    return f"K={classes}" + (", 200,000 rows" if classes == 1000 else "")


def fed(metric, batches, prepare=lambda logits, labels: (logits, labels)):
    for logits, labels in batches:
        metric.update(*prepare(logits, labels))
    return metric.compute()


def in_turn(benchmark, ours, *others, rounds=2):
    """CPU seconds and results of all, the others taking their turn in the setup of each round of ours."""
    times = [[] for _ in range(1 + len(others))]
    values = [None] * len(times)

    def clock(place, function):
        start = time.process_time()
        values[place] = function()
        times[place].append(time.process_time() - start)

    def setup():
        for place, other in enumerate(others, 1):
            clock(place, other)

    benchmark.pedantic(lambda: clock(0, ours), setup=setup, rounds=rounds)
    return [min(some) for some in times], values


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_ece(benchmark, table, rows, kind, classes):
    """A1: against torchmetrics without its checks; ours checks. Its float32 sums are off by up to 5e-4."""
    batches = Batches(classes, rows, kind)
    (ours, peer), values = in_turn(
        benchmark,
        lambda: fed(ExpectedCalibrationError(input=kind), batches),
        lambda: fed(MulticlassCalibrationError(classes, n_bins=15, validate_args=False), batches),
    )
    limit = dict(zip(CLASSES, (0.60, 0.50, 0.35), strict=True))[classes]
    table.append(Line("A1", f"ECE, {size_of(classes)}, {kind} / torchmetrics", ours, peer, limit))
    assert float(values[0]) == pytest.approx(float(values[1]), abs=1e-3)


@pytest.mark.parametrize("classes", CLASSES)
def test_classwise(benchmark, table, rows, uncertainty, classes):
    """A2: of probabilities; the peer gets fewer rows where it is slow, as it keeps all and loops over classes."""
    peer_rows = {10: rows, 100: 100_000, 1000: 5_000}[classes]
    batches, fewer = Batches(classes, rows, "probs"), Batches(classes, peer_rows, "probs")
    (ours, peer), values = in_turn(
        benchmark,
        lambda: fed(ClasswiseCalibrationError(input="probs"), batches),
        lambda: fed(uncertainty.ClasswiseCalibrationError(num_classes=classes, num_bins=15), fewer),
        rounds=1 if classes == 1000 else 2,
    )
    scaled = f" ({peer_rows:,} rows, scaled)" if peer_rows < rows else ""
    limit = dict(zip(CLASSES, (1 / 5, 1 / 40, 1 / 400), strict=True))[classes]
    case = f"class-wise ECE, {size_of(classes)}, probs / torch-uncertainty{scaled}"
    table.append(Line("A2", case, ours, peer * rows / peer_rows, limit))
    same = float(fed(ClasswiseCalibrationError(input="probs"), fewer))
    assert same == pytest.approx(float(values[1]), abs=1e-3 / classes)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_adaptive(benchmark, table, rows, uncertainty, kind, classes):
    """A3: the peer takes probabilities, so of logits its time includes the softmax."""
    batches = Batches(classes, rows, kind)
    (ours, peer), values = in_turn(
        benchmark,
        lambda: fed(AdaptiveCalibrationError(input=kind), batches),
        lambda: fed(
            uncertainty.AdaptiveCalibrationError("multiclass", 15, num_classes=classes, validate_args=False),
            batches,
            lambda scores, labels: (scores.softmax(1) if kind == "logits" else scores, labels),
        ),
    )
    table.append(Line("A3", f"adaptive ECE, {size_of(classes)}, {kind} / torch-uncertainty", ours, peer, 1.1))
    assert float(values[0]) == pytest.approx(float(values[1]), abs=1e-4)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_auroc(benchmark, table, rows, kind, classes):
    """A4 and A5: the peer ranks confidences; from logits its time includes softmax, maximum and comparison.

    ``given`` is what remains for it if somebody else has confidences and hits ready.
    """
    batches = Batches(classes, rows, kind)

    def ranked(scores, labels):
        confidence, predicted = (scores.softmax(1) if kind == "logits" else scores).max(1)
        return confidence, predicted == labels

    ready = [ranked(*batch) for batch in batches]
    (ours, peer, given, counted), values = in_turn(
        benchmark,
        lambda: fed(CorrectnessAUROC(input=kind), batches),
        lambda: fed(BinaryAUROC(validate_args=False), batches, ranked),
        lambda: fed(BinaryAUROC(validate_args=False), ready),
        lambda: fed(CorrectnessAUROC(input=kind, rank_bins=RANK_BINS), batches),
    )
    steps = "softmax, maximum" if kind == "logits" else "maximum"
    case = f"{size_of(classes)}, {kind} / torchmetrics exact"
    table.append(Line("A4", f"exact AUROC, {case} with {steps}", ours, peer, 0.9))
    table.append(Line("A4", f"exact AUROC, {case}, confidences given to it alone", ours, given, None))
    table.append(Line("A5", f"AUROC of {RANK_BINS} counts, {case} with {steps}", counted, peer, 1.0))
    # The peer's confidences tie where they round to the same number; ours are log-odds.
    assert float(values[0]) == pytest.approx(float(values[1]), abs=1e-4)
    assert float(values[3]) == pytest.approx(float(values[0]), abs=1e-4)


def shapes(rows):
    """Logits whose confidences lie in different places: spread, near 1, at 1, low, tied, and of two kinds."""
    generator = torch.Generator().manual_seed(0)
    z = 2.0 * torch.randn(rows, 10, generator=generator)
    two = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, 0.3, 6.0)
    wide = 2.0 * torch.randn(rows // 10, 1000, generator=generator)
    named = {"spread": z, "logits x 8": 8 * z, "logits / 10": z / 10, "tied": z.round(), "two kinds": two * z}
    return named | {"K=1000": wide}


def test_error_of_counts(benchmark, table, rows):
    """A5: the error of the histogram, against scikit-learn's exact area over float64 log-odds."""
    errors = {}
    for name, logits in shapes(min(rows, 200_000)).items():
        generator = torch.Generator().manual_seed(1)
        wide = logits.double()
        top, predicted = wide.max(1)
        score = top - wide.scatter(1, predicted[:, None], -torch.inf).logsumexp(1)
        right = torch.rand(len(logits), generator=generator) < score.sigmoid() ** 0.5
        labels = torch.where(right, predicted, (predicted + 1) % logits.shape[1])
        truth = roc_auc_score(right.numpy(), score.numpy())
        counted = CorrectnessAUROC(rank_bins=RANK_BINS)
        counted.update(logits, labels)
        errors[name] = abs(float(counted.compute()) - truth)
        exact = CorrectnessAUROC()
        exact.update(logits, labels)
        assert float(exact.compute()) == pytest.approx(truth, abs=1e-5)  # float32 log-odds may tie
        assert errors[name] < 1e-3  # of 2000 rows a single pair is some 1e-6
    benchmark.pedantic(lambda: counted.compute())
    table.extend(Line("A5", f"error of the counts, {name}", error, None, 1e-5, "") for name, error in errors.items())


def state_bytes(metric):
    states = [getattr(metric, name) for name in metric._defaults]
    return sum(part.nbytes for state in states for part in (state if isinstance(state, list) else [state]))


def test_bytes_of_states(benchmark, table, rows):
    """A6: what the states of sums hold, and how much those of rows hold for each row."""
    batches = Batches(1000, min(rows, 20_000))
    cases = {
        "state of ECE": (ExpectedCalibrationError(), 1024, 1),
        "state of class-wise ECE, a class": (ClasswiseCalibrationError(), 512, 1000),
        f"state of AUROC of {RANK_BINS} counts": (CorrectnessAUROC(rank_bins=RANK_BINS), 512 * 1024, 1),
    }
    for case, (metric, limit, parts) in cases.items():
        fed(metric, batches)
        size = state_bytes(metric)
        table.append(Line("A6", case, size / parts, None, limit, "bytes"))
        metric.update(*next(iter(batches)))
        assert state_bytes(metric) == size, "a state of sums must not grow"
    exact = CorrectnessAUROC()
    benchmark.pedantic(lambda: fed(exact, batches))
    table.append(Line("A6", "state of exact AUROC, a row", state_bytes(exact) / int(exact.count), None, None, "bytes"))


def median_syncs(rank, world, rows):
    """Median wall-clock seconds that a metric takes to sync, those of all metrics in turn."""
    generator = torch.Generator().manual_seed(rank)
    ece, counted = ExpectedCalibrationError(), CorrectnessAUROC(rank_bins=RANK_BINS)
    peer_ece = MulticlassCalibrationError(10, n_bins=15, validate_args=False)
    peer_auroc = BinaryAUROC(validate_args=False)
    for _ in range(rows // BATCH):
        logits = 3.0 * torch.randn(BATCH, 10, generator=generator)
        labels = torch.randint(10, (BATCH,), generator=generator)
        confidence, predicted = logits.softmax(1).max(1)
        for metric in (ece, counted, peer_ece):
            metric.update(logits, labels)
        peer_auroc.update(confidence, predicted == labels)
    seconds = []
    for _ in range(9):
        seconds.append([])
        for metric in (ece, peer_ece, counted, peer_auroc):
            torch.distributed.barrier()
            start = time.perf_counter()
            metric.sync()
            seconds[-1].append(time.perf_counter() - start)
            metric.unsync()
    return [statistics.median(some) for some in zip(*seconds, strict=True)]


def test_sync(benchmark, table, rows):
    """A7: two processes of one machine over gloo, half a million rows each; the median of 9 syncs, wall clock."""
    if benchmark.disabled:
        pytest.skip("two processes import for ten seconds; --benchmark-enable")
    pool = ProcessPool(2)
    try:
        of_ranks = benchmark.pedantic(lambda: pool.run(median_syncs, rows // 2))
    finally:
        pool.close()
    ece, peer_ece, counted, peer_auroc = (1000 * max(some) for some in zip(*of_ranks, strict=True))
    table.append(Line("A7", "sync of ECE / torchmetrics", ece, peer_ece, 1 / 20, "ms"))
    table.append(
        Line("A7", f"sync of AUROC of {RANK_BINS} counts / torchmetrics exact", counted, peer_auroc, 0.1, "ms")
    )
    assert len(of_ranks) == 2


@pytest.mark.parametrize("classes", CLASSES)
def test_report(benchmark, table, rows, classes):
    """A8: everything that a test report holds from one state, against the least that any of it must do."""
    batches = Batches(classes, rows)

    def floor():
        for logits, _ in batches:
            logits.softmax(1).max(1)

    (ours, least), values = in_turn(benchmark, lambda: fed(EvaluationState(TEST_REPORT), batches), floor)
    limit = None if classes == 10 else 3.0
    table.append(Line("A8", f"test report, {size_of(classes)}, logits / softmax and maximum", ours, least, limit))
    assert set(values[0]) == set(TEST_REPORT)


def extra_peak(make, rows):
    """MiB that a metric adds to the peak of a process that has done softmax and maximum of the same batches."""
    batches = list(Batches(1000, min(rows, 10_000)))
    torch.set_num_threads(1)

    def run(update):
        for start in range(0, rows, BATCH):
            update(*batches[start // BATCH % len(batches)])

    # A different factor each time, so that rows do not repeat and logits are new memory, as those of a network are.
    metric, other = make(), make()
    factor = iter(torch.linspace(0.5, 2.0, rows).tolist())
    for logits, _ in batches:
        (logits * next(factor)).softmax(1).max(1)
    other.update(*batches[0])
    factor = iter(torch.linspace(0.5, 2.0, rows).tolist())
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = proc_status("VmRSS")
    run(lambda logits, labels: metric.update(logits * next(factor), labels))
    metric.compute()
    return (proc_status("VmHWM") - before) / 1024


def proc_status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory(benchmark, table, rows):
    """A9: a fresh process for each metric."""
    if benchmark.disabled:
        pytest.skip("a fresh process imports for ten seconds; --benchmark-enable")
    cases = {
        "exact AUROC": ("CorrectnessAUROC()", 40),
        f"AUROC of {RANK_BINS} counts": (f"CorrectnessAUROC(rank_bins={RANK_BINS})", 16),
    }
    for case, (make, limit) in cases.items():
        code = f"from tests.benchmarks.test_metrics import *; print(extra_peak(lambda: {make}, {rows}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        table.append(Line("A9", f"extra peak, {case}, K=1000", float(done.stdout), None, limit, "MiB"))
        assert float(done.stdout) > 0
    benchmark.pedantic(lambda: None)


FAMILIES = {
    "means": [key for key in FULL if not {"bins", "classwise", "ranks", "scores"} & set(METRICS[key].parts)],
    "bins": [key for key in FULL if set(METRICS[key].parts) <= {"bins", "moments"}],
    "ranks but smece": [key for key in REPORT if "ranks" in METRICS[key].parts and key != "smece"],
    "smece": ["smece"],
    "classwise_ece": ["classwise_ece"],
    "ovo_auroc": ["ovo_auroc"],
    "calibration_nll, refinement_nll": ["calibration_nll", "refinement_nll"],
}


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_bootstrap(benchmark, table, family, classes):
    """1000 resamples of 10,000 rows; no goal. Families that need all scores draw 50 and are scaled."""
    keys = FAMILIES[family]
    total = 50 if any("scores" in METRICS[key].parts for key in keys) else 1000
    total = 2 if benchmark.disabled else total
    state = EvaluationState(keys, details=True)
    for logits, labels in Batches(classes, FEW if benchmark.disabled else 10_000):
        state.update(logits, labels)
    start = time.process_time()
    intervals = benchmark.pedantic(lambda: bootstrap_intervals(state, total), rounds=1)
    seconds = (time.process_time() - start) * 1000 / total
    scaled = "" if total == 1000 else f" ({total} resamples, scaled)"
    table.append(Line("", f"1000 resamples of 10,000 rows, {family}, K={classes}{scaled}", seconds, None, None))
    assert set(intervals) == set(keys)


@pytest.mark.gpu
def test_no_wait_for_the_device():
    """A10: nothing in `update` reads a value on the host."""
    logits = 3.0 * torch.randn(512, 10, generator=torch.Generator().manual_seed(0)).cuda()
    labels = logits.argmax(1) * (torch.arange(512, device="cuda") % 3 > 0)
    for input in ("logits", "probs"):
        scores = logits.softmax(1) if input == "probs" else logits
        states = [EvaluationState(REPORT, input=input), EvaluationState(REPORT, rank_bins=RANK_BINS, input=input)]
        states += [EvaluationState([key], input=input) for key in FULL]
        states = [state.cuda() for state in states]
        for state in states:
            state.update(scores, labels)  # tables of bin edges are made once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for state in states:
                state.update(scores, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert float(states[0].compute()["accuracy"]) == pytest.approx(
            float((logits.argmax(1) == labels).double().mean())
        )
