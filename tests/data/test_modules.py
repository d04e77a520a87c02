import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from calib_lightning.data import (
    BenchmarkDataModule,
    ContrastiveViews,
    CropFlip,
    DigitsDataModule,
    Normalize,
    Source,
    SplitSpec,
)
from calib_lightning.data import ToyDataModule as Toy

SPLIT = SplitSpec(val=30, calibration=60)


class Made(BenchmarkDataModule):
    """A benchmark of what the test hands in: ten rows, numbered from 100 in their file."""

    num_classes = 2
    mean, std = (0.5,), (0.5,)

    def __init__(self, split=None, image=None, label=None, test_label=None):
        super().__init__(split, batch_size=4)
        self.image = torch.arange(10 * 16).to(torch.uint8).view(10, 1, 4, 4) if image is None else image
        self.label = torch.tensor([0, 1] * 5) if label is None else label
        self.test_label = torch.tensor([0, 1, 1]) if test_label is None else test_label

    def load_train(self):
        return Source(self.image, self.label, torch.arange(100, 110))

    def load_test(self):
        return Source(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), self.test_label)


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def test_number_of_classes_is_known_before_setup():
    assert Toy(num_classes=5).num_classes == 5
    assert DigitsDataModule().num_classes == 10
    assert not Toy().has_validation
    assert Toy(SPLIT).has_validation


def test_sizes_need_setup():
    for attribute in ("train_size", "class_counts", "set_names", "splits", "splits_hash"):
        with pytest.raises(RuntimeError, match=r"ToyDataModule has no data yet. Call prepare_data\(\) and setup\(\)"):
            getattr(Toy(), attribute)


def test_sets_and_their_sizes():
    data = ready(Toy(SPLIT))
    assert data.set_names == ["train", "val", "calibration", "test"]
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 210,
        "val": 30,
        "calibration": 60,
        "test": 150,
    }
    assert data.train_size == 210
    assert data.class_counts.tolist() == [70, 70, 70]
    long_tail = ready(Toy(SplitSpec(imbalance=0.25)))
    assert long_tail.class_counts.tolist() == [100, 50, 25]
    assert long_tail.train_size == 175


def test_setup_twice_reads_once(monkeypatch):
    data = ready(Toy(SPLIT))
    monkeypatch.setattr(data, "load_train", None)
    data.setup("test")
    assert data.train_size == 210


def test_sets_without_images():
    data = ready(Toy())
    assert data.set_names == ["train", "test"]
    assert data.val_dataloader() == []
    assert data.calibration_dataloader() is None
    assert list(data.evaluation_loaders()) == ["test"]
    assert data.source_rows("val").tolist() == []
    with pytest.raises(ValueError, match="name is 'val'; it must be one of the sets with images: train, test"):
        data.evaluation_loader("val")


def test_evaluation_loaders_give_every_row_in_order_unaugmented():
    data = ready(Toy(SPLIT, batch_size=7))
    data.augment = True
    train, test = data.load_train(), data.load_test()
    normalize = Normalize(data.mean, data.std)
    loaders = data.evaluation_loaders() | {"val": data.val_dataloader(), "train": data.evaluation_loader("train")}
    assert list(loaders) == ["test", "calibration", "val", "train"]
    for name, found in loaders.items():
        batches = list(found)
        source, rows = test if name == "test" else train, torch.from_numpy(data.source_rows(name))
        assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(len(rows)))
        assert torch.equal(torch.cat([batch.label for batch in batches]), source.label[rows])
        assert torch.equal(torch.cat([batch.image for batch in batches]), normalize(source.image[rows], rows, 0))
    # a test also reads the calibration split
    assert [len(loader.data) for loader in data.test_dataloader()] == [150, 60]
    assert [len(loader.data) for loader in data.predict_dataloader()] == [150]
    assert len(data.calibration_dataloader().data) == 60


def test_train_loader_shuffles_and_augments_with_the_seed_of_the_run(monkeypatch):
    data = ready(Toy(SPLIT))
    passes = {}
    for seed, augment in ((0, True), (1, True), (0, False)):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        data.augment = augment
        batch = next(iter(data.train_dataloader()))
        image = data.load_train().image[torch.from_numpy(data.source_rows("train"))[batch.index]]
        if augment:
            image = CropFlip(seed=seed)(image, batch.index, 0)
        assert torch.equal(batch.image, Normalize(data.mean, data.std)(image, batch.index, 0))
        passes[seed, augment] = batch.index.tolist()
    assert passes[0, True] == passes[0, False] != passes[1, True]


