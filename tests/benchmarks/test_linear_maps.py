"""What affine maps of logits cost beside the packages that people use for them; reported, never judged.

Run with ``pytest tests/benchmarks/test_linear_maps.py -m slow -n0 --benchmark-enable -s``: some three minutes. Without
``--benchmark-enable`` a few rows pass through everything, which only shows that it still works. Peers are the extra
``bench``; what is not installed is skipped.

Ours and the peer take turns, on one thread; a time is the CPU time of the process, the least of the rounds. The time of
our fits includes their checks and their report.
"""

import logging
import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.posthoc.dirichlet import Dirichlet
from calib_lightning.posthoc.matrix import MatrixScalingODIR
from calib_lightning.posthoc.solver import AdamDescent, GradientDescent
from calib_lightning.posthoc.structured import StructuredMatrixScaling, StructuredVectorScaling
from calib_lightning.posthoc.vector import VectorScaling
from tests.benchmarks.test_metrics import Line, in_turn

pytestmark = [
    pytest.mark.benchmark(timer=time.process_time),
    pytest.mark.filterwarnings("ignore:.*before the optimum", "ignore:.*bound", "ignore:.*no calibration rows"),
]

FEW, ROWS, STRENGTH = 200, 5000, 1e-2


@pytest.fixture(scope="module")
def table():
    lines = []
    yield lines
    print("\n\n| goal | case | ours | peer | ours / peer | limit | reached |\n|---|---|---|---|---|---|---|")
    print("\n".join(map(str, sorted(lines, key=lambda line: line.goal))))


@pytest.fixture
def uncertainty(benchmark):
    if benchmark.disabled:
        pytest.skip("importing torch_uncertainty takes a quarter of a minute; --benchmark-enable")
    logging.disable(logging.WARNING)  # each of its fits warns that no model was given
    yield pytest.importorskip("torch_uncertainty.post_processing")
    logging.disable(logging.NOTSET)


def over_confident(benchmark, classes, seed=0):
    """float32 logits whose best temperature is 2.5; few rows if nothing is measured."""
    generator = torch.Generator().manual_seed(seed)
    z = 2.0 * torch.randn(FEW if benchmark.disabled else ROWS, classes, generator=generator)
    return 2.5 * z, torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)


def odir(inputs, labels, weight, bias):
    """The objective with the strength of this file for lambda and mu."""
    weight, bias = weight.detach().double(), bias.detach().double()
    classes = len(bias)
    off = weight.square().sum() - weight.diagonal().square().sum()
    nll = F.cross_entropy(inputs.double() @ weight.T + bias, labels)
    return float(nll + STRENGTH * off / (classes * (classes - 1)) + STRENGTH * bias.square().mean())


