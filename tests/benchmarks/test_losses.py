"""What the losses cost beside cross-entropy, and mixup inference beside a plain step; reported, never judged.

Run with ``pytest tests/benchmarks/test_losses.py -m slow -n0 --benchmark-enable -s``: about two minutes. The table that
is printed at the end is kept in ``LOSSES.md``. Times are CPU time of this process on one thread: losses forward and
backward at batch 128, cross-entropy and the other loss taking turns, least of the rounds.
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from calib_lightning import methods
from calib_lightning.core import ClassificationModule
from calib_lightning.types import Batch
from tests.methods.table import LOSSES

CLASSES, ROWS, LIMIT_MS = (10, 100, 1000), 128, 0.6


@pytest.fixture(scope="module")
def table():
    cells = {}
    yield cells
    losses = sorted({name for name, k in cells if isinstance(k, int)})
    if losses:
        print(f"\n\n| loss, ms above cross-entropy | {' | '.join(f'K={k}' for k in CLASSES)} |\n|---|---|---|---|")
        for name in losses:
            print(f"| {name} | {' | '.join(cells.get((name, k), '') for k in CLASSES)} |")
    for (name, what), text in cells.items():
        if isinstance(what, str):
            print(f"{name}, {what}: {text}")


def _cpu(function, calls):
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def _step(loss, logits, labels):
    def step():
        logits.grad = None
        loss(logits, labels).backward()

    return step


@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("row", LOSSES, ids=lambda row: row.module.__name__)
def test_loss(benchmark, table, row, k):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, k, generator=generator)).requires_grad_()
    labels = torch.randint(k, (ROWS,), generator=generator)
    ours, plain = _step(row.build(k), logits, labels), _step(F.cross_entropy, logits, labels)
    if benchmark.disabled:
        ours()
        return
    rounds, calls = 7, 20 if k < 1000 else 5
    pairs = [(_cpu(ours, calls), _cpu(plain, calls)) for _ in range(rounds)]
    above = 1e3 * (min(a for a, _ in pairs) - min(b for _, b in pairs))
    mark = "" if k > 100 or above <= LIMIT_MS else " (above 0.6)"
    table[row.module.__name__, k] = f"{above:.2f}{mark}"
    benchmark.extra_info["ms_above_cross_entropy"] = above
    benchmark(ours)


@pytest.mark.parametrize("encoder", ["digits_cnn", "resnet18_cifar"])
def test_step_of_mixup_inference(benchmark, table, encoder):
    size = (16, 1, 8, 8) if benchmark.disabled else (128, 1, 8, 8) if encoder == "digits_cnn" else (32, 3, 32, 32)
    if benchmark.disabled and encoder != "digits_cnn":
        return
    batch = Batch(torch.randn(size), torch.randint(10, (size[0],)), torch.arange(size[0]))
    transforms = {
        "cross-entropy": None,
        "MIT-L": methods.MITLTransform(),
        "MIT-A": methods.MITATransform(),
        "RegMixup": methods.RegMixupTransform(),
        "mixup": methods.MixupTransform(),
    }
    steps = {}
    for name, transform in transforms.items():
        module = ClassificationModule(10, encoder=encoder, batch_transform=transform)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

        def step(module=module, optimizer=optimizer):
            optimizer.zero_grad()
            module.loss(batch)[0].backward()
            optimizer.step()

        step()
        steps[name] = step
    if benchmark.disabled:
        return
    calls = 20 if encoder == "digits_cnn" else 1
    pairs = [{name: _cpu(step, calls) for name, step in steps.items()} for _ in range(5)]
    for name in list(steps)[1:]:
        ratio = statistics.median(pair[name] / pair["cross-entropy"] for pair in pairs)
        table[f"{name} step / cross-entropy step", f"{encoder}, batch {size[0]}"] = f"{ratio:.2f}"
    plain = statistics.median(pair["cross-entropy"] for pair in pairs)
    table["cross-entropy step", f"{encoder}, batch {size[0]}"] = f"{1e3 * plain:.1f} ms"
    benchmark.pedantic(steps["MIT-L"], rounds=1)
