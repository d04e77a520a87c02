"""CIFAR-10.1, CIFAR-10.2, CIFAR-10-C, CIFAR-100-C and CIFAR-10H, in the official layouts."""

import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from calib_lightning.data import (
    CIFAR10CDataModule,
    CIFAR10DataModule,
    CIFAR10HDataModule,
    CIFAR100CDataModule,
    CIFAR101DataModule,
    CIFAR102DataModule,
    SplitSpec,
    cifar_shift,
    web_files,
)


def images(size, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (size, 32, 32, 3)).astype(np.uint8)


def batch_of(data, name):
    return next(iter(data.evaluation_loader(name)))


def pixels(data, batch):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return ((batch.image * std + mean) * 255).round().permute(0, 2, 3, 1).numpy()


@pytest.fixture
def cifar101(tmp_path, monkeypatch):
    """The two files of each version, with checksums to match."""
    folder, versions = tmp_path / "site", {}
    folder.mkdir()
    for version, size in (("v4", 23), ("v6", 20)):
        names = [f"cifar10.1_{version}_{kind}.npy" for kind in ("data", "labels")]
        np.save(folder / names[0], images(size))
        np.save(folder / names[1], (np.arange(size) % 10).astype(np.int32))
        versions[version] = (size, *(web_files.md5_of(folder / name) for name in names))
    monkeypatch.setattr(CIFAR101DataModule, "versions", versions)
    return folder


@pytest.mark.parametrize(("version", "size"), [("v4", 23), ("v6", 20)])
def test_cifar10_1(cifar101, tmp_path, version, size):
    data = CIFAR101DataModule(root=tmp_path, version=version)
    data.archives = tuple(a._replace(url=(cifar101 / a.name).as_uri()) for a in data.archives)
    data.prepare_data()
    data.setup()
    name = f"shift/cifar10_1_{version}"
    assert data.set_names == data.evaluation_names == data.predict_names == [name]
    batch = batch_of(data, name)
    assert batch.label.tolist() == [row % 10 for row in range(size)]
    assert batch.label.dtype == torch.int64
    np.testing.assert_array_equal(pixels(data, batch), images(size))
    assert (data.mean, data.num_classes) == (CIFAR10DataModule.mean, 10)
    assert data.class_names[6] == "frog"


def test_an_evaluation_set_has_nothing_to_train_on(cifar101, tmp_path):
    data = CIFAR101DataModule(SplitSpec(val=5000, calibration=5000), root=tmp_path)  # the split of a run
    data.archives = tuple(a._replace(url=(cifar101 / a.name).as_uri()) for a in data.archives)
    data.prepare_data()
    data.setup()
    assert data.val_dataloader() == []
    assert data.calibration_dataloader() is None
    for ask in (data.train_dataloader, lambda: data.train_size, lambda: data.class_counts):
        with pytest.raises(ValueError, match=r"is for evaluation only and has no training images\. Test a trained"):
            ask()


def test_cifar10_1_wrong_checksum(cifar101, tmp_path):
    (cifar101 / "cifar10.1_v6_data.npy").write_bytes(b"<html>not found</html>")
    data = CIFAR101DataModule(root=tmp_path / "new")
    data.archives = tuple(a._replace(url=(cifar101 / a.name).as_uri()) for a in data.archives)
    with pytest.raises(FileNotFoundError, match=r"the download failed: .*web page"):
        data.prepare_data()
    assert not list((tmp_path / "new").rglob("*.npy"))


def test_official_facts():
    assert {key: value[0] for key, value in CIFAR101DataModule.versions.items()} == {"v4": 2021, "v6": 2000}
    assert CIFAR102DataModule.sizes == {"train": 10_000, "test": 2_000}
    assert len(cifar_shift.CORRUPTIONS) == len(set(cifar_shift.CORRUPTIONS)) == 19
    assert CIFAR10CDataModule.packed.md5 == "56bf5dcef84df0e2308c6dcbcbbd8499"
    assert CIFAR100CDataModule.packed.md5 == "11f0ed0f1191edbf9fa23466ae6021d3"


