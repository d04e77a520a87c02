"""Stored features: a stage learns from them what it would learn from images, or is refused."""

import copy
import os
import pickle
import signal
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from calib_lightning.core import (
    CachedFeatures,
    ClassificationModule,
    Head,
    Preemption,
    StageSwitch,
    StageTraining,
    StepSeed,
)
from calib_lightning.core.preemption import Preempted
from calib_lightning.data import CleanViews, CropFlip, InMemorySet, ResumableLoader, SplitSpec, ToyDataModule
from calib_lightning.methods import CrossEntropyLoss, Mixup, MixupTransform
from tests.ddp.cases import Dropped, Watch, cosine, digest, sgd, trainer
from tests.ddp.pool import PROCESSES

SEED, ROWS = 3, 99


class DropHead(Head):
    """Two layers, with BatchNorm and dropout: a state that only training steps may move, and random numbers."""

    def __init__(self, in_features, num_classes):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, num_classes)
        )

    def forward(self, features):
        return self.layers(features)


class Note(Callback):
    """What each step saw and made of it, by epoch."""

    def __init__(self):
        self.losses, self.images, self.rows, self.stored, self.features = {}, {}, {}, {}, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        epoch = trainer.current_epoch
        self.losses.setdefault(epoch, []).append(float(outputs["loss"]))
        self.images.setdefault(epoch, []).append(batch[0].clone())
        self.rows.setdefault(epoch, []).append(batch[-1].clone())
        data = trainer.datamodule
        if getattr(data, "stage_features", None) is not None:
            self.features = data.stage_features


class Run:
    """One fit of the toy data with a switch at an epoch, and what came of it."""

    def __init__(
        self,
        folder,
        views,
        *,
        at=2,
        epochs=4,
        world=1,
        augment=True,
        seed=SEED,
        module_seed=SEED,
        data=None,
        cls=ClassificationModule,
        callbacks=(),
        switch=StageSwitch,
        resume=None,
        training=None,
        batch_transform=None,
        **options,
    ):
        seed_everything(module_seed)
        self.data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130) if data is None else data
        self.data.augment = augment
        if batch_transform is None:
            self.module = cls(3, encoder="digits_cnn", optimizer=sgd, scheduler=cosine)
        else:
            self.module = cls(3, encoder="digits_cnn", optimizer=sgd, batch_transform=batch_transform)
        self.note = Note()
        self.switch = switch(at, DropHead, StageTraining(sgd, views=views, **(training or {})))
        seed_everything(seed)
        self.trainer = trainer(
            folder, world, [StepSeed(), self.switch, self.note, *callbacks], max_epochs=epochs, **options
        )
        try:
            self.trainer.fit(self.module, datamodule=self.data, ckpt_path=resume, weights_only=True)
        finally:
            os.environ.pop("PL_GLOBAL_SEED", None)
        self.stage = [loss for epoch, losses in self.note.losses.items() if epoch >= at for loss in losses]
        self.metrics = {key: float(value) for key, value in self.trainer.callback_metrics.items()}
        self.features = self.note.features

    def encoded(self, image):
        """Features of uint8 images, straight from the encoder."""
        encoder = copy.deepcopy(self.module.encoder).eval()
        with torch.no_grad():
            return encoder((image.float() / 255 - 0.5) / 0.24)

    @property
    def image(self):
        return self.data._sets["train"].image


brief = partial(Run, at=0, epochs=1, limit_train_batches=1, limit_val_batches=0)
"""A stage of one step on an encoder that is as it was made."""


def files(folder):
    return sorted(path.name for path in Path(folder).glob("*.pt"))


@contextmanager
def never_computed(monkeypatch):
    def compute(*args):
        raise AssertionError("the features are computed")

    with monkeypatch.context() as patch:
        patch.setattr(CachedFeatures, "_compute", compute)
        yield


@pytest.fixture(scope="module")
def uncached(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("uncached"), CleanViews())


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("cached"), CachedFeatures())


# --- a data module of this package -----------------------------------------------------------------------------------