def test_rows_of_the_source_file_are_kept():
    data = ready(Made(SplitSpec(val=2, calibration=2)))
    rows = np.concatenate([data.source_rows(name) for name in ("train", "val", "calibration")])
    assert sorted(rows) == list(range(100, 110))
    assert data.source_rows("test").tolist() == [0, 1, 2]
    (batch,) = data.val_dataloader()
    image = data.image[data.source_rows("val") - 100]
    assert torch.equal(batch.image, Normalize((0.5,), (0.5,))(image, batch.index, 0))
    with pytest.raises(ValueError, match="name is 'shift'; it must be one of train, val, calibration, test"):
        data.source_rows("shift")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"label": torch.tensor([0, 1, 1, 2, 0, 1, 0, 1, 0, 1])},
            r"label in row 3 of the train file is 2; it must be in 0..1",
        ),
        ({"label": torch.tensor([0, 1, 1, 1, 0, 1, 0, 1, 0, -1])}, r"label in row 9 of the train file is -1"),
        ({"test_label": torch.tensor([0, 7, 0])}, r"label in row 1 of the test file is 7; it must be in 0..1"),
        ({"label": torch.zeros(9, dtype=torch.int64)}, r"train labels .* shape \(9,\); they must be"),
        ({"label": torch.zeros(10)}, r"train labels are torch.float32"),
        ({"label": torch.zeros(10, 1, dtype=torch.int64)}, r"shape \(10, 1\)"),
        ({"image": torch.zeros(10, 1, 4, 4)}, r"train images are torch.float32"),
        ({"image": torch.zeros(10, 4, 4, dtype=torch.uint8)}, r"shape \(10, 4, 4\); they must be torch.uint8"),
        ({"split": SplitSpec(val=10)}, r"val=10 takes 5 of the .* images of class 0"),
    ],
)
def test_bad_files(changed, message):
    with pytest.raises(ValueError, match=message):
        Made(**changed).setup()


def test_saved_splits(tmp_path):
    data = ready(Toy(SPLIT))
    path = tmp_path / "run" / "splits.npz"
    data.save_splits(path)
    data.save_splits(path)
    assert [file.name for file in path.parent.iterdir()] == ["splits.npz"]
    with np.load(path, allow_pickle=False) as saved:
        assert set(saved) == {"train", "val", "calibration", "test", "files", "spec", "hash"}
        for name in ("train", "val", "calibration"):
            np.testing.assert_array_equal(saved[name], data.source_rows(name))
        np.testing.assert_array_equal(saved["test"], np.arange(150))
        assert SplitSpec(**json.loads(str(saved["spec"]))) == SPLIT
        assert str(saved["hash"]) == data.splits_hash
    assert len(data.splits_hash) == 64


def test_failed_save_leaves_the_old_file_alone(tmp_path, monkeypatch):
    data, path = ready(Toy(SPLIT)), tmp_path / "splits.npz"
    path.write_bytes(b"old")

    def full(file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="disk full"):
        data.save_splits(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_hash_follows_the_rows_alone():
    base = ready(Toy(SPLIT)).splits_hash
    assert ready(Toy(SPLIT, batch_size=3)).splits_hash == base
    for other in (SplitSpec(val=60, calibration=30), SplitSpec(val=30, calibration=60, seed=1), SplitSpec(val=90)):
        assert ready(Toy(other)).splits_hash != base


def test_toy_set_is_learnable_but_not_without_errors():
    data = Toy()
    train, test = data.load_train(), data.load_test()
    assert train.image.shape == (300, 1, 8, 8)
    assert test.image.shape == (150, 1, 8, 8)
    fraction = train.image.double() / 255
    assert float(fraction.mean()) == pytest.approx(data.mean[0], abs=0.01)
    assert float(fraction.std()) == pytest.approx(data.std[0], abs=0.01)
    model = LogisticRegression(max_iter=500).fit((train.image.flatten(1) / 255).numpy(), train.label.numpy())
    assert 0.8 < model.score((test.image.flatten(1) / 255).numpy(), test.label.numpy()) < 0.99


def test_toy_set_is_the_same_every_time():
    one, other = Toy(), Toy(train_size=10, num_classes=3)
    assert torch.equal(one.load_train().image[:10], other.load_train().image)
    assert not torch.equal(one.load_train().image[:10], one.load_test().image[:10])
    with pytest.raises(ValueError, match="test_size is 0; it must be at least 1"):
        Toy(test_size=0)


def test_digits():
    data, file = ready(DigitsDataModule()), load_digits()
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 1097,
        "val": 100,
        "calibration": 200,
        "test": 400,
    }
    assert sorted(np.concatenate(list(data.splits.values()))) == list(range(1797))
    assert np.bincount(file.target[data.source_rows("test")]).tolist() == [40] * 10
    for name in data.set_names:
        image, label, _ = next(iter(data.evaluation_loader(name)))
        rows = data.source_rows(name)[: len(label)]
        assert label.tolist() == file.target[rows].tolist()
        ink = (image[:, 0] * data.std[0] + data.mean[0]) * 16
        torch.testing.assert_close(ink.double(), torch.from_numpy(file.images[rows]), rtol=0, atol=0.04)