@pytest.mark.parametrize(
    ("subset", "name", "labels"),
    [
        ("test", "shift/cifar10_2", [7] * 6),
        ("train", "shift/cifar10_2_train", [4] * 9),
        ("all", None, [4] * 9 + [7] * 6),
    ],
)
def test_cifar10_2(tmp_path, monkeypatch, subset, name, labels):
    monkeypatch.setattr(CIFAR102DataModule, "sizes", {"train": 9, "test": 6})
    folder = tmp_path / "cifar-10.2"
    folder.mkdir()
    np.savez(folder / "cifar102_train.npz", images=images(9), labels=np.full(9, 4), label_names=np.array(["a"] * 10))
    np.savez(folder / "cifar102_test.npz", images=images(6, 1), labels=np.full(6, 7))
    data = CIFAR102DataModule(root=tmp_path, download=False, subset=subset)
    data.prepare_data()
    data.setup()
    batch = batch_of(data, name or "shift/cifar10_2_all")
    assert batch.label.tolist() == labels
    whole = {"test": images(6, 1), "train": images(9), "all": np.concatenate([images(9), images(6, 1)])}[subset]
    np.testing.assert_array_equal(pixels(data, batch), whole)


def test_cifar10_2_of_another_size(tmp_path):
    folder = tmp_path / "cifar-10.2"
    folder.mkdir()
    np.savez(folder / "cifar102_test.npz", images=images(6), labels=np.arange(6))
    with pytest.raises(ValueError, match=r"cifar102_test.npz holds images uint8 \(6, 32, 32, 3\)"):
        CIFAR102DataModule(root=tmp_path, download=False).setup()


@pytest.fixture
def cifar10c(tmp_path, monkeypatch):
    """Two corruptions of four rows a severity; each pixel tells corruption and row."""
    monkeypatch.setattr(cifar_shift, "_ROWS", 4)
    folder = tmp_path / "site" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    for start, name in ((0, "fog"), (100, "snow")):
        rows = (start + np.arange(20, dtype=np.uint8))[:, None, None, None]
        np.save(folder / f"{name}.npy", np.broadcast_to(rows, (20, 32, 32, 3)).copy())
    np.save(folder / "labels.npy", np.tile(np.arange(4, dtype=np.uint8), 5))
    monkeypatch.setattr(CIFAR10CDataModule, "labels_md5", web_files.md5_of(folder / "labels.npy"))
    packed = tmp_path / "site" / "CIFAR-10-C.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(folder, folder.name)
    found = web_files.Archive(packed.as_uri(), packed.name, web_files.md5_of(packed))
    monkeypatch.setattr(CIFAR10CDataModule, "packed", found)
    return tmp_path / "data"


def test_cifar10_c_severities_are_rows_of_one_file(cifar10c):
    data = CIFAR10CDataModule(root=cifar10c, corruptions=("snow", "fog"), severities=(5, 2))
    data.prepare_data()
    data.setup()
    names = [f"shift/cifar10_c/{name}_{severity}" for name in ("snow", "fog") for severity in (5, 2)]
    assert data.set_names == names
    for name in names:
        batch = batch_of(data, name)
        first = (100 if "snow" in name else 0) + 4 * (int(name[-1]) - 1)
        assert pixels(data, batch)[:, 0, 0, 0].tolist() == [first + row for row in range(4)]
        assert batch.label.tolist() == [0, 1, 2, 3]
        assert batch.index.tolist() == [0, 1, 2, 3]
        assert data.source_rows(name).tolist() == [4 * (int(name[-1]) - 1) + row for row in range(4)]