def test_features_are_those_of_the_encoder_in_evaluation_mode(cached):
    assert cached.features.shape == (ROWS, 1, 96)
    torch.testing.assert_close(cached.features[:, 0], cached.encoded(cached.image), rtol=1e-5, atol=1e-6)
    for epoch in (2, 3):
        for image, rows in zip(cached.note.images[epoch], cached.note.rows[epoch], strict=True):
            assert torch.equal(image, cached.features[rows, 0])
    assert cached.note.images[1][0].shape == (16, 1, 8, 8)


def test_the_stage_is_that_on_clean_images(uncached, cached):
    assert len(cached.stage) == len(uncached.stage) == 14
    assert cached.stage[:10] == pytest.approx(uncached.stage[:10], rel=1e-5)
    assert cached.metrics["val/accuracy"] == pytest.approx(uncached.metrics["val/accuracy"], abs=1e-3)
    assert cached.metrics == pytest.approx(uncached.metrics, rel=1e-3, abs=1e-5, nan_ok=True)
    for name, value in uncached.module.state_dict().items():
        torch.testing.assert_close(cached.module.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_the_stage_before_is_untouched(uncached, cached):
    assert [uncached.note.losses[epoch] for epoch in (0, 1)] == [cached.note.losses[epoch] for epoch in (0, 1)]


def test_each_step_draws_one_of_the_fixed_views_of_a_row(tmp_path):
    run = Run(tmp_path, CachedFeatures(views=3), at=1, epochs=7)
    rows = torch.arange(ROWS)
    crop = CropFlip(seed=SEED)
    views = torch.stack([run.encoded(crop(run.image, rows, view)) for view in range(3)], dim=1)
    torch.testing.assert_close(run.features, views, rtol=1e-5, atol=1e-6)
    drawn = torch.empty(6, ROWS, dtype=torch.int64)
    for epoch in range(1, 7):
        image, index = torch.cat(run.note.images[epoch]), torch.cat(run.note.rows[epoch])
        match = (image.unsqueeze(1) == run.features[index]).all(dim=2)
        assert match.any(dim=1).all()
        drawn[epoch - 1, index] = match.int().argmax(dim=1)
    counts = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert ((counts - 1 / 3).abs() < 0.08).all()
    assert len({tuple(epoch.tolist()) for epoch in drawn}) == 6
    assert (drawn != drawn[0]).any(dim=0).float().mean() > 0.9


def test_batches_have_the_size_of_the_stage(tmp_path):
    run = Run(tmp_path, CachedFeatures(), training={"batch_size": 40}, epochs=3)
    assert [len(rows) for rows in run.note.rows[1]] == [16] * 6 + [3]
    assert [len(rows) for rows in run.note.rows[2]] == [40, 40, 19]
    assert torch.cat(run.note.rows[2]).sort().values.equal(torch.arange(ROWS))


def test_a_device_that_holds_the_images_anyway_changes_nothing(tmp_path, cached):
    run = Run(tmp_path, CachedFeatures(on_device=True))
    assert run.stage == cached.stage
    assert digest(run.module) == digest(cached.module)


def test_half_precision(tmp_path):
    images, features = (
        Run(tmp_path, views, at=1, epochs=3, precision="bf16-mixed") for views in (CleanViews(), CachedFeatures())
    )
    assert features.features.dtype == torch.bfloat16
    assert features.stage == pytest.approx(images.stage, rel=1e-5)


def test_validation_sees_images(tmp_path):
    seen = []

    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(batch.image.shape[1:])

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            with torch.no_grad():
                assert torch.equal(
                    outputs.logits, pl_module.head(type(pl_module.encoder).forward(pl_module.encoder, batch.image))
                )

    Run(tmp_path, CachedFeatures(), at=1, epochs=2, callbacks=[Look()], val_check_interval=2)
    assert len(seen) == 2 * 3 * 2  # epochs, validations in one, batches of one
    assert set(seen) == {(1, 8, 8)}


def test_a_probe_within_a_step_sees_images_too(tmp_path):
    class Probe(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert pl_module(torch.zeros(2, 1, 8, 8)).isfinite().all()

    seed_everything(SEED)
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130)
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    switch = StageSwitch(1, training=StageTraining(sgd, views=CachedFeatures()))
    trainer(tmp_path, 1, [StepSeed(), Probe(), switch], max_epochs=2).fit(module, datamodule=data)


def test_a_later_stage_gets_images_again(tmp_path):
    def go(views, last):
        seed_everything(SEED)
        data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130)
        module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
        note = Note()
        switches = [StageSwitch(at, training=StageTraining(sgd, views=v)) for at, v in ((1, views), (2, last))]
        trainer(tmp_path, 1, [StepSeed(), *switches, note], max_epochs=3).fit(module, datamodule=data)
        os.environ.pop("PL_GLOBAL_SEED", None)
        return note

    images = go(CleanViews(), CleanViews())
    for last, shape in ((CleanViews(), (1, 8, 8)), (CachedFeatures(), (96,))):
        note = go(CachedFeatures(), last)
        assert note.images[1][0].shape[1:] == (96,)
        assert note.images[2][0].shape[1:] == shape
        assert note.losses[2] == pytest.approx(images.losses[2], rel=1e-4)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_second_run_reads_the_file_and_trains_the_same_bits(tmp_path, cached, monkeypatch):
    first = Run(tmp_path, CachedFeatures(folder=str(tmp_path / "a" / "kept")))
    (name,) = files(tmp_path / "a" / "kept")
    assert torch.equal(torch.load(tmp_path / "a" / "kept" / name, weights_only=True), cached.features)
    with never_computed(monkeypatch):
        second = Run(tmp_path, CachedFeatures(folder=str(tmp_path / "a" / "kept")))
        with pytest.raises(AssertionError, match="are computed"):
            Run(tmp_path, CachedFeatures(folder=str(tmp_path / "b")))
    assert second.stage == first.stage == cached.stage
    assert digest(second.module) == digest(first.module) == digest(cached.module)


