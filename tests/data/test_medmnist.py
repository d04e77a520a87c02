import hashlib
from pathlib import Path

import medmnist
import numpy as np
import pytest
import torch
from medmnist.info import INFO

from calib_lightning.data import SplitSpec
from calib_lightning.data.medmnist import MedMNISTDataModule

SIZES = {"train": 24, "val": 16, "test": 8}
# name: images of train, val, test; classes; channels (Yang et al., 2023, table 2)
TABLE = {
    "pathmnist": (89996, 10004, 7180, 9, 3),
    "dermamnist": (7007, 1003, 2005, 7, 3),
    "octmnist": (97477, 10832, 1000, 4, 1),
    "pneumoniamnist": (4708, 524, 624, 2, 1),
    "retinamnist": (1080, 120, 400, 5, 3),
    "breastmnist": (546, 78, 156, 2, 1),
    "bloodmnist": (11959, 1712, 3421, 8, 3),
    "tissuemnist": (165466, 23640, 47280, 8, 1),
    "organamnist": (34561, 6491, 17778, 11, 1),
    "organcmnist": (12975, 2392, 8216, 11, 1),
    "organsmnist": (13932, 2452, 8827, 11, 1),
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Write a small file of a set, its counts to match; further arrays replace those of the file."""

    def write(name="bloodmnist", size=28, **other):
        monkeypatch.setitem(INFO[name], "n_samples", SIZES)
        random, content = np.random.RandomState(0), {}
        colours = (3,) if INFO[name]["n_channels"] == 3 else ()
        for part, count in SIZES.items():
            content[f"{part}_images"] = random.randint(0, 256, (count, size, size, *colours)).astype(np.uint8)
            content[f"{part}_labels"] = (np.arange(count) % len(INFO[name]["label"])).astype(np.uint8)[:, None]
        content |= other
        path = tmp_path / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
        np.savez(path, **content)
        return path, content

    return write


def _module(path, **options):
    return MedMNISTDataModule(root=path.parent, download=False, name=path.stem.split("_")[0], **options)


@pytest.mark.parametrize(("name", "size"), [("bloodmnist", 28), ("tissuemnist", 28), ("octmnist", 64)])
def test_images_and_labels_are_those_of_the_file(small, name, size):
    path, content = small(name, size)
    data = _module(path, size=size)
    data.prepare_data()
    data.setup()
    assert data.set_names == ["train", "val", "calibration", "test"]
    for part in SIZES:
        image, label, _ = next(iter(data.evaluation_loader(part)))
        assert label.tolist() == content[f"{part}_labels"].ravel().tolist()
        channels = INFO[name]["n_channels"]
        expected = torch.from_numpy(content[f"{part}_images"].reshape(-1, size, size, channels)).permute(0, 3, 1, 2)
        torch.testing.assert_close((image * 0.5 + 0.5) * 255, expected.float(), rtol=0, atol=1e-3)


def test_by_default_calibration_is_the_official_validation_set(small):
    path, _ = small()
    data = _module(path)
    data.setup()
    assert data.has_validation
    assert data.source_files == {"train": "train", "val": "val", "calibration": "val", "test": "test"}
    assert data.source_rows("calibration").tolist() == data.source_rows("val").tolist() == list(range(16))


def test_without_share_no_image_is_in_two_sets(small):
    path, _ = small()
    split = SplitSpec(calibration=8, calibration_from="val")
    data = _module(path, split=split)
    data.setup()
    assert data.source_files == {"train": "train", "val": "val", "calibration": "val", "test": "test"}
    val, calibration = data.source_rows("val"), data.source_rows("calibration")
    assert sorted([*val, *calibration]) == list(range(16))
    assert len(calibration) == 8


def test_only_training_images_are_augmented_and_only_if_asked_for(small):
    path, content = small()
    pixels = torch.from_numpy(content["train_images"]).permute(0, 3, 1, 2)
    for augment in (True, False):
        data = _module(path, augment=augment)
        data.setup()
        image, _, index = next(iter(data.train_dataloader()))
        same = ((image * 0.5 + 0.5) * 255 - pixels[index]).abs().flatten(1).amax(1) < 1e-2
        assert bool(same.all()) is not augment


@pytest.mark.parametrize("name", TABLE)
def test_facts_of_every_set(name):
    data = MedMNISTDataModule(name=name, size=128)
    assert (data.num_classes, len(data.mean), len(data.std)) == (TABLE[name][3], TABLE[name][4], TABLE[name][4])
    assert data.class_names == tuple(INFO[name]["label"][str(label)] for label in range(data.num_classes))
    assert tuple(INFO[name]["n_samples"].values()) == TABLE[name][:3]
    assert data.archives[0].name == f"{name}_128.npz"
    assert data.archives[0].md5 == INFO[name]["MD5_128"]
    assert f"/{name}_128.npz" in data.archives[0].url
    assert MedMNISTDataModule(name=name).archives[0].name == f"{name}.npz"


def test_every_set_but_those_that_do_not_fit():
    refused = {name for name in INFO if name not in TABLE}
    assert refused == {"chestmnist", *(name for name in INFO if name.endswith("3d"))}
    data = MedMNISTDataModule(name="bloodmnist")
    assert data.class_names[0] == "basophil"
    assert data.class_names[7] == "platelet"
    assert data.archives[0].md5 == "7053d0359d879ad8a5505303e11de1dc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "chestmnist"}, "That set has several labels per image"),
        ({"name": "organmnist3d"}, "That set is 3-D"),
        ({"name": "mnist"}, "name is 'mnist'; it must be one of pathmnist, dermamnist"),
        ({"size": 32}, "size is 32; it must be one of 28, 64, 128, 224"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MedMNISTDataModule(**options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"val_images": np.zeros((15, 28, 28, 3), np.uint8)}, r"val_images is uint8 of shape \(15, 28, 28, 3\)"),
        ({"train_images": np.zeros((24, 28, 28), np.uint8)}, r"it must hold integers of shape \(24, 28, 28, 3\)"),
        ({"test_labels": np.zeros(8, np.uint8)}, r"test_labels is uint8 of shape \(8,\)"),
        ({"train_labels": np.full((24, 1), 0.5)}, "train_labels is float64"),
        (
            {"train_labels": np.full((24, 1), 8, np.uint8)},
            r"label in row 0 of the train file is 8; it must be in 0\.\.7",
        ),
        ({"test_images": np.array([{}] * 8)}, "Python objects"),
    ],
)
def test_a_file_that_is_not_that_of_the_set(small, other, message):
    path, _ = small(**other)
    with pytest.raises(ValueError, match=message) as error:
        _module(path).setup()
    assert "file is 8" in str(error.value) or str(path) in str(error.value)


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_missing_file(tmp_path, step):
    data = MedMNISTDataModule(name="breastmnist", size=64, root=tmp_path / "nothing", download=False)
    with pytest.raises(FileNotFoundError, match=r"breastmnist_64.npz: missing") as error:
        getattr(data, step)()
    assert repr(str(tmp_path / "nothing")) in str(error.value)
    assert "Set download=True, or put breastmnist_64.npz (md5 " in str(error.value)


@pytest.fixture
def served(small, tmp_path, monkeypatch):
    """A module that downloads from a folder, and the file in that folder."""
    path, _ = small()
    source = path.rename(tmp_path / "served.npz")
    monkeypatch.setitem(INFO["bloodmnist"], "url", source.as_uri())
    monkeypatch.setitem(INFO["bloodmnist"], "MD5", hashlib.md5(source.read_bytes()).hexdigest())
    return source, lambda: MedMNISTDataModule(root=tmp_path / "root")


def test_download(served):
    source, module = served
    module().prepare_data()
    source.unlink()
    module().prepare_data()  # the file is there, so the source is not needed
    data = module()
    data.setup()
    assert data.train_size == 24


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>busy</html>", b"PK other bytes"])
def test_a_download_of_something_else(served, content):
    source, module = served
    source.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"the download failed: .*(a web page|expected)"):
        module().prepare_data()
    assert not (module().root / "bloodmnist.npz").exists()


def test_a_file_with_another_checksum_is_taken_if_its_counts_are_right(small):
    path, _ = small()
    assert hashlib.md5(path.read_bytes()).hexdigest() != INFO["bloodmnist"]["MD5"]
    data = MedMNISTDataModule(root=path.parent)
    data.prepare_data()
    data.setup()
    assert data.train_size == 24


@pytest.mark.parametrize("content", [b"<html>busy</html>", b"damaged"])
def test_a_damaged_file(small, content):
    path, _ = small()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"web page|damaged") as error:
        _module(path).setup()
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("breastmnist", {"train": [147, 399], "val": [21, 57], "test": [42, 114]}),
        ("pneumoniamnist", {"train": [1214, 3494], "val": [135, 389], "test": [234, 390]}),
    ],
)
def test_real_files(real_data, name, counts):
    root = real_data / "medmnist"
    data = MedMNISTDataModule(name=name, root=root, download=False)
    data.prepare_data()
    data.setup()
    loader = getattr(medmnist, INFO[name]["python_class"])
    for part, expected in counts.items():
        original = loader(split=part, root=str(root), download=False)
        labels, images = [], []
        for image, label, _ in data.evaluation_loader(part):
            labels += label.tolist()
            images.append(image)
        assert np.bincount(labels).tolist() == expected
        assert labels == original.labels.ravel().tolist()
        pixels = torch.from_numpy(original.imgs)[:, None].float()
        torch.testing.assert_close((torch.cat(images) * 0.5 + 0.5) * 255, pixels, rtol=0, atol=1e-3)


def test_real_labels_are_in_the_order_of_published_outputs(real_data):
    path = Path(real_data) / "logits" / "expected_cost" / "pneumoniamnist_resnet50" / "targets.npy"
    data = MedMNISTDataModule(name="pneumoniamnist", root=real_data / "medmnist", download=False)
    assert data.load_test().label.tolist() == np.load(path).tolist()
