"""MNIST, Fashion-MNIST and SVHN, in the official layouts."""

import gzip
import hashlib

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import SVHN, FashionMNIST

from calib_lightning.data import FashionMNISTDataModule, MNISTDataModule, SplitSpec, SVHNDataModule
from calib_lightning.data.mnist import read_idx


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """The four files of MNIST with 40 and 20 images."""
    monkeypatch.setattr(MNISTDataModule, "sizes", {"train": 40, "t10k": 20})
    folder, content = tmp_path / "MNIST" / "raw", {}
    folder.mkdir(parents=True)
    for part, size in (("train", 40), ("t10k", 20)):
        image = np.random.RandomState(size).randint(0, 256, (size, 28, 28)).astype(np.uint8)
        label = (np.arange(size) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(image)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(label)))
        content[part] = image, label
    return tmp_path, content


@pytest.mark.parametrize("packed", [True, False])
def test_files_packed_and_not(small_mnist, packed):
    root, content = small_mnist
    for path in () if packed else (root / "MNIST" / "raw").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    data = MNISTDataModule(SplitSpec(val=10), root=root, download=False)
    data.prepare_data()
    data.setup()
    assert data.set_names == ["train", "val", "test"]
    for name, part in (("train", "train"), ("val", "train"), ("test", "t10k")):
        rows = data.source_rows(name)
        np.testing.assert_array_equal(data._sets[name].image[:, 0], content[part][0][rows])
        np.testing.assert_array_equal(data._sets[name].label, content[part][1][rows])


def test_only_what_is_missing_is_downloaded(small_mnist, monkeypatch, tmp_path):
    root, _ = small_mnist
    folder, name = root / "MNIST" / "raw", "t10k-labels-idx1-ubyte.gz"
    site = tmp_path / "site"
    site.mkdir()
    (folder / name).rename(site / name)
    md5 = hashlib.md5((site / name).read_bytes()).hexdigest()
    resources = [(kept, "not looked at") for kept, _ in MNISTDataModule.source.resources if kept != name]
    monkeypatch.setattr(MNISTDataModule.source, "resources", [*resources, (name, md5)])
    monkeypatch.setattr(MNISTDataModule.source, "mirrors", [f"{site.as_uri()}/"])
    with pytest.raises(FileNotFoundError, match=f"{name}: missing") as error:
        MNISTDataModule(root=root, download=False).prepare_data()
    assert str(error.value).count(": missing") == 1
    MNISTDataModule(root=root).prepare_data()
    assert (folder / name).is_file()


FAULTS = {
    "truncated": (lambda raw: gzip.compress(raw)[:-20], "is damaged or truncated"),
    "web page": (lambda raw: b"<html>", "is damaged or truncated"),
    "too short": (lambda raw: gzip.compress(raw[:-1]), "bytes; it must have"),
    "other type": (lambda raw: gzip.compress(raw[:2] + b"\x0d" + raw[3:]), "must hold unsigned bytes"),
    "other shape": (lambda raw: gzip.compress(idx(np.zeros((19, 28, 28), np.uint8))), r"found \(19, 28, 28\)"),
    "empty": (lambda raw: gzip.compress(b""), "found no IDX file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files(small_mnist, fault):
    root, content = small_mnist
    spoil, message = FAULTS[fault]
    path = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(spoil(idx(content["t10k"][0])))
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(root=root, download=False).setup()


def test_real_fashion_mnist(real_data):
    data = FashionMNISTDataModule(SplitSpec(val=5000, calibration=5000), root=real_data, download=False)
    data.prepare_data()
    data.setup()
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 50_000,
        "val": 5_000,
        "calibration": 5_000,
        "test": 10_000,
    }
    train, test = data.load_train(), data.load_test()
    assert torch.bincount(train.label).tolist() == [6000] * 10
    assert torch.bincount(test.label).tolist() == [1000] * 10
    fraction = train.image.double() / 255
    assert (float(fraction.mean()), float(fraction.std())) == pytest.approx((data.mean[0], data.std[0]), abs=1e-4)
    assert data.class_names == tuple(FashionMNIST.classes)
    assert train.label[:3].tolist() == [9, 0, 0]  # ankle boot, two T-shirts


def test_real_mnist_test_images(real_data):
    test = MNISTDataModule(root=real_data, download=False).load_test()
    assert torch.bincount(test.label).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert test.image.shape == (10_000, 1, 28, 28)


def test_read_idx(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "a", (2, 3, 4)), array)


# --- SVHN ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_svhn(tmp_path, monkeypatch):
    """The two .mat files, with label 10 for the digit 0 as in the official ones."""
    content, entries = {}, dict(SVHN.split_list)
    for part, size in (("train", 30), ("test", 20)):
        image = np.random.RandomState(size).randint(0, 256, (32, 32, 3, size)).astype(np.uint8)
        label = (np.arange(size) % 10 + 1).astype(np.uint8)[:, None]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": image, "y": label})
        md5 = hashlib.md5((tmp_path / f"{part}_32x32.mat").read_bytes()).hexdigest()
        entries[part] = [*SVHN.split_list[part][:2], md5]
        content[part] = image, label[:, 0]
    monkeypatch.setattr(SVHN, "split_list", entries)
    monkeypatch.setattr(SVHNDataModule, "needed", {entries[part][1]: entries[part][2] for part in ("train", "test")})
    return tmp_path, content


def test_svhn_label_10_is_the_digit_0(small_svhn):
    root, content = small_svhn
    data = SVHNDataModule(SplitSpec(val=5, calibration=5, choose="proportional"), root=root, download=False)
    data.prepare_data()
    data.setup()
    for name in data.set_names:
        image, label = content["test" if name == "test" else "train"]
        rows = data.source_rows(name)
        np.testing.assert_array_equal(data._sets[name].image, image[..., rows].transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(data._sets[name].label, np.where(label[rows] == 10, 0, label[rows]))
    assert data.class_counts.tolist() == [2] * 10


def test_svhn_wrong_checksum(small_svhn):
    root, _ = small_svhn
    (root / "test_32x32.mat").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match=r"test_32x32.mat: damaged, its md5 is"):
        SVHNDataModule(root=root, download=False).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"test_32x32.mat is incomplete or damaged: remove it"):
        SVHNDataModule(root=root).prepare_data()


def test_svhn_official_checksums():
    assert dict(SVHNDataModule.needed) == {
        "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    }