def test_a_file_is_named_after_what_the_features_depend_on(tmp_path):
    keep = str(tmp_path / "kept")

    def count(views=0, **options):
        brief(tmp_path, CachedFeatures(views=views, folder=keep), **options)
        return len(files(keep))

    assert count() == 1
    assert count() == 1
    assert count(seed=4) == 1  # clean images do not depend on it
    assert count(augment=False) == 1
    assert count(module_seed=4) == 2
    assert count(data=ToyDataModule(SplitSpec(val=30), batch_size=16, train_size=130)) == 3
    assert count(precision="bf16-mixed") == 4
    assert count(views=2) == 5
    assert count(views=3) == 6
    assert count(views=2, seed=4) == 7
    assert count(views=2) == 7


def test_layers_without_weights_are_in_the_name_too(tmp_path):
    class Bent(ClassificationModule):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            for part in self.encoder.modules():
                for name, child in part.named_children():
                    if isinstance(child, nn.ReLU):
                        setattr(part, name, nn.GELU())

    keep = CachedFeatures(folder=str(tmp_path / "kept"))
    plain, bent = brief(tmp_path, keep), brief(tmp_path, keep, cls=Bent)
    assert digest(plain.module.encoder) == digest(bent.module.encoder)
    assert any(isinstance(part, nn.GELU) for part in bent.module.modules())
    assert len(files(tmp_path / "kept")) == 2
    assert not torch.allclose(plain.features, bent.features, atol=1e-3)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "other shape", "other values", "no tensor"])
def test_a_damaged_file_is_replaced(tmp_path, damage):
    keep = tmp_path / "kept"
    good = brief(tmp_path, CachedFeatures(folder=str(keep)))
    (path,) = keep.glob("*.pt")
    whole = path.read_bytes()
    if damage in ("empty", "half", "text"):
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"not a file of torch"}[damage])
    else:
        other = {"other shape": good.features[:-1], "other values": good.features + 1, "no tensor": {"features": 1}}
        torch.save(other[damage], path)
    with pytest.warns(UserWarning, match=r"features-\w+\.pt .*recomputed"):
        again = brief(tmp_path, CachedFeatures(folder=str(keep)))
    assert torch.equal(again.features, good.features)
    assert again.stage == good.stage
    assert torch.equal(torch.load(path, weights_only=True), good.features)