def test_digits_test_set_does_not_depend_on_the_split():
    rows = [ready(DigitsDataModule(split)).source_rows("test") for split in (None, SplitSpec(seed=5, val=50))]
    np.testing.assert_array_equal(*rows)
    assert ready(DigitsDataModule(SplitSpec(val=50))).set_names == ["train", "val", "test"]


def test_digits_bytes_and_statistics():
    train = DigitsDataModule().load_train()
    assert train.image.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    fraction = train.image.double() / 255
    assert float(fraction.mean()) == pytest.approx(DigitsDataModule.mean[0], abs=5e-5)
    assert float(fraction.std(unbiased=False)) == pytest.approx(DigitsDataModule.std[0], abs=5e-5)


# --- several files and further sets ----------------------------------------------------------------------------------


class Whole(Made):
    """A benchmark with all files and two further sets; the first pixel tells file and row."""

    def load_train(self):
        return self.file(0, 20)

    def load_val(self):
        return self.file(50, 8)

    def load_test(self):
        return self.file(100, 12)

    def load_more(self):
        return {"shift/fog": self.file(150, 6), "ood/noise": self.file(200, 4)._replace(label=torch.full((4,), -1))}

    def file(self, first, size):
        image = torch.zeros(size, 1, 4, 4, dtype=torch.uint8)
        image[:, 0, 0, 0] = first + torch.arange(size)
        return Source(image, torch.arange(size) % 2)


FIRST = {"train": 0, "val": 50, "test": 100, "shift/fog": 150, "ood/noise": 200}


@pytest.mark.parametrize("file", ["train", "val", "test"])
def test_every_set_holds_the_images_of_its_file_and_rows(file):
    data = ready(Whole(SplitSpec(calibration=4, calibration_from=file)))
    assert data.set_names == ["train", "val", "calibration", "test", "shift/fog", "ood/noise"]
    assert data.evaluation_names == ["test", "shift/fog", "ood/noise", "calibration"]
    assert data.predict_names == ["test", "shift/fog", "ood/noise"]
    assert data.source_files == {name: name for name in FIRST} | {"calibration": file}
    for name in data.set_names:
        images = data._sets[name].image[:, 0, 0, 0]
        assert images.tolist() == (FIRST[data.source_files[name]] + data.source_rows(name)).tolist()
    seen = [(data.source_files[name], row) for name in data.set_names for row in data.source_rows(name)]
    assert len(seen) == len(set(seen)) == 50


def test_labels_of_an_out_of_distribution_set_are_not_classes():
    data = Whole()
    data.load_more = lambda: {"ood/noise": data.file(0, 4)}
    with pytest.raises(ValueError, match=r"label in row 0 of the ood/noise file is 0; it must be in -1..-1"):
        data.setup()


def test_shared_split_changes_nothing_but_the_calibration_set():
    data = ready(Whole(SplitSpec(share=True)))
    np.testing.assert_array_equal(data.source_rows("val"), data.source_rows("calibration"))
    assert data.source_files["calibration"] == "val"
    assert data.splits_hash != ready(Whole()).splits_hash


def test_saved_splits_name_the_files(tmp_path):
    data = ready(Whole(SplitSpec(calibration=4, calibration_from="test")))
    data.save_splits(tmp_path / "splits.npz")
    with np.load(tmp_path / "splits.npz", allow_pickle=False) as saved:
        assert json.loads(str(saved["files"])) == data.source_files
        np.testing.assert_array_equal(saved["shift/fog"], np.arange(6))


def test_bytes_in_memory_use_no_workers_unless_their_images_cost_much(monkeypatch):
    data = ready(Toy(SPLIT))
    data.num_workers, data.augment = 2, True
    assert data.train_dataloader().num_workers == 0
    assert data.val_dataloader().num_workers == 0
    data.stage_views = ContrastiveViews()
    assert data.train_dataloader().num_workers == 2


def test_a_module_without_any_images_is_refused():
    class Nothing(BenchmarkDataModule):
        num_classes, mean, std = 2, (0.5,), (0.5,)

    with pytest.raises(ValueError, match="Nothing has no images"):
        Nothing().setup()