def test_cifar10_c_is_mapped_not_read(cifar10c):
    data = CIFAR10CDataModule(root=cifar10c, corruptions=("fog",))
    data.prepare_data()
    sets = data.load_more()
    one, two = (sets[f"shift/cifar10_c/fog_{severity}"].image for severity in (1, 2))
    # two severities lie in one block of memory, 4 rows apart
    assert two.data_ptr() - one.data_ptr() == 4 * 32 * 32 * 3


def test_cifar10_c_of_another_size(cifar10c):
    data = CIFAR10CDataModule(root=cifar10c, corruptions=("fog",))
    data.prepare_data()
    np.save(cifar10c / "CIFAR-10-C" / "fog.npy", images(19))
    with pytest.raises(ValueError, match=r"fog.npy holds images uint8 \(19, 32, 32, 3\)"):
        data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": ("mist",)}, "corruptions has 'mist'; it must only have values among gaussian_noise"),
        ({"severities": (0,)}, "severities has 0; it must only have values among 1, 2, 3, 4, 5"),
        ({"severities": ()}, "severities is empty"),
    ],
)
def test_cifar10_c_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10CDataModule(**options)


def test_cifar100_c_is_of_100_classes(tmp_path):
    data = CIFAR100CDataModule(root=tmp_path, download=False, corruptions=("fog",))
    assert data.num_classes == 100
    assert list(data.needed) == ["CIFAR-100-C/fog.npy", "CIFAR-100-C/labels.npy"]
    with pytest.raises(FileNotFoundError, match=r"labels.npy: missing, expected md5 bb4026e9ce52996b95f439544568cdb2"):
        data.prepare_data()


# --- votes of people -------------------------------------------------------------------------------------------------


@pytest.fixture
def with_votes(cifar10_root, real_data, tmp_path):
    """Real CIFAR-10 and the real votes under one root."""
    (tmp_path / CIFAR10.base_folder).symlink_to(cifar10_root / CIFAR10.base_folder)
    (tmp_path / "cifar-10h").mkdir()
    counts = np.load(real_data / "cifar-10h" / "cifar10h-counts.npy")
    np.save(tmp_path / "cifar-10h" / "cifar10h-counts.npy", counts)
    return tmp_path, counts


def test_real_votes(with_votes):
    root, counts = with_votes
    data = CIFAR10HDataModule(SplitSpec(val=100, calibration=50, calibration_from="test"), root=root, download=False)
    data.prepare_data()
    data.setup()
    assert {name: len(rows) for name, rows in data.splits.items()} == {
        "train": 49_900,
        "val": 100,
        "calibration": 50,
        "test": 9_950,
    }
    assert data.identity == CIFAR10DataModule(root=root).identity  # other splits than those of a run are refused
    assert data.label_distributions("val") is None
    assert data.label_distributions("train") is None
    for name in ("test", "calibration"):
        rows = data.source_rows(name)
        found = data.label_distributions(name)
        np.testing.assert_allclose(found, counts[rows] / counts[rows].sum(1, keepdims=True), rtol=1e-12)
    agree = data.label_distributions("test").argmax(1) == data._sets["test"].label
    assert float(agree.double().mean()) == pytest.approx(0.9921, abs=5e-4)


@pytest.mark.parametrize("fault", ["order", "shape", "fractions"])
def test_votes_that_are_not_those_of_the_test_images(with_votes, fault):
    root, counts = with_votes
    wrong = {"order": counts[::-1], "shape": counts[:-1], "fractions": counts / 50}[fault]
    np.save(root / "cifar-10h" / "cifar10h-counts.npy", wrong)
    with pytest.raises(ValueError, match="another order" if fault == "order" else "must hold integers"):
        CIFAR10HDataModule(root=root, download=False).setup()


def test_votes_are_missing(with_votes):
    root, _ = with_votes
    (root / "cifar-10h" / "cifar10h-counts.npy").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"cifar10h-counts.npy does not exist \(download=False\). Set download=True"
    ):
        CIFAR10HDataModule(root=root, download=False).prepare_data()