def test_what_an_interrupted_run_has_left_is_not_read(tmp_path, monkeypatch):
    keep = tmp_path / "kept"

    def full(features, file):
        file.write(b"the first half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="disk full"):
            brief(tmp_path, CachedFeatures(folder=str(keep)))
    assert [path.suffix for path in keep.iterdir()] == [".lock"]
    run = brief(tmp_path, CachedFeatures(folder=str(keep)))
    assert torch.equal(torch.load(*keep.glob("*.pt"), weights_only=True), run.features)


def share(folder, number, barrier):
    """One of two runs that want the same features at the same time."""
    torch.set_num_threads(1)
    compute, key = CachedFeatures._compute, CachedFeatures._key

    def slow(*args):
        (Path(folder) / f"computed-{number}").touch()
        time.sleep(1)
        return compute(*args)

    def together(*args):
        found = key(*args)
        barrier.wait(60)
        return found

    CachedFeatures._compute, CachedFeatures._key = slow, together
    run = brief(folder, CachedFeatures(folder=f"{folder}/kept"))
    torch.save((run.features, run.stage), f"{folder}/result-{number}")


def test_two_runs_at_once_compute_the_features_once(tmp_path):
    barrier = PROCESSES.Barrier(2)
    runs = [PROCESSES.Process(target=share, args=(str(tmp_path), number, barrier)) for number in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0, 0]
    (one, losses), (two, same) = (torch.load(tmp_path / f"result-{number}") for number in range(2))
    assert len(list(tmp_path.glob("computed-*"))) == len(files(tmp_path / "kept")) == 1
    assert torch.equal(one, two)
    assert losses == same
    assert torch.equal(one, brief(tmp_path, CachedFeatures()).features)


# --- two processes ---------------------------------------------------------------------------------------------------


def on_ranks(rank, world, folder, views, keep):
    run = Run(folder, CachedFeatures(views=views, folder=keep), world=world, at=1, epochs=3)
    return run.features, digest(run.module), [torch.cat(run.note.rows[epoch]).tolist() for epoch in (1, 2)]


@pytest.mark.parametrize(("views", "filed"), [(0, False), (2, True)])
def test_two_ranks_share_the_work(pool2, tmp_path, views, filed):
    alone = brief(tmp_path, CachedFeatures(views=views))
    keep = str(tmp_path / "kept") if filed else None
    (one, weights, rows), (two, same, others) = pool2.run(on_ranks, str(tmp_path), views, keep)
    assert torch.equal(one, two)
    assert one.shape == alone.features.shape
    assert weights == same
    for mine, theirs in zip(rows, others, strict=True):
        assert sorted(mine + theirs) == list(range(ROWS))
    if filed:
        assert torch.equal(torch.load(tmp_path / "kept" / files(keep)[0], weights_only=True), one)
        (again, *_), _ = pool2.run(on_ranks, str(tmp_path), views, keep)
        assert torch.equal(again, one)


def frozen_on_ranks(rank, world, folder, keep):
    run = brief(folder, CachedFeatures(folder=keep), world=world)
    return run.features


def test_features_of_two_ranks_are_those_of_one(pool2, tmp_path):
    alone = brief(tmp_path, CachedFeatures()).features
    keep = tmp_path / "kept"
    for _ in range(2):
        for features in pool2.run(frozen_on_ranks, str(tmp_path), str(keep)):
            torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-6)
    (path,) = keep.glob("*.pt")
    path.write_bytes(path.read_bytes()[:1000])  # only the first rank sees it, all compute
    for features in pool2.run(frozen_on_ranks, str(tmp_path), str(keep)):
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-6)


def foreign_on_ranks(rank, world, folder):
    run = fit_mine(folder, Mine(), CachedFeatures(), world=world)
    return run.losses, digest(run.module), run.rows


