"""What Lightning, our module and logging cost a training step over a plain loop; reported, never judged.

Run with ``pytest tests/benchmarks -m slow -n0 --benchmark-enable -s``.
"""

import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from calib_lightning.callbacks import RunLogger, RunRecord
from calib_lightning.core import AtomicCheckpointIO, ClassificationModule, Preemption, StepSeed
from calib_lightning.types import Batch

WARM_UP, STEPS, CLASSES = 50, 500, 100


class Linear(ClassificationModule):
    """The smallest network, so that the loop is what is measured."""

    def __init__(self, num_classes):
        super().__init__(num_classes, encoder="digits_cnn", optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        self.encoder = torch.nn.Flatten()
        self.head.linear = torch.nn.Linear(64, num_classes)


class Clock(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == WARM_UP:
            self.start = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == STEPS:
            self.stop = time.process_time()


class Ready:
    """Batches that are there: loading is not what is measured."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return STEPS + 1

    def __iter__(self):
        return iter([self.batch] * len(self))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(128, 1, 8, 8, generator=generator)
    label = torch.randint(CLASSES, (128,), generator=generator)
    return Ready(Batch(image, label, torch.arange(128)))


def _plain(batches):
    module = Linear(CLASSES)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step, batch in enumerate(batches):
        if step == WARM_UP:
            start = time.process_time()
        if step == STEPS:
            break
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(batch.image), batch.label).backward()
        optimizer.step()
    return 1000 * (time.process_time() - start) / (STEPS - WARM_UP)


def _lightning(batches, folder):
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[StepSeed(), RunRecord(folder), Preemption(folder), clock],
        plugins=[AtomicCheckpointIO()],
        logger=RunLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Linear(CLASSES), train_dataloaders=batches)
    return 1000 * (clock.stop - clock.start) / (STEPS - WARM_UP)


def test_overhead_of_a_step(benchmark, batches, tmp_path):
    """CPU milliseconds a step; the goal is at most 1.2 above the plain loop."""
    plain = min(_plain(batches) for _ in range(3))
    ours = benchmark.pedantic(lambda: _lightning(batches, tmp_path), rounds=1)
    benchmark.extra_info |= {"plain_ms": plain, "ours_ms": ours, "over_plain_ms": ours - plain}
    print(f"\nplain loop {plain:.3f} ms a step, ours {ours:.3f} ms: +{ours - plain:.3f} ms")


@pytest.mark.parametrize("classes", [10, 100])
def test_update_of_all_metrics(benchmark, classes):
    """One update of the shared accumulator at batch 128."""
    from calib_lightning.metrics import EvaluationState

    state = EvaluationState(["accuracy", "nll", "brier", "ece", "signed_gap"])
    logits, labels = torch.randn(128, classes), torch.randint(classes, (128,))
    benchmark(state.update, logits, labels)
    assert int(state.count) >= 128
