import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from calib_lightning.data import CIFAR10DataModule, CIFAR100DataModule, SplitSpec, web_files


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """A folder like that of CIFAR-100 with 200 training and 100 test images, and checksums to match."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    random, lists = np.random.RandomState(0), {}
    for name, size in (("train", 200), ("test", 100)):
        content = {
            "data": random.randint(0, 256, (size, 3072)).astype(np.uint8),
            "fine_labels": (np.arange(size) % 100).tolist(),
            "coarse_labels": (np.arange(size) % 20).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(content))
        lists[name] = content
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {label}" for label in range(100)]}))
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in ("train", "test", "meta")}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5["meta"]})
    return tmp_path, lists


def test_cifar100_reads_images_and_fine_labels(small_cifar100):
    root, content = small_cifar100
    data = CIFAR100DataModule(SplitSpec(calibration=100), batch_size=64, root=root, download=False)
    assert data.num_classes == 100
    data.prepare_data()
    data.setup()
    assert data.class_counts.tolist() == [1] * 100
    mean = torch.tensor([0.5071, 0.4867, 0.4408]).view(3, 1, 1)
    std = torch.tensor([0.2675, 0.2565, 0.2761]).view(3, 1, 1)
    for name, part in (("test", "test"), ("calibration", "train")):
        image, label, _ = next(iter(data.evaluation_loaders()[name]))
        rows = data.source_rows(name)[:64]
        pixel = torch.from_numpy(content[part]["data"][rows].reshape(-1, 3, 32, 32))
        torch.testing.assert_close((image * std + mean) * 255, pixel.float(), rtol=0, atol=1e-3)
        assert label.tolist() == [content[part]["fine_labels"][row] for row in rows]


def test_augmentation_is_for_training_and_can_be_turned_off(small_cifar100):
    root, _ = small_cifar100
    batches = {}
    for augment in (True, False):
        data = CIFAR100DataModule(root=root, download=False, augment=augment)
        data.setup()
        batches[augment] = next(iter(data.train_dataloader()))
    assert torch.equal(batches[True].index, batches[False].index)
    assert (batches[True].image != batches[False].image).flatten(1).any(1).sum() > 100


def test_missing_files_without_download(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        CIFAR10DataModule(root=tmp_path / "nothing", download=False).prepare_data()
    message = str(error.value)
    assert repr(str((tmp_path / "nothing").resolve())) in message
    for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", CIFAR10.meta["md5"])):
        assert f"cifar-10-batches-py/{name}: missing, expected md5 {md5}" in message
    assert "Set download=True, or unpack cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a" in message


def test_setup_without_files_says_the_same(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-100-python/train: missing, expected md5"):
        CIFAR100DataModule(root=tmp_path).setup()


@pytest.mark.parametrize("damaged", ["train", "test", "meta"])
def test_damaged_file(small_cifar100, damaged):
    root, _ = small_cifar100
    path = root / CIFAR100.base_folder / damaged
    path.write_bytes(b"<html>not found</html>")
    found = hashlib.md5(b"<html>not found</html>").hexdigest()
    data = CIFAR100DataModule(root=root, download=False)
    for step in (data.prepare_data, data.setup):
        with pytest.raises(FileNotFoundError, match=f"{damaged}: damaged, its md5 is {found}, expected md5") as error:
            step()
        assert str(error.value).count("expected md5") == 1


def test_failed_download(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "nothing.tar.gz").as_uri())
    monkeypatch.setattr(web_files, "_PAUSES", ())
    with pytest.raises(FileNotFoundError, match=r"the download failed: .*nothing.tar.gz could not be downloaded"):
        CIFAR10DataModule(root=tmp_path / "new").prepare_data()


def test_download_and_unpack(small_cifar100, tmp_path, monkeypatch):
    root, content = small_cifar100
    site = tmp_path / "site" / CIFAR100.filename
    site.parent.mkdir()
    with tarfile.open(site, "w:gz") as archive:
        archive.add(root / CIFAR100.base_folder, CIFAR100.base_folder)
    monkeypatch.setattr(CIFAR100, "url", site.as_uri())
    monkeypatch.setattr(CIFAR100, "tgz_md5", web_files.md5_of(site))
    data = CIFAR100DataModule(root=tmp_path / "new")
    data.prepare_data()
    site.unlink()
    data.prepare_data()  # whole files are not asked for again
    data.setup()
    assert data.train_size == 200
    assert data.class_names[3] == "class 3"
    assert data.splits["train"].tolist() == list(range(200))
    assert data._sets["test"].label.tolist() == content["test"]["fine_labels"]


def test_damaged_files_are_left_alone_and_nothing_is_downloaded(small_cifar100, monkeypatch):
    root, _ = small_cifar100
    path = root / CIFAR100.base_folder / "train"
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr("calib_lightning.data.downloads.fetch", None)
    with pytest.raises(
        FileNotFoundError, match="cifar-100-python is incomplete or damaged: remove it to download it again"
    ):
        CIFAR100DataModule(root=root).prepare_data()
    assert path.stat().st_size == 100


def test_real_cifar10(cifar10_root):
    data = CIFAR10DataModule(SplitSpec(val=5000, imbalance=0.1), root=cifar10_root, download=False)
    data.prepare_data()
    data.setup()
    assert data.train_size == 18388
    assert data.class_counts.tolist() == [int(4500 * 0.1 ** (label / 9)) for label in range(10)]
    train, original = data.load_train(), CIFAR10(cifar10_root, train=False)
    assert torch.bincount(train.label).tolist() == [5000] * 10
    assert train.label[:4].tolist() == [6, 9, 9, 4]  # frog, truck, truck, deer
    mean = train.image.sum((0, 2, 3), dtype=torch.int64) / (50000 * 1024 * 255)
    torch.testing.assert_close(mean, torch.tensor(data.mean), rtol=0, atol=2e-4)
    image, label, index = next(iter(data.test_dataloader()[0]))
    assert index.tolist() == list(range(128))
    assert label.tolist() == original.targets[:128]
    assert label[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane
    std = torch.tensor(data.std).view(3, 1, 1)
    pixel = (image * std + torch.tensor(data.mean).view(3, 1, 1)) * 255
    expected = torch.from_numpy(original.data[:128]).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(pixel, expected, rtol=0, atol=1e-3)


def test_real_cifar10_long_tail_is_that_of_the_official_code(cifar10_root):
    data = CIFAR10DataModule(SplitSpec(imbalance=0.1, seed=1234), root=cifar10_root, download=False)
    data.setup()
    labels, expected = np.array(CIFAR10(cifar10_root).targets), []
    np.random.seed(1234)
    for label, count in enumerate([5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]):
        rows = np.where(labels == label)[0]
        np.random.shuffle(rows)
        expected.extend(rows[:count])
    np.testing.assert_array_equal(data.source_rows("train"), np.sort(expected))
    assert data.train_size == 20431
