import hashlib
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import DTD

from calib_lightning.data import SplitSpec
from calib_lightning.data.textures import TexturesDataModule

CLASSES = ["banded", "dotted", "woven"]
COUNT = 4  # images of each class in each file
PARTS = ("train", "val", "test")


def _grey(label):
    return 60 * label + 40


def _write(root):
    """The official layout with 3 classes: partition 2 is partition 1 with its files in turn."""
    folder = root / "dtd"
    (folder / "labels").mkdir(parents=True)
    lists = {part: [] for part in PARTS}
    for label, name in enumerate(CLASSES):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3 * COUNT):
            file = f"{name}/{name}_{number:04}.jpg"
            Image.new("RGB", (50 + number, 40), (_grey(label),) * 3).save(folder / "images" / file)
            lists[PARTS[number % 3]].append(file)
    (folder / "images" / "banded" / ".directory").touch()
    for shift in range(2):
        for place, part in enumerate(PARTS):
            content = "".join(f"{file}\n" for file in lists[PARTS[(place + shift) % 3]])
            (folder / "labels" / f"{part}{shift + 1}.txt").write_text(content)
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(TexturesDataModule, "num_classes", 3)
    monkeypatch.setattr(TexturesDataModule, "class_count", COUNT)


def _module(root, split=None, **options):
    data = TexturesDataModule(split, root=root, download=False, size=16, **options)
    data.prepare_data()
    return data


@pytest.mark.parametrize("partition", [1, 2])
def test_files_and_labels_are_those_of_torchvision(tmp_path, partition):
    _write(tmp_path / "dtd")  # torchvision puts the folder dtd into a folder dtd
    data = _module(tmp_path / "dtd", partition=partition)
    data.setup()
    assert data.class_names == tuple(CLASSES)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for part, source in (("train", data.load_train()), ("val", data.load_val()), ("test", data.load_test())):
        original = DTD(tmp_path, part, partition)
        assert [source.image.path(row) for row in range(len(source.image))] == original._image_files
        assert source.label.tolist() == original._labels
        image, label, _ = next(iter(data.evaluation_loader(part)))
        assert image.shape[1:] == (3, 16, 16)
        expected = _grey(label).float().view(-1, 1, 1, 1).expand_as(image)
        torch.testing.assert_close((image * std + mean) * 255, expected, rtol=0, atol=3)


def test_no_image_is_in_two_sets(tmp_path):
    _write(tmp_path)
    data = _module(tmp_path)
    data.setup()
    assert data.source_files == {"train": "train", "val": "val", "calibration": "val", "test": "test"}
    val, calibration = data.source_rows("val"), data.source_rows("calibration")
    assert sorted([*val, *calibration]) == list(range(3 * COUNT))
    assert np.bincount(calibration // COUNT).tolist() == [2, 2, 2]
    sources = (data.load_train(), data.load_val(), data.load_test())
    names = [name for source in sources for name in source.image.names.tolist()]
    assert len(set(names)) == len(names) == 9 * COUNT


def test_validation_and_calibration_may_share(tmp_path):
    _write(tmp_path)
    data = _module(tmp_path, SplitSpec(share=True))
    data.setup()
    assert data.source_rows("val").tolist() == data.source_rows("calibration").tolist() == list(range(3 * COUNT))


def _drop_line(folder):
    path = folder / "labels" / "val1.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def _drop_class(folder):
    path = folder / "labels" / "test1.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "woven" not in line))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_line, r"val1\.txt has 3 images of the class banded; it must have 4 of each class"),
        (_drop_class, r"test1\.txt has 2 classes; it must have 3"),
        (
            lambda folder: (folder / "images/dotted/dotted_0003.jpg").unlink(),
            "lacks 1 of 12 train images, such as dotted/dotted_",
        ),
        (lambda folder: (folder / "labels/train1.txt").unlink(), r"dtd/labels/train1\.txt: missing"),
    ],
)
def test_what_is_missing_is_said(tmp_path, damage, message):
    damage(_write(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        _module(tmp_path).setup()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_missing_files_without_download(tmp_path, step):
    data = TexturesDataModule(root=tmp_path / "nothing", download=False)
    with pytest.raises(FileNotFoundError, match=r"dtd/labels/val1\.txt: missing") as error:
        getattr(data, step)()
    assert repr(str(tmp_path / "nothing")) in str(error.value)
    assert "unpack dtd-r1.0.1.tar.gz (md5 fff73e5086ae6bdbea199a49dfb8a4c1, from https" in str(error.value)


@pytest.mark.parametrize(("option", "message"), [({"partition": 0}, r"in 1\.\.10"), ({"size": -1}, "at least 1")])
def test_what_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        TexturesDataModule(**option)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A module that downloads from a folder, and the archive in that folder."""
    folder, path = _write(tmp_path / "source"), tmp_path / "served.tar.gz"
    with tarfile.open(path, "w:gz") as tape:
        tape.add(folder, "dtd")
    archive = TexturesDataModule.archives[0]._replace(url=path.as_uri(), md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(TexturesDataModule, "archives", (archive,))
    return path, lambda: TexturesDataModule(root=tmp_path / "root", size=16)


def test_download(served):
    path, module = served
    module().prepare_data()
    path.unlink()
    (module().root / "dtd-r1.0.1.tar.gz").unlink()
    data = module()
    data.prepare_data()  # all is there, so neither is needed
    data.setup()
    assert data.class_counts.tolist() == [COUNT] * 3


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>busy</html>", b"other bytes"])
def test_something_else_in_place_of_the_archive(served, content):
    path, module = served
    path.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"the download failed: .*(a web page|expected fff|md5)"):
        module().prepare_data()
    assert not (module().root / "dtd").exists()
