"""Data modules and loaders as other packages write them: batches of every form, positions, labels and classes."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from calib_lightning import methods
from calib_lightning.callbacks import RunRecord, SavePredictions
from calib_lightning.core import CachedFeatures, StageSwitch, StageTraining
from calib_lightning.core.own_data import as_batch, with_positions, without_positions
from calib_lightning.methods import CRL, LDAM, BalCAL, CrossEntropy, MaCCal
from calib_lightning.methods.mac_cal import AdaptiveSparsity, MaskedClassifier
from tests.core.foreign_data import Blobs, Bolts, DictBlobs, Dicts, Stream
from tests.ddp.cases import sgd, trainer


def _loaders():
    return {
        "train_dataloaders": DataLoader(Blobs(), batch_size=8, shuffle=True),
        "val_dataloaders": DataLoader(Blobs(15, seed=1), batch_size=8),
    }


class Watch(Callback):
    """Notes the position and the first pixel of every training row, and what came with them."""

    def __init__(self):
        self.index, self.pixel, self.epochs = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        image, _, index = as_batch(batch, "the test")
        self.index += index.tolist()
        self.pixel += image[:, 0, 0, 0].long().tolist()
        self.epochs += [trainer.current_epoch] * len(index)

    def of(self, epoch):
        return [i for i, e in zip(self.index, self.epochs, strict=True) if e == epoch]


def _module(method=CrossEntropy, **options):
    torch.manual_seed(0)
    return method(3, encoder="digits_cnn", optimizer=sgd, **options)


def _mac_cal(num_classes, **options):
    return MaCCal(num_classes, MaskedClassifier(1, sparsity=AdaptiveSparsity(held_out=False)), **options)


@pytest.mark.parametrize("method", [CrossEntropy, CRL, BalCAL, LDAM, _mac_cal])
@pytest.mark.parametrize("data", [Bolts, Dicts, None])
def test_every_method_fits_on_data_of_every_form(tmp_path, method, data):
    module, watch = _module(method), Watch()
    run = trainer(tmp_path, callbacks=[watch], max_epochs=2)
    run.fit(module, **(_loaders() if data is None else {"datamodule": data()}))
    assert run.global_step == 2 * (4 if data is Bolts else 5)
    assert torch.isfinite(run.callback_metrics["val/nll"])
    assert "val/nll" in run.callback_metrics
    if data is not Bolts:
        assert watch.index == watch.pixel
        assert sorted(watch.of(0)) == sorted(watch.of(1)) == [*range(40)] != watch.of(0)
    if method is CRL:
        assert module.history.count.shape == (30 if data is Bolts else 40,)
        assert 0 < module.history.count.sum() < 80
    if method is LDAM:
        labels = torch.tensor(Blobs().targets)
        if data is Bolts:
            labels = labels[run.datamodule.dataset_train.indices]
        margins = methods.ldam_margins(labels.bincount())
        torch.testing.assert_close(module.criterion.margins.double(), margins, rtol=1e-6, atol=0)


class _Tagged(DataLoader):
    def __init__(self, *args, tag, **options):
        super().__init__(*args, **options)
        self.tag = tag


class _AtOnce(Blobs):
    def __getitems__(self, places):
        return [self[place] for place in places]


class _Ready(Blobs):
    """Cannot be read until a worker has been told so."""

    ready = False

    def __getitem__(self, i):
        assert self.ready
        return super().__getitem__(i)


def _make_ready(worker):
    torch.utils.data.get_worker_info().dataset.ready = True


def _doubled(samples):
    image, label = default_collate(samples)
    return image, label.to(torch.int32).unsqueeze(1)  # a column of another width


LOADERS = {
    "shuffle": lambda: DataLoader(Blobs(), batch_size=7, shuffle=True),
    "generator": lambda: DataLoader(Blobs(), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "two workers": lambda: DataLoader(Blobs(), batch_size=7, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Blobs(), batch_size=7, shuffle=True, num_workers=1, persistent_workers=True),
    "worker_init_fn": lambda: DataLoader(
        _Ready(), batch_size=7, shuffle=True, num_workers=1, worker_init_fn=_make_ready
    ),
    "collate_fn": lambda: DataLoader(Blobs(), batch_size=7, shuffle=True, collate_fn=_doubled),
    "batch_sampler": lambda: DataLoader(
        Blobs(), batch_sampler=BatchSampler(RandomSampler(Blobs()), 7, drop_last=False)
    ),
    "at once": lambda: DataLoader(_AtOnce(), batch_size=7, shuffle=True),
    "subclass": lambda: _Tagged(Blobs(), batch_size=7, shuffle=True, tag="mine"),
    "sampler": lambda: DataLoader(Blobs(), batch_size=7, sampler=SubsetRandomSampler([*range(39, -1, -1)])),
}


@pytest.mark.parametrize("name", LOADERS)
def test_positions_are_those_of_the_data_set(tmp_path, name):
    loader, watch = LOADERS[name](), Watch()
    data, collate = loader.dataset, loader.collate_fn
    assert len([*loader]) == 6  # workers that persist have begun
    trainer(tmp_path, callbacks=[watch], max_epochs=2).fit(_module(), loader)
    assert watch.index == watch.pixel
    assert sorted(watch.of(0)) == sorted(watch.of(1)) == [*range(40)]
    assert watch.of(0) != watch.of(1)
    assert loader.dataset is data  # what was given is left as it was
    assert loader.collate_fn is collate
    assert type(with_positions(loader)) is type(loader)


def test_the_order_is_that_which_the_loader_would_have_had(tmp_path, monkeypatch):
    pixels = []
    for _ in range(2):
        watch = Watch()
        trainer(tmp_path, callbacks=[watch], max_epochs=2).fit(_module(), LOADERS["generator"]())
        pixels.append(watch.pixel)
        monkeypatch.setattr("calib_lightning.core.own_data.with_positions", lambda loader: loader)
    assert watch.index == [-1] * 80
    assert pixels[0] == pixels[1]


def test_positions_in_a_subset_are_those_in_the_subset(tmp_path):
    watch, rows = Watch(), [3, 30, 12, 25, 7, 8]
    loader = DataLoader(Subset(Blobs(), rows), batch_size=4, shuffle=True)
    trainer(tmp_path, callbacks=[watch], max_epochs=1).fit(_module(), loader)
    assert sorted(watch.index) == [*range(6)]
    assert watch.pixel == [rows[i] for i in watch.index]


def test_an_index_that_comes_with_the_batch_is_left_alone(tmp_path):
    images, labels = Blobs().images, torch.tensor(Blobs().targets)
    for data in (
        TensorDataset(images, labels, torch.arange(100, 140)),
        [{"image": i, "label": y, "index": 100 + k} for k, (i, y) in enumerate(zip(images, labels, strict=True))],
    ):
        watch = Watch()
        trainer(tmp_path, callbacks=[watch], max_epochs=1).fit(_module(), DataLoader(data, batch_size=8, shuffle=True))
        assert watch.index == [100 + pixel for pixel in watch.pixel]


def test_hooks_of_the_data_module_see_its_own_batches(tmp_path):
    seen = []

    class Hooked(Bolts):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            image, label = batch
            seen.append(type(batch))
            return image, label

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            image, label = batch
            return image.to(device), label.to(device)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            image, label = batch
            return image.clone(), label

    watch, data = Watch(), Hooked()
    trainer(tmp_path, callbacks=[watch], max_epochs=1).fit(_module(), datamodule=data)
    assert seen
    assert watch.pixel == [data.dataset_train.indices[i] for i in watch.index]


def test_a_collate_fn_that_leaves_rows_out_has_no_positions(tmp_path):
    watch = Watch()
    loader = DataLoader(Blobs(), batch_size=8, collate_fn=lambda samples: default_collate(samples[1:]))
    trainer(tmp_path, callbacks=[watch], max_epochs=1).fit(_module(), loader)
    assert watch.index == [-1] * 35


def test_a_module_of_somebody_else_gets_its_own_batches_from_the_same_trainer(tmp_path):
    class Foreign(LightningModule):
        def test_step(self, batch, batch_idx):
            self.seen = type(batch)

    run = trainer(tmp_path, max_epochs=1)
    run.fit(_module(), datamodule=Bolts())
    foreign = Foreign()
    run.test(foreign, datamodule=Bolts(), verbose=False)
    assert foreign.seen is list


# --- evaluation ------------------------------------------------------------------------------------------------------


def _saved(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("shuffle", [False, True])
def test_saved_predictions_are_the_outputs_in_the_order_of_the_data_set(tmp_path, shuffle):
    module, data = _module(), Blobs(15, seed=1)
    run = trainer(tmp_path, callbacks=[SavePredictions(tmp_path)])
    run.test(module, DataLoader(data, batch_size=4, shuffle=shuffle), verbose=False)
    saved = _saved(tmp_path / "test.npz")
    with torch.no_grad():
        expected = module.eval()(data.images).numpy()
    np.testing.assert_allclose(saved["logits"], expected, rtol=1e-4, atol=1e-5)
    assert saved["labels"].tolist() == data.targets
    assert saved["index"].tolist() == [*range(15)]


def test_images_without_labels_are_predicted(tmp_path):
    module, data = _module(), Bolts()
    run = trainer(tmp_path, callbacks=[SavePredictions(tmp_path)])
    data.setup()
    images = data.dataset_test.images
    named = DataLoader([{"image": image} for image in images], batch_size=4, shuffle=True)
    run.predict(module, [data.predict_dataloader(), named, DataLoader(images, batch_size=4)])
    with torch.no_grad():
        expected = module.eval()(images).numpy()
    for place in range(3):
        saved = _saved(tmp_path / f"predict-{place}.npz")
        np.testing.assert_allclose(saved["logits"], expected, rtol=1e-4, atol=1e-5)
        assert saved["labels"].tolist() == [-1] * 15
        assert saved["index"].tolist() == [*range(15)]


class Iterable:
    """No loader of torch."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class LongStream(Stream):
    def __len__(self):
        return 40