def test_a_loader_of_somebody_elses_on_two_ranks(pool2, tmp_path):
    (losses, weights, rows), (others, same, theirs) = pool2.run(foreign_on_ranks, str(tmp_path))
    assert weights == same
    assert losses != others
    for mine, other in zip(rows, theirs, strict=True):
        assert sorted(mine + other) == list(range(70))


# --- a module and a loader of somebody else's ------------------------------------------------------------------------


class Mine(LightningModule):
    """Plain tuples; between encoder and head lies something that works in place."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
        self.between = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5))
        self.classifier = nn.Linear(32, 3)

    def forward(self, x):
        return self.classifier(self.between(self.body(x)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def rows_of(number=70):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (number,), generator=generator)
    image = torch.randn(number, 1, 8, 8, generator=generator) + label.view(-1, 1, 1, 1)
    return TensorDataset(image, label, torch.arange(number))


class Fitted:
    def __init__(self, module, run, note):
        self.module = module
        self.losses = [loss for losses in note.losses.values() for loss in losses]
        self.rows = [torch.cat(rows).tolist() for rows in note.rows.values()]
        self.shapes = {epoch: {image[0].shape for image in images} for epoch, images in note.images.items()}
        self.metrics = {key: float(value) for key, value in run.callback_metrics.items()}


def fit_mine(folder, module, views, data=None, loader=None, world=1, seed=0, callbacks=(), encoder="body", **options):
    """Two epochs of the module and two of a stage; a training loader of torch, or another one, or a data module."""
    seed_everything(seed)
    note = Note()
    switch = StageSwitch(2, encoder=encoder, head="classifier", training=StageTraining(sgd, views=views))
    data = rows_of() if data is None else data
    options = {"batch_size": 16, "shuffle": True} | options
    loader = DataLoader(data, **options) if loader is None else loader
    run = trainer(folder, world, [StepSeed(), note, switch, *callbacks], max_epochs=4)
    try:
        if isinstance(loader, LightningDataModule):
            run.fit(module, datamodule=loader)
        else:
            run.fit(module, loader, DataLoader(rows_of(), 16))
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)
    return Fitted(module, run, note)


Sample = namedtuple("Sample", "image label row")


class Named(Dataset):
    def __init__(self):
        self.rows = rows_of()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return Sample(*self.rows[row])


class ByName(Mine):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch.image), batch.label)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"generator": 5},
        {"drop_last": True},
        {"shuffle": False},
        {"num_workers": 1},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_the_losses_of_a_module_of_somebody_elses_are_the_same_bits(tmp_path, options):
    def go(views):
        seed_everything(1)
        own = dict(options)
        if "generator" in own:
            own["generator"] = torch.Generator().manual_seed(own["generator"])
        return fit_mine(tmp_path, Mine(), views, **own)

    images, features = go(None), go(CachedFeatures())
    assert len(features.losses) == (16 if options.get("drop_last") else 20)
    assert features.losses == images.losses
    assert features.rows == images.rows
    assert features.metrics == images.metrics
    assert digest(features.module) == digest(images.module)
    assert (features.shapes[1], features.shapes[2]) == ({(1, 8, 8)}, {(32,)})


def test_named_batches_keep_their_names(tmp_path):
    def go(views):
        seed_everything(1)
        return fit_mine(tmp_path, ByName(), views, data=Named())

    assert go(CachedFeatures()).losses == go(None).losses


def test_an_encoder_that_is_the_whole_body(tmp_path):
    class Whole(Mine):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(self.body, self.between)
            self.between = nn.Identity()

    def go(views):
        seed_everything(1)
        return fit_mine(tmp_path, Whole(), views)

    assert go(CachedFeatures()).losses == go(None).losses


@pytest.mark.parametrize("last", [None, CachedFeatures()], ids=["images", "features"])
def test_a_later_stage_of_somebody_elses_gets_images_again(tmp_path, last):
    def go(*views):
        seed_everything(1)
        module, note = Mine(), Note()
        switches = [
            StageSwitch(at, encoder="body", head="classifier", training=StageTraining(sgd, views=view))
            for at, view in enumerate(views, start=1)
        ]
        loader = DataLoader(rows_of(), 16, shuffle=True)
        trainer(tmp_path, 1, [StepSeed(), note, *switches], max_epochs=3).fit(module, loader, DataLoader(rows_of(), 16))
        os.environ.pop("PL_GLOBAL_SEED", None)
        return note.losses

    assert go(CachedFeatures(), last) == go(None, None)


# --- afterwards ------------------------------------------------------------------------------------------------------


class Fail(Callback):
    def __init__(self, error, step=17):
        self.error, self.step = error, step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            assert "forward" in vars(pl_module.encoder)
            raise self.error


def untouched(module, data):
    assert "forward" not in vars(module.encoder)
    assert not module.head._forward_pre_hooks
    assert data.stage_features is None
    assert data.train_dataloader().data.image.ndim == 4
    module.train()
    before = digest(module.encoder)
    module(torch.rand(4, 1, 8, 8)).sum().backward()
    assert digest(module.encoder) != before  # BatchNorm is awake


def test_the_encoder_is_its_own_again(cached):
    assert "forward" not in vars(cached.module.encoder)
    assert not cached.module.head._forward_pre_hooks
    assert cached.data.stage_features is None


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_encoder_is_its_own_again_after_a_failure(tmp_path, error):
    seed_everything(SEED)
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130)
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    switch = StageSwitch(2, DropHead, StageTraining(sgd, views=CachedFeatures()))
    run = trainer(tmp_path, 1, [StepSeed(), switch, Fail(error)], max_epochs=4)
    handler = signal.getsignal(signal.SIGINT)  # Lightning turns it off for good after an interrupt
    try:
        with pytest.raises((RuntimeError, SystemExit)):
            run.fit(module, datamodule=data)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert run.global_step == 17
    untouched(module, data)


def test_the_encoder_is_its_own_again_after_a_failure_to_store(tmp_path, monkeypatch):
    seen = []

    def fail(tensor):
        seen.append(len(tensor))
        raise RuntimeError("no link")

    seed_everything(SEED)
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=130)
    module = ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)
    switch = StageSwitch(0, DropHead, StageTraining(sgd, views=CachedFeatures()))
    monkeypatch.setattr("calib_lightning.core.feature_cache.gather_rows", fail)
    with pytest.raises(RuntimeError, match="no link"):
        trainer(tmp_path, 1, [StepSeed(), switch], max_epochs=1).fit(module, datamodule=data)
    assert seen == [16]
    untouched(module, data)


def test_a_forward_that_an_encoder_already_had_comes_back(tmp_path):
    class Patched(ClassificationModule):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            plain = self.encoder.forward
            self.own = vars(self.encoder)["forward"] = lambda image: 2 * plain(image)

    run = brief(tmp_path, CachedFeatures(), cls=Patched)
    assert vars(run.module.encoder)["forward"] is run.module.own
    encoder = run.module.encoder.eval()
    with torch.no_grad():
        plain = encoder.network((run.image.float() / 255 - 0.5) / 0.24).flatten(1)
    torch.testing.assert_close(run.features[:, 0], 2 * plain, rtol=1e-5, atol=1e-6)


def test_copies_of_the_module_work(tmp_path):
    run = Run(tmp_path, CachedFeatures(), at=1, epochs=2)
    run.module.eval()
    image = torch.rand(4, 1, 8, 8)
    for other in (copy.deepcopy(run.module), pickle.loads(pickle.dumps(run.module))):
        assert torch.equal(other(image), run.module(image))


# --- a stop and a resume ---------------------------------------------------------------------------------------------


def stopped_run(folder, views, stop_after=None, resume=False):
    preemption = Preemption(folder)
    watch = Watch(preemption, stop_after)
    keep = ModelCheckpoint(folder, filename="best", monitor="val/nll", save_last=True, save_on_train_epoch_end=True)
    path = str(Path(folder) / "last.ckpt") if resume else None
    run = None
    with suppress(Preempted):
        run = Run(folder, views, callbacks=[watch, preemption, keep], resume=path)
    return run, watch.rows


@pytest.mark.parametrize("kind", ["memory", "file", "views"])
def test_resuming_changes_no_bit(tmp_path, kind):
    # 7 steps an epoch (99 rows in batches of 16); the stage begins after 14
    def views(folder):
        kept = str(tmp_path / folder / "kept") if kind == "file" else None
        return CachedFeatures(views=2 if kind == "views" else 0, folder=kept)

    whole, rows = stopped_run(tmp_path / "whole", views("whole"))
    for stop_after in (14, 17, 21) if kind == "memory" else (17,):
        folder = tmp_path / str(stop_after)
        stopped, seen = stopped_run(folder, views(str(stop_after)), stop_after)
        assert stopped is None
        resumed, rest = stopped_run(folder, views(str(stop_after)), resume=True)
        assert digest(resumed.module) == digest(whole.module)
        assert resumed.stage == whole.stage[-len(resumed.stage) :]
        assert {epoch: seen.get(epoch, []) + rest.get(epoch, []) for epoch in rows} == rows
        assert resumed.metrics == pytest.approx(whole.metrics, nan_ok=True)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "options", "message"),
    [
        (CachedFeatures(views=2), {"augment": False}, "views is 2, but ToyDataModule does not augment"),
        (CachedFeatures(), {"batch_transform": MixupTransform()}, "is incompatible with MixupTransform"),
        (CachedFeatures(), {"cls": Mixup, "batch_transform": None}, "is incompatible with MixupTransform"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_training(tmp_path, views, options, message):
    steps = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append(batch_idx)

    with pytest.raises(ValueError, match=message):
        Run(tmp_path, views, callbacks=[Count()], **options)
    assert not steps


def test_a_criterion_takes_the_place_of_a_batch_transform(tmp_path):
    run = Run(tmp_path, CachedFeatures(), batch_transform=MixupTransform(), training={"criterion": CrossEntropyLoss()})
    assert run.features is not None


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="views is -1"):
        CachedFeatures(views=-1)
    with pytest.raises(ValueError, match="frozen_bn is 'train', which is incompatible"):
        StageTraining(views=CachedFeatures(), frozen_bn="train")


def test_a_head_within_the_encoder_is_refused(tmp_path):
    class Nested(Mine):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Sequential(self.body, self.between, self.classifier)

    seed_everything(0)
    switch = StageSwitch(1, encoder="classifier", head="classifier.2", training=StageTraining(views=CachedFeatures()))
    with pytest.raises(ValueError, match="The head is part of the encoder"):
        trainer(tmp_path, 1, [switch], max_epochs=2).fit(Nested(), DataLoader(rows_of(), 16))


def test_dropout_outside_of_the_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="features of Dropped differ between two passes"):
        brief(tmp_path, CachedFeatures(), cls=Dropped)


def test_training_below_the_head_is_refused(tmp_path):
    class Thaw(StageSwitch):
        def freeze(self, module, head):
            super().freeze(module, head)
            module.encoder.network[-2].requires_grad_(True)

    with pytest.raises(ValueError, match="A part of ClassificationModule below the head is trained"):
        brief(tmp_path, CachedFeatures(), switch=Thaw)


def test_a_folder_needs_a_head_on_the_encoder_itself(tmp_path):
    class Scaled(ClassificationModule):
        def features(self, image):
            return F.normalize(super().features(image))

    images, features = (Run(tmp_path, views, cls=Scaled) for views in (CleanViews(), CachedFeatures()))
    assert features.stage == pytest.approx(images.stage, rel=1e-5)
    torch.testing.assert_close(features.features[:, 0].norm(dim=1), torch.ones(ROWS))
    with pytest.raises(ValueError, match="does not receive the output of its encoder"):
        Run(tmp_path, CachedFeatures(folder=str(tmp_path / "kept")), cls=Scaled)


def test_an_encoder_that_is_passed_by_is_refused(tmp_path):
    class Around(ClassificationModule):
        def features(self, image):
            return self.encoder.network(image).flatten(1)

    with pytest.raises(ValueError, match=r"returns NoneType or is not called itself"):
        brief(tmp_path, CachedFeatures(), cls=Around)


def test_an_encoder_that_gives_no_tensor_is_refused(tmp_path):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Paired(Mine):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.classifier(self.between(self.pair(self.body(x))[0]))

    with pytest.raises(ValueError, match="Pair returns tuple"):
        fit_mine(tmp_path, Paired(), CachedFeatures(), encoder="pair")


class Transferred(Mine):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] / 2, *batch[1:]]


class Normalised(Mine):
    def forward(self, x):
        return super().forward(x / 2)


class NormalisedInStep(Mine):
    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] / 2, *batch[1:]], batch_idx)


class MixedInStep(Mine):
    def training_step(self, batch, batch_idx):
        return super().training_step([0.7 * batch[0] + 0.3 * batch[0].flip(0), *batch[1:]], batch_idx)


class Reshaped(Mine):
    def forward(self, x):
        return super().forward(x - torch.zeros(1, 1, 8, 1) if x.ndim == 4 else x.view(len(x), 1, -1))


@pytest.mark.parametrize("cls", [Transferred, Normalised, NormalisedInStep, MixedInStep, Reshaped])
def test_images_that_are_changed_on_their_way_are_refused(tmp_path, cls):
    with pytest.raises(ValueError, match="differs from the loader's images"):
        fit_mine(tmp_path, cls(), CachedFeatures())


class Flipped(Dataset):
    """Each row is mirrored with a small probability, in a way of its own."""

    def __init__(self, draw, label=False):
        self.rows, self.draw, self.label = rows_of(), draw, label

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        image, label, row = self.rows[row]
        if self.draw():
            return (image, (label + 1) % 3, row) if self.label else (image.flip(-1), label, row)
        return image, label, row


def _seldom():
    return float(torch.rand(())) < 0.1


class Endless(IterableDataset):
    def __iter__(self):
        return iter(rows_of())


def _dict(samples):
    return {"image": torch.stack([sample[0] for sample in samples])}


class Keyed(Mine):
    def training_step(self, batch, batch_idx):
        image = batch["image"] if isinstance(batch, dict) else batch[0]
        return self(image).square().mean()


def _batches():
    return ResumableLoader(InMemorySet(*rows_of().tensors), 16, shuffle=True, seed=0)


@pytest.mark.parametrize(
    ("cls", "loader", "message"),
    [
        (Mine, lambda: DataLoader(Flipped(_seldom), 16), "differ between two readings"),
        (Mine, lambda: DataLoader(Flipped(_seldom), 16, num_workers=1), "differ between two readings"),
        (Mine, lambda: DataLoader(Flipped(_seldom, label=True), 16), "differ between two readings"),
        (Mine, lambda: DataLoader(Endless(), 16), "cannot read DataLoader in order"),
        (Mine, _batches, "cannot read ResumableLoader in order"),
        (Mine, lambda: DataLoader(rows_of(), batch_sampler=[[0, 1], [2, 3]]), "not with a batch_sampler"),
        (Keyed, lambda: DataLoader(rows_of(), 16, collate_fn=_dict), "batch is a dict; CachedFeatures needs tuples"),
    ],
)
def test_a_loader_that_cannot_be_stored_is_refused(tmp_path, cls, loader, message):
    seed_everything(0)
    module = cls()
    switch = StageSwitch(1, encoder="body", head="classifier", training=StageTraining(views=CachedFeatures()))
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, 1, [StepSeed(), switch], max_epochs=2).fit(module, loader())
    assert "forward" not in vars(module.body)


@pytest.mark.parametrize(
    "views", [CachedFeatures(views=2), CachedFeatures(folder="kept"), CachedFeatures(on_device=True)]
)
def test_options_need_a_data_module_of_this_package(tmp_path, views):
    with pytest.raises(ValueError, match="not plain loaders"):
        fit_mine(tmp_path, Mine(), views)
    assert not list(Path().glob("kept*"))
