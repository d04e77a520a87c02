"""What a last stage on a frozen encoder costs on images and on stored features; reported, never judged.

Run with ``pytest tests/benchmarks/test_stages.py -m slow -n0 --benchmark-enable -s``: about three minutes. The figures
that are printed are kept in ``STAGES.md``. Times are CPU time of this process on one thread; both sides go through the
whole of a training without validation: Lightning, seeds, preemption, masks, logs.
"""

import os
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything

from calib_lightning.callbacks import RunLogger, RunRecord
from calib_lightning.core import (
    AtomicCheckpointIO,
    CachedFeatures,
    ClassificationModule,
    Preemption,
    StageSwitch,
    StageTraining,
    StepSeed,
)
from calib_lightning.data import BenchmarkDataModule, CleanViews
from calib_lightning.data.source import Source
from calib_lightning.methods import AdaptiveSparsity, CrossEntropyLoss, MaskedBottleneck, MaskedClassifier
from tests.ddp.pool import PROCESSES

CLASSES, ROWS, SIZE, EPOCHS, STAGE_1 = 10, 1280, 32, 40, 350
ENCODER = "resnet18"  # of timm, d = 512


class Noise(BenchmarkDataModule):
    """Random images: what they show does not matter here."""

    mean, std, num_classes = (0.5,) * 3, (0.25,) * 3, CLASSES

    def __init__(self, rows, size):
        super().__init__(batch_size=128)
        self.shape = (rows, 3, size, size)

    def load_train(self):
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(256, self.shape, generator=generator, dtype=torch.uint8)
        return Source(image, torch.arange(len(image)) % CLASSES)

    def load_test(self):
        return Source(torch.zeros(CLASSES, *self.shape[1:], dtype=torch.uint8), torch.arange(CLASSES))


class Clock(Callback):
    """CPU seconds from the start of training to its end, and at the end of each epoch."""

    def on_train_start(self, trainer, pl_module):
        self.start, self.epochs = time.process_time(), []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(time.process_time() - self.start)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)


def fit(folder, data, epochs, switch=None, encoder=ENCODER):
    """CPU seconds since the start at the end of each epoch, and the module."""
    seed_everything(0)
    module = ClassificationModule(CLASSES, criterion=CrossEntropyLoss(), encoder=encoder, optimizer=sgd)
    clock = Clock()
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[StepSeed(), *([] if switch is None else [switch]), RunRecord(folder), Preemption(folder), clock],
        plugins=[AtomicCheckpointIO()],
        logger=RunLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    ).fit(module, datamodule=data)
    os.environ.pop("PL_GLOBAL_SEED", None)
    return clock.epochs, module


def masked(views):
    training = StageTraining(sgd, views=views)
    return MaskedClassifier(0, MaskedBottleneck, AdaptiveSparsity(held_out=False), training=training)


def plain_loop(features, labels, epochs):
    """CPU seconds of a step of the same head on the same features, without Lightning and without masks."""
    head = MaskedBottleneck(features.shape[1], CLASSES)
    optimizer = sgd(head.parameters())
    start = time.process_time()
    for _ in range(epochs):
        for rows in torch.randperm(len(features)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
    return (time.process_time() - start) / (epochs * -(-len(features) // 128))


def test_stage_on_stored_features(benchmark, tmp_path):
    rows, size, epochs, encoder = ROWS, SIZE, EPOCHS, ENCODER
    if benchmark.disabled:
        rows, size, epochs, encoder = 32, 8, 2, {"name": "digits_cnn", "in_channels": 3}
    train = partial(fit, tmp_path, Noise(rows, size), encoder=encoder)
    first, _ = train(2)
    stored = [train(epochs, masked(CachedFeatures()))[0] for _ in range(3)]
    images, _ = train(epochs, masked(CleanViews()))
    cached = min(stored, key=lambda times: times[-1])
    stage_1 = first[1] - first[0]  # the first epoch of a process is slower
    step = (cached[-1] - cached[0]) / ((epochs - 1) * -(-rows // 128))
    plain = min(plain_loop(torch.randn(rows, 512), torch.arange(rows) % CLASSES, epochs) for _ in range(3))
    figures = {
        "images_s": images[-1],
        "stored_s": cached[-1],
        "first_epoch_stored_s": cached[0],
        "images_over_stored": images[-1] / cached[-1],
        "stage_1_epoch_s": stage_1,
        "share_of_350_epochs": cached[-1] / (STAGE_1 * stage_1),
        "step_ms": 1e3 * step,
        "plain_step_ms": 1e3 * plain,
    }
    benchmark.extra_info |= figures
    print("\n" + "\n".join(f"{name}: {value:.4g}" for name, value in figures.items()))
    benchmark.pedantic(train, (1, masked(CachedFeatures())), rounds=1)


class Wide(torch.nn.Module):
    """Features as wide as those of a ResNet-50, for next to nothing."""

    def forward(self, image):
        return image.flatten(1).repeat(1, 11)[:, :2048].contiguous()


def store(folder, rows, views, connection):
    """Send the peak of memory above what was there, in units of the features."""
    import resource  # not on every system

    torch.set_num_threads(1)
    data = Noise(rows, 8)
    data.augment = True
    module = ClassificationModule(CLASSES, encoder="digits_cnn", optimizer=sgd)
    module.encoder, module.head = Wide(), torch.nn.Linear(2048, CLASSES)
    switch = StageSwitch(0, training=StageTraining(sgd, views=CachedFeatures(views, folder)))
    run = partial(
        Trainer, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0
    )
    run = run(limit_train_batches=2, callbacks=[switch], enable_progress_bar=False, enable_model_summary=False)
    data.setup()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run.fit(module, datamodule=data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send(1024 * (peak - before) / (4 * 2048 * rows * max(1, views)))


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs between systems")
@pytest.mark.parametrize(("views", "filed"), [(0, False), (0, True), (2, False)])
def test_memory_of_storing(benchmark, tmp_path, views, filed):
    """Peak of resident memory above that before the fit, by the size of the features: once made, once read."""
    rows = 64 if benchmark.disabled else 45_000
    folder = str(tmp_path) if filed else None

    def once():
        ours, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=store, args=(folder, rows, views, theirs))
        process.start()
        theirs.close()
        ratio = ours.recv()
        process.join()
        return ratio

    if benchmark.disabled:
        assert once() > 0
        return
    ratios = [once() for _ in range(2 if filed else 1)]
    benchmark.extra_info["peak_over_features"] = ratios
    print(f"\nviews={views}, file={filed}: peak {', '.join(f'{ratio:.2f}' for ratio in ratios)} x the features")
    benchmark.pedantic(once, rounds=1)