def test_a_stream_is_trained_on_and_numbered_as_it_comes(tmp_path):
    module = _module()
    run = trainer(tmp_path, callbacks=[SavePredictions(tmp_path)], max_epochs=1)
    run.fit(module, DataLoader(Stream(), batch_size=8), DataLoader(Stream(), batch_size=8))
    assert run.global_step == 5
    batches = [default_collate([*Blobs()][start : start + 8]) for start in range(0, 40, 8)]
    alone = DataLoader(batches, batch_size=None)
    run.test(module, [DataLoader(Stream(), batch_size=8), Iterable(batches), alone], verbose=False)
    for place in range(3):
        saved = _saved(tmp_path / "test" / f"{place}.npz")
        assert saved["index"].tolist() == [*range(40)]
        assert saved["labels"].tolist() == Blobs().targets


@pytest.mark.parametrize(
    "loader", [DataLoader(LongStream(), batch_size=8), DataLoader([default_collate([*Blobs()])], batch_size=None)]
)
@pytest.mark.filterwarnings("ignore:The training data is not shuffled")
def test_crl_refuses_data_without_positions(tmp_path, loader):
    run = trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="does not identify the sample of each row"):
        run.fit(_module(CRL), loader)
    assert run.global_step == 0
    with pytest.raises(TypeError, match="no data set with a length"):
        run.fit(_module(CRL), Iterable([]))


