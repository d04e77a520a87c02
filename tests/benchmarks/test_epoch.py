"""An epoch of ours beside a plain loop and beside torch-uncertainty's routine; reported, never judged.

Run with ``pytest tests/benchmarks/test_epoch.py -m slow -n0 --benchmark-enable -s``. All three train the same network
on the same loader of augmented images, so that what is compared is the loop around them.
"""

import statistics
import time

import pytest
import torch
from lightning.pytorch import Trainer

from calib_lightning.callbacks import RunLogger, RunRecord
from calib_lightning.core import AtomicCheckpointIO, Preemption, StepSeed, build_encoder
from calib_lightning.data import BenchmarkDataModule, SplitSpec
from calib_lightning.data.source import Source
from calib_lightning.methods import CrossEntropy

ROWS, PAIRS, NETWORK = 2560, 5, "resnet20_classic"


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class Noise(BenchmarkDataModule):
    """Images of 32 x 32 pixels, cropped and mirrored as those of CIFAR."""

    num_classes, mean, std, augment = 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), True

    def load_train(self):
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(256, (ROWS + 512, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Source(image, torch.arange(len(image)) % 10)


@pytest.fixture
def data():
    module = Noise(SplitSpec(val=512))
    module.setup()
    return module


def _plain(data, folder):
    encoder = build_encoder(NETWORK)
    head = torch.nn.Linear(encoder.num_features, data.num_classes)
    optimizer = _sgd([*encoder.parameters(), *head.parameters()])
    for batch in data.train_dataloader():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(encoder(batch.image)), batch.label).backward()
        optimizer.step()
    encoder.eval()
    right = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            right += int((head(encoder(batch.image)).argmax(1) == batch.label).sum())


def _ours(data, folder):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[StepSeed(), RunRecord(folder), Preemption(folder)],
        plugins=[AtomicCheckpointIO()],
        logger=RunLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(CrossEntropy(data.num_classes, encoder=NETWORK, optimizer=_sgd), datamodule=data)


class Pairs:
    """Batches as tuples, which is what the routine takes."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return ((batch.image, batch.label) for batch in self.loader)


def _torch_uncertainty(data, folder):
    from torch_uncertainty.routines import ClassificationRoutine

    encoder = build_encoder(NETWORK)
    model = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, data.num_classes))
    routine = ClassificationRoutine(
        model, num_classes=data.num_classes, loss=torch.nn.CrossEntropyLoss(), optim_recipe=_sgd(model.parameters())
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(routine, Pairs(data.train_dataloader()), Pairs(data.val_dataloader()))


@pytest.mark.parametrize("peer", ["plain loop", "torch-uncertainty"])
def test_epoch(benchmark, data, tmp_path, peer):
    """CPU seconds of an epoch, ours over the peer's: the median of interleaved pairs and their range."""
    if peer == "torch-uncertainty":
        pytest.importorskip("torch_uncertainty")
    other = _plain if peer == "plain loop" else _torch_uncertainty
    ratios = []

    def seconds(function):
        start = time.process_time()
        function(data, tmp_path)
        return time.process_time() - start

    def pair():
        ratios.append(seconds(_ours) / seconds(other))

    pair()
    ratios.clear()
    benchmark.pedantic(pair, rounds=PAIRS)
    median = statistics.median(ratios)
    benchmark.extra_info |= {"ratio": median, "least": min(ratios), "most": max(ratios)}
    print(f"\nours over {peer}: {median:.3f} (of {PAIRS} pairs, {min(ratios):.3f} to {max(ratios):.3f})")
