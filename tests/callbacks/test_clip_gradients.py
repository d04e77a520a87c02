"""Clipped steps against a plain loop, counted by hand, over a stop and over a switch."""

import csv
import math
import os

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from calib_lightning.callbacks import ClipGradients, RunCheckpoint
from calib_lightning.core import ClassificationModule, Preemption, StageSwitch, StepSeed
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import ToyDataModule
from tests.ddp.cases import Watch, sgd

N, EPOCHS = 128, 3
LONG = {0: 10, 1: 6, 2: 1}  # of the ten batches of each epoch, so many have a gradient that is too long


def trainer(folder, *callbacks, **options):
    return Trainer(
        accelerator="cpu", default_root_dir=folder, logger=CSVLogger(folder, name="", version=""),
        callbacks=list(callbacks), enable_checkpointing=any(isinstance(c, RunCheckpoint) for c in callbacks),
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **options,
    )  # fmt: skip


def logged(folder, key="train/clipped"):
    """What the logger has got, by epoch."""
    with (folder / "metrics.csv").open() as file:
        return {int(row["epoch"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(4)
        layers = torch.nn.Linear(6, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 3, bias=False)
    return torch.nn.Sequential(*layers).double()


def batches():
    """By epoch, ten batches; without biases, images near zero have a gradient near zero."""
    generator = torch.Generator().manual_seed(5)
    for epoch in range(EPOCHS):
        scales = torch.where(torch.arange(10) < LONG[epoch], 1.0, 0.01).double()
        x = torch.randn(10, N, 6, generator=generator, dtype=torch.float64) * scales[:, None, None]
        yield list(zip(x, torch.randint(3, (10, N), generator=generator), strict=True))


class MeanLoss(LightningModule):
    """The recipe as a mean: rate times N, decay through N, clip through N."""

    def __init__(self):
        super().__init__()
        self.net, self.epochs = network(), list(batches())

    def train_dataloader(self):
        x, y = (torch.cat(part) for part in zip(*self.epochs[self.trainer.current_epoch], strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=N)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=12.8, momentum=0.9, weight_decay=3.90625e-6)


def test_a_clipped_sum_is_a_recipe_of_the_mean(tmp_path):
    net, clipped = network(), dict.fromkeys(range(EPOCHS), 0)
    weights = list(net.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    for epoch, rows in enumerate(batches()):
        for x, y in rows:
            gradient = torch.autograd.grad(cross_entropy(net(x), y, reduction="sum"), weights)
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
            clipped[epoch] += norm > 2
            for w, v, g in zip(weights, velocity, gradient, strict=True):
                v.mul_(0.9).add_(min(1.0, 2 / norm) * g + 5e-4 * w.detach())
                w.data.sub_(0.1 * v)
    assert clipped == LONG, "the test needs steps of both kinds"

    module = MeanLoss()
    run = trainer(tmp_path, ClipGradients(0.015625), max_epochs=EPOCHS, reload_dataloaders_every_n_epochs=1)
    run.fit(module)
    assert run.global_step == 30
    for found, expected in zip(module.net.parameters(), weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert logged(tmp_path) == pytest.approx({epoch: count / 10 for epoch, count in clipped.items()})


class Norms(Callback):
    """Gradient norms as they are before or, behind `ClipGradients`, after the clip, by epoch."""

    def __init__(self):
        self.by_epoch = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad.flatten().double() for p in pl_module.parameters() if p.grad is not None]
        self.by_epoch.setdefault(trainer.current_epoch, []).append(float(torch.cat(gradients).norm()))


def toy_fit(folder, clip, *callbacks, epochs=2, stop_after=None, ckpt_path=None, **options):
    seed_everything(11, workers=True)
    data = ToyDataModule(batch_size=16, train_size=160)
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    preemption = Preemption(folder)
    watch, norms, after = Watch(preemption, stop_after), Norms(), Norms()
    callbacks = [StepSeed(), watch, norms, clip, after, *callbacks, preemption, RunCheckpoint(folder, "last")]
    run = trainer(folder, *callbacks, max_epochs=epochs, **options)
    try:
        run.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except Preempted:
        assert stop_after is not None
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)
    return norms.by_epoch, after.by_epoch, run


def share(norms, limit):
    return sum(norm > limit for norm in norms) / len(norms)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Norms of an unhindered run, and a limit that half of the steps of an epoch are above."""
    free, after, _ = toy_fit(tmp_path_factory.mktemp("free"), ClipGradients(1e9))
    assert after == free  # not one was changed
    return sorted(free[0])[4:6]


def test_a_run_stopped_within_an_epoch_logs_the_share_of_the_whole_epoch(tmp_path, whole):
    limit = sum(whole) / 2
    norms, after, _ = toy_fit(tmp_path / "whole", ClipGradients(limit))
    expected = {epoch: share(rows, limit) for epoch, rows in norms.items()}
    assert logged(tmp_path / "whole") == pytest.approx(expected)
    for epoch, rows in norms.items():
        assert after[epoch] == pytest.approx([min(norm, limit) for norm in rows], rel=1e-6)

    for stop in (3, 14):  # within the first epoch, within the second
        epoch = stop // 10
        parts = [share(rows, limit) for rows in (norms[epoch][: stop - 10 * epoch], norms[epoch][stop - 10 * epoch :])]
        assert expected[epoch] not in parts, "the test needs parts that differ from the whole"
        folder = tmp_path / str(stop)
        _, _, run = toy_fit(folder, ClipGradients(limit), stop_after=stop)
        assert run.global_step == stop
        assert epoch not in (logged(folder) if epoch else {})
        toy_fit(folder / "resumed", ClipGradients(limit), ckpt_path=folder / "last.ckpt")
        assert logged(folder / "resumed") == pytest.approx({e: s for e, s in expected.items() if e >= epoch})


def test_a_new_fit_counts_from_nothing(tmp_path, whole):
    clip = ClipGradients(sum(whole) / 2)
    toy_fit(tmp_path / "left", clip, stop_after=3)
    norms, _, _ = toy_fit(tmp_path / "new", clip)
    assert logged(tmp_path / "new") == pytest.approx({e: share(rows, clip.max_norm) for e, rows in norms.items()})


def test_a_stage_behind_a_switch_is_neither_clipped_nor_counted(tmp_path):
    before, after, _ = toy_fit(tmp_path, ClipGradients(1e-3), StageSwitch(1), epochs=3)
    assert after[0] == pytest.approx([1e-3] * 10, rel=1e-6)
    assert sorted(before) == [0, 1, 2]
    for epoch in (1, 2):
        assert after[epoch] == before[epoch]
        assert min(after[epoch]) > 1e-3
    assert logged(tmp_path) == {0: 1.0}
    assert len(logged(tmp_path, "train/nll")) == 3


def test_a_trainer_that_clips_as_well_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gradient_clip_val of the trainer is 0\.5; it must be None"):
        toy_fit(tmp_path, ClipGradients(1.0), gradient_clip_val=0.5)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_that_is_none_is_refused(max_norm):
    with pytest.raises(ValueError, match=rf"max_norm is {max_norm}; it must be above 0 and finite"):
        ClipGradients(max_norm)