# --- two processes ---------------------------------------------------------------------------------------------------


def fit_and_test_on_two(rank, world, folder):
    """What the processes of a fit were given, and what a test saved."""
    watch, module = Watch(), _module(CRL)
    run = trainer(folder, world, [watch, SavePredictions(folder)], max_epochs=2)
    loader = DataLoader(Blobs(39), batch_size=5, shuffle=True)
    run.fit(module, loader)
    run.test(module, DataLoader(Blobs(15, seed=1), batch_size=4), verbose=False)
    stream = DataLoader(Stream(rank, world), batch_size=8)
    run.predict(module, stream)
    return watch.index, watch.pixel, watch.epochs, module.history.count.tolist()


def test_two_processes_share_the_positions(pool2, tmp_path):
    one, two = pool2.run(fit_and_test_on_two, str(tmp_path))
    for index, pixel, *_ in (one, two):
        assert index == pixel
    for epoch in (0, 1):
        first, second = ([i for i, e in zip(r[0], r[2], strict=True) if e == epoch] for r in (one, two))
        assert len(first) == len(second) == 20
        assert {*first} | {*second} == {*range(39)}
        assert len({*first} & {*second}) <= 1  # Lightning's sampler repeats a row so that both have as many
    assert one[3] == two[3]
    saved = _saved(tmp_path / "test.npz")
    assert saved["index"].tolist() == [*range(15)]
    assert saved["labels"].tolist() == Blobs(15, seed=1).targets
    stream = _saved(tmp_path / "predict-0.npz")
    assert stream["index"].tolist() == [*range(40)]
    assert stream["labels"].tolist() == Blobs().targets


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [Blobs, DictBlobs])
def test_stored_features_keep_the_positions(tmp_path, data):
    class Features(Watch):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.index += batch.index.tolist()
            self.pixel += batch.label.tolist()
            self.epochs += [trainer.current_epoch] * len(batch.index)

    loader = DataLoader(data(), batch_size=8, shuffle=True)
    switch = StageSwitch(1, training=StageTraining(optimizer=sgd, views=CachedFeatures()))
    watch = Features()
    trainer(tmp_path, callbacks=[switch, watch], max_epochs=3).fit(_module(), loader)
    assert watch.pixel == [Blobs().targets[i] for i in watch.index]
    assert sorted(watch.of(2)) == [*range(40)]