def adam(parameters, loss, epochs):
    """Full-batch Adam with rate 1e-3 by autograd, as users write it."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    for _ in range(epochs):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return parameters


@pytest.mark.parametrize("classes", [10, 100])
def test_dirichlet(benchmark, table, uncertainty, classes):
    """B3: to the optimum, where the peers stop above it."""
    logits, labels = over_confident(benchmark, classes)
    log_probs = logits.log_softmax(1)

    def peer():
        scaler = uncertainty.DirichletScaler(classes, lambda_reg=STRENGTH, mu_reg=STRENGTH)
        scaler.fit(DataLoader(TensorDataset(logits, labels), batch_size=len(labels)), progress=False)
        return scaler.inv_temperature

    def by_adam():
        weight, bias = torch.eye(classes).requires_grad_(), torch.zeros(classes).requires_grad_()

        def loss():
            off = weight.square().sum() - weight.diagonal().square().sum()
            ridge = STRENGTH * (off / (classes * (classes - 1)) + bias.square().mean())
            return F.cross_entropy(F.linear(log_probs, weight, bias), labels) + ridge

        return adam([weight, bias], loss, 1000)

    (ours, theirs, slow), values = in_turn(
        benchmark, lambda: Dirichlet((STRENGTH,)).fit(logits, labels), peer, by_adam, rounds=2
    )
    objectives = [odir(log_probs, labels, *map_) for map_ in ((values[0].weight, values[0].bias), *values[1:])]
    gaps = f"objective {objectives[0]:.7f}, peers {objectives[1]:.7f} and {objectives[2]:.7f}"
    table.append(Line("B3", f"Dirichlet to the optimum, K={classes} / torch-uncertainty; {gaps}", ours, theirs, 0.5))
    table.append(Line("B3", f"the same / Adam, 1000 epochs, K={classes}", ours, slow, None))
    assert objectives[0] <= min(objectives[1:])
    assert values[0].report.converged


@pytest.mark.parametrize("classes", [10, 100])
def test_sweep(benchmark, table, classes):
    """B4: seven strengths against one, and with cross-validation."""
    logits, labels = over_confident(benchmark, classes)
    (sweep, one), values = in_turn(
        benchmark,
        lambda: MatrixScalingODIR(folds=None).fit(logits, labels),
        lambda: MatrixScalingODIR((STRENGTH,)).fit(logits, labels),
    )
    table.append(Line("B4", f"seven strengths / one fit, K={classes}", sweep, one, 3.0))
    assert values[0].report.nll_after < values[0].report.nll_before
    start = time.process_time()
    crossed = MatrixScalingODIR(folds=2 if benchmark.disabled else 5).fit(logits, labels)
    table.append(Line("B4", f"the same in 5 folds / one fit, K={classes}", time.process_time() - start, one, None))
    assert crossed.report.nll_after < crossed.report.nll_before


@pytest.mark.parametrize("classes", [10, 100])
def test_vector(benchmark, table, classes):
    """B5 and B6."""
    logits, labels = over_confident(benchmark, classes)
    epochs = 10 if benchmark.disabled else 1000

    def by_adam():
        weight, bias = torch.ones(classes).requires_grad_(), torch.zeros(classes).requires_grad_()
        return adam([weight, bias], lambda: F.cross_entropy(logits * weight + bias, labels), epochs)

    (ours, slow), values = in_turn(benchmark, lambda: VectorScaling().fit(logits, labels), by_adam)
    weight, bias = (part.detach().double() for part in values[1])
    nll = float(F.cross_entropy(logits.double() * weight + bias, labels))
    best = values[0].report.nll_after
    case = f"vector scaling, K={classes} / Adam, 1000 epochs; NLL {best:.7f}, peer {nll:.7f}"
    table.append(Line("B5", case, ours, slow, 0.1))
    assert best <= nll
    for solver in (GradientDescent(epochs=epochs), AdamDescent(epochs=epochs)):
        report = VectorScaling(solver).fit(logits, labels).report
        case = f"NLL of vector scaling by {type(solver).__name__} above the least, K={classes}"
        table.append(Line("B6", case, report.nll_after - best, None, None, "nats"))
        assert not report.converged


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(
    ("cls", "name"), [(StructuredVectorScaling, "SVSCalibrator"), (StructuredMatrixScaling, "SMSCalibrator")]
)
def test_structured(benchmark, table, cls, name, classes):
    """No goal."""
    peers = pytest.importorskip("probmetrics.calibrators")
    logits, labels = over_confident(benchmark, classes)
    probs = logits.double().softmax(1).numpy()

    def peer():
        calibrator = getattr(peers, name)()
        calibrator.fit(probs, labels.numpy())
        return calibrator.predict_proba(probs)

    (ours, theirs), values = in_turn(benchmark, lambda: cls().fit(logits, labels), peer, rounds=1)
    nll = F.nll_loss(torch.from_numpy(values[1]).log(), labels).item()
    case = f"{cls.__name__}, K={classes} / probmetrics; NLL {values[0].report.nll_after:.7f}, peer {nll:.7f}"
    table.append(Line("", case, ours, theirs, None))
    assert values[0].report.nll_after == pytest.approx(nll, abs=1e-3)
