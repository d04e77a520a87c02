import hashlib
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.data import SplitSpec, tiny_imagenet
from calib_lightning.data.tiny_imagenet import TinyImageNetDataModule

FILE_ORDER = ["n09", "n02", "n10", "n01"]  # of wnids.txt, which is not that of the labels
SORTED = sorted(FILE_ORDER)
TRAIN, TEST = 6, 3
ROWS = np.random.RandomState(3).permutation(np.repeat(range(4), TEST)).tolist()  # labels of val_0, val_1, ...


def _grey_of(label):
    return 40 + 50 * label


def _write(root):
    """The official layout with 4 classes; the brightness of an image tells its class."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(FILE_ORDER) + "\n")
    words = ["n00\tentity", *(f"{wnid}\tword of {wnid}, synonym" for wnid in FILE_ORDER)]
    (folder / "words.txt").write_text("\n".join(words) + "\n")
    for label, wnid in enumerate(SORTED):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes\n")
        for number in range(TRAIN):
            mode = "L" if number == 2 else "RGB"  # a few official images are grey
            image = Image.new("RGB", (64, 64), (_grey_of(label),) * 3).convert(mode)
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
    lines = []
    for number, label in enumerate(ROWS):
        Image.new("RGB", (64, 64), (_grey_of(label),) * 3).save(folder / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{SORTED[label]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(TinyImageNetDataModule, "num_classes", 4)
    monkeypatch.setattr(TinyImageNetDataModule, "train_count", TRAIN)
    monkeypatch.setattr(TinyImageNetDataModule, "test_count", TEST)


SPLIT = SplitSpec(val=4, calibration=8)


def _module(root, split=SPLIT, **options):
    data = TinyImageNetDataModule(split, root=root, download=False, **options)
    data.prepare_data()
    return data


def test_labels_are_ranks_of_sorted_wnids(tmp_path):
    _write(tmp_path)
    data = _module(tmp_path)
    data.setup()
    assert data.class_names == tuple(f"word of {wnid}, synonym" for wnid in SORTED)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for name in ("train", "val", "calibration", "test"):
        image, label, _ = next(iter(data.evaluation_loader(name)))
        assert image.shape[1:] == (3, 64, 64)
        expected = torch.tensor([float(_grey_of(number)) for number in label]).view(-1, 1, 1, 1).expand_as(image)
        torch.testing.assert_close((image * std + mean) * 255, expected, rtol=0, atol=3)
    assert label.tolist() == ROWS  # the order of the annotations, where val_10 is after val_9


def test_no_image_is_in_two_sets(tmp_path):
    _write(tmp_path)
    data = _module(tmp_path)
    data.setup()
    assert data.source_files == {"train": "train", "val": "train", "calibration": "train", "test": "test"}
    rows = [data.source_rows(name).tolist() for name in ("train", "val", "calibration")]
    assert sorted(rows[0] + rows[1] + rows[2]) == list(range(4 * TRAIN))
    assert [len(part) for part in rows] == [12, 4, 8]
    assert data.class_counts.tolist() == [3, 3, 3, 3]


def test_the_default_keeps_a_tenth_for_calibration(tmp_path):
    labels = np.repeat(np.arange(200), 500)
    parts = TinyImageNetDataModule(root=tmp_path).split.divide({"train": labels}, 200)
    counts = {name: set(np.bincount(labels[part.rows]).tolist()) for name, part in parts.items()}
    assert counts == {"train": {425}, "val": {25}, "calibration": {50}}


@pytest.mark.parametrize("augment", [True, False])
def test_training_images_are_shifted_by_at_most_four_pixels(tmp_path, augment):
    _write(tmp_path)
    data = _module(tmp_path, augment=augment)
    data.setup()
    image, _, _ = next(iter(data.train_dataloader()))
    black = (image[:, 0] < (0.05 - 0.485) / 0.229).flatten(1).sum(1)
    assert bool((black > 0).any()) is augment
    assert black.max() <= 64 * 64 - 60 * 60
    assert len(black.unique()) > 1 or not augment


@pytest.mark.parametrize(("imbalance", "total"), [(0.1, 39_072), (0.01, 21_549)])
def test_long_tails_of_the_whole_set(tmp_path, monkeypatch, imbalance, total):
    wnids = [f"n{label:03}" for label in range(200)]
    folder = _write(tmp_path)
    (folder / "wnids.txt").write_text("\n".join(wnids))
    monkeypatch.setattr(TinyImageNetDataModule, "num_classes", 200)
    monkeypatch.setattr(TinyImageNetDataModule, "train_count", 500)
    files = [f"{wnid}/images/{wnid}_{number}.JPEG" for wnid in wnids for number in range(500)]
    monkeypatch.setattr(tiny_imagenet, "class_files", lambda *_: (files, torch.arange(200).repeat_interleave(500)))
    monkeypatch.setattr(TinyImageNetDataModule, "load_test", lambda self: None)
    data = _module(tmp_path, SplitSpec(imbalance=imbalance))
    data.setup()
    assert data.train_size == total
    assert data.class_counts[0] == 500
    assert data.class_counts[-1] == 500 * imbalance


def _drop_annotation(folder):
    path = folder / "val" / "val_annotations.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def _unknown_class(folder):
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("n09", "n99"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train/n02/images/n02_5.JPEG").unlink(), "5 images of the class n02; .* must have 6"),
        (lambda folder: (folder / "train/n02").rename(folder / "n02"), "no images .* for 1 of 4 classes: n02"),
        (lambda folder: (folder / "val/images/val_3.JPEG").unlink(), "lacks 1 of 12 images, such as images/val_3.JPEG"),
        (lambda folder: (folder / "wnids.txt").write_text("n01\nn02\n"), "has 2 classes; it must have 4"),
        (_drop_annotation, "val_annotations.txt has 2 images of the class"),
        (_unknown_class, r"the line \['val_.*'n99'"),
        (lambda folder: (folder / "words.txt").unlink(), "words.txt: missing"),
    ],
)
def test_what_is_missing_is_said(tmp_path, damage, message):
    folder = _write(tmp_path)
    damage(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        _module(tmp_path).setup()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_missing_files_without_download(tmp_path, step):
    data = TinyImageNetDataModule(root=tmp_path / "nothing", download=False)
    with pytest.raises(FileNotFoundError, match=r"wnids\.txt: missing") as error:
        getattr(data, step)()
    assert repr(str(tmp_path / "nothing")) in str(error.value)
    assert "tiny-imagenet-200.zip (md5 90528d7ca1a48142e341f4ef8d21d0de, from http" in str(error.value)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A module that downloads from a folder, and the archive in that folder."""
    folder, path = _write(tmp_path / "source"), tmp_path / "served.zip"
    with zipfile.ZipFile(path, "w") as pack:
        for file in sorted(folder.rglob("*")):
            pack.write(file, file.relative_to(folder.parent))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    archive = TinyImageNetDataModule.archives[0]._replace(url=path.as_uri(), md5=md5, size=path.stat().st_size)
    monkeypatch.setattr(TinyImageNetDataModule, "archives", (archive,))
    return path, lambda: TinyImageNetDataModule(SplitSpec(), root=tmp_path / "root")


def test_download(served):
    path, module = served
    module().prepare_data()
    path.unlink()
    (module().root / "tiny-imagenet-200.zip").unlink()
    data = module()
    data.prepare_data()  # all is there, so neither is needed
    data.setup()
    assert data.class_counts.tolist() == [TRAIN] * 4


def test_a_web_page_in_place_of_the_archive(served):
    path, module = served
    path.write_bytes(b"<!DOCTYPE html><html>busy</html>")
    with pytest.raises(FileNotFoundError, match=r"the download failed: .*a web page") as error:
        module().prepare_data()
    assert repr(str(module().root)) in str(error.value)
    assert not (module().root / "tiny-imagenet-200").exists()