def test_mac_cal_measures_on_a_calibration_split_of_dicts(tmp_path):
    class Calibrated(Dicts):
        def calibration_dataloader(self):
            return DataLoader(DictBlobs(20, seed=2), batch_size=8)

    run = trainer(tmp_path, max_epochs=2)
    run.fit(_module(MaCCal, switch=MaskedClassifier(-1)), datamodule=Calibrated())
    assert 0 <= run.callback_metrics["mac_cal/accuracy"] <= 1


def test_images_of_dicts_are_counted(tmp_path):
    record = RunRecord(tmp_path)
    trainer(tmp_path, callbacks=[record], max_epochs=1).fit(_module(), datamodule=Dicts())
    assert record._images == 40


# --- refusals --------------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"image": IMAGES, "target": 1}, "a dict with the keys 'image', 'target': label is missing"),
        ({"x": IMAGES, "y": 1}, "a dict with the keys 'x', 'y': image and label are missing"),
        ({}, "an empty dict: image and label are missing"),
        ([IMAGES], r"a list of 1 parts \(Tensor\): label is missing"),
        ((IMAGES, torch.zeros(2), torch.zeros(2), 1), "a tuple of 4 parts"),
        ([[IMAGES], torch.zeros(2)], r"a list of 2 parts \(list, Tensor\): image is missing"),
        (IMAGES, "a Tensor: label is missing"),
        ("text", "a str: image and label are missing"),
        (None, "a NoneType: image and label are missing"),
    ],
)
def test_other_batches_are_refused_in_a_sentence(batch, said):
    with pytest.raises(TypeError, match=f"CrossEntropy needs batches .*, but the batch is {said}"):
        _module().training_step(batch, 0)


def test_the_wrapped_loader_leads_back():
    loader = DataLoader(Blobs(), batch_size=4)
    assert without_positions(with_positions(loader)) is loader
    assert without_positions(loader) is loader
    assert with_positions(with_positions(loader)).dataset._drawn_from is loader.dataset
    assert with_positions(loader).dataset.targets == loader.dataset.targets
