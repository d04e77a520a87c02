"""Small files in the official layouts, for the data modules as they are."""

import gzip
import hashlib
import io
import itertools
import pickle

import numpy as np
from medmnist.info import INFO
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from calib_lightning.data import (
    CIFAR10CDataModule,
    CIFAR101DataModule,
    CIFAR102DataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
    SVHNDataModule,
    cifar_shift,
    imagenet,
    web_files,
)
from calib_lightning.data.imagenet import ImageNetDataModule, ImageNetV2DataModule
from calib_lightning.data.textures import TexturesDataModule
from calib_lightning.data.tiny_imagenet import TinyImageNetDataModule
from tests.data import test_imagenet, test_textures, test_tiny_imagenet
from tests.data.test_mnist import idx

VAL = 20  # images held out of each small set


_SEEDS = itertools.count()


def _images(*shape):
    return np.random.RandomState(next(_SEEDS)).randint(0, 256, shape).astype(np.uint8)


def _jpeg(label, size=(80, 60)):
    file = io.BytesIO()
    Image.fromarray(_images(*size[::-1], 3)).save(file, "JPEG")
    return file.getvalue()


def _md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def _cifar(root, monkeypatch, source, classes, train):
    folder = root / source.base_folder
    folder.mkdir()
    kinds, sizes = ("fine_labels", "fine_label_names") if classes == 100 else ("labels", "label_names"), {}
    for name, size in (("train", train), ("test", classes)):
        content = {"data": _images(size, 3072), kinds[0]: (np.arange(size) % classes).tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
        sizes[name] = [[name, _md5(folder / name)]]
    (folder / "meta").write_bytes(pickle.dumps({kinds[1]: [f"class {label}" for label in range(classes)]}))
    monkeypatch.setattr(source, "train_list", sizes["train"])
    monkeypatch.setattr(source, "test_list", sizes["test"])
    meta = {"filename": "meta", "key": kinds[1], "md5": _md5(folder / "meta")}
    monkeypatch.setattr(source, "meta", meta)


def _cifar10(root, monkeypatch):
    _cifar(root, monkeypatch, CIFAR10, 10, 200)


def _cifar100(root, monkeypatch):
    _cifar(root, monkeypatch, CIFAR100, 100, 1200)


def _cifar10h(root, monkeypatch):
    _cifar10(root, monkeypatch)
    (root / "cifar-10h").mkdir()
    np.save(root / "cifar-10h" / "cifar10h-counts.npy", 50 * np.eye(10, dtype=np.int64) + 1)


def _cifar10_1(root, monkeypatch):
    _cifar10(root, monkeypatch)
    folder = root / "cifar-10.1"
    folder.mkdir()
    np.save(folder / "cifar10.1_v6_data.npy", _images(20, 32, 32, 3))
    np.save(folder / "cifar10.1_v6_labels.npy", (np.arange(20) % 10).astype(np.int32))
    md5 = [_md5(folder / f"cifar10.1_v6_{kind}.npy") for kind in ("data", "labels")]
    monkeypatch.setattr(CIFAR101DataModule, "versions", {"v6": (20, *md5)})


def _cifar10_2(root, monkeypatch):
    _cifar10(root, monkeypatch)
    (root / "cifar-10.2").mkdir()
    monkeypatch.setattr(CIFAR102DataModule, "sizes", {"test": 20})
    np.savez(root / "cifar-10.2" / "cifar102_test.npz", images=_images(20, 32, 32, 3), labels=np.arange(20) % 10)


def _cifar10_c(root, monkeypatch):
    _cifar10(root, monkeypatch)
    monkeypatch.setattr(cifar_shift, "_ROWS", 10)
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    for name in cifar_shift.CORRUPTIONS:
        np.save(folder / f"{name}.npy", _images(50, 32, 32, 3))
    np.save(folder / "labels.npy", np.tile(np.arange(10, dtype=np.uint8), 5))
    monkeypatch.setattr(CIFAR10CDataModule, "labels_md5", web_files.md5_of(folder / "labels.npy"))


def _svhn(root, monkeypatch):
    entries = dict(SVHN.split_list)
    for part, size in (("train", 100), ("test", 20)):
        label = (np.arange(size) % 10 + 1).astype(np.uint8)[:, None]
        savemat(root / f"{part}_32x32.mat", {"X": _images(32, 32, 3, size), "y": label})
        entries[part] = [*SVHN.split_list[part][:2], _md5(root / f"{part}_32x32.mat")]
    monkeypatch.setattr(SVHN, "split_list", entries)
    monkeypatch.setattr(SVHNDataModule, "needed", {entries[part][1]: entries[part][2] for part in ("train", "test")})


def _idx(root, monkeypatch, module, folder):
    monkeypatch.setattr(module, "sizes", {"train": 100, "t10k": 20})
    (root / folder / "raw").mkdir(parents=True)
    for part, size in (("train", 100), ("t10k", 20)):
        for kind, array in (
            ("images-idx3", _images(size, 28, 28)),
            ("labels-idx1", (np.arange(size) % 10).astype(np.uint8)),
        ):
            path = root / folder / "raw" / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array)))


def _mnist(root, monkeypatch):
    _idx(root, monkeypatch, MNISTDataModule, "MNIST")


def _fashion_mnist(root, monkeypatch):
    _idx(root, monkeypatch, FashionMNISTDataModule, "FashionMNIST")


def _medmnist(root, monkeypatch, name):
    sizes = {"train": 80, "val": 8, "test": 8}
    monkeypatch.setitem(INFO[name], "n_samples", sizes)
    colours = (3,) if INFO[name]["n_channels"] == 3 else ()
    content = {}
    for part, size in sizes.items():
        content[f"{part}_images"] = _images(size, 28, 28, *colours)
        content[f"{part}_labels"] = (np.arange(size) % len(INFO[name]["label"])).astype(np.uint8)[:, None]
    np.savez(root / f"{name}.npz", **content)


def _bloodmnist(root, monkeypatch):
    _medmnist(root, monkeypatch, "bloodmnist")


def _breastmnist(root, monkeypatch):
    _medmnist(root, monkeypatch, "breastmnist")


def _tiny_imagenet(root, monkeypatch):
    monkeypatch.setattr(test_tiny_imagenet, "TRAIN", 20)
    for path in test_tiny_imagenet._write(root).rglob("*.JPEG"):
        path.write_bytes(_jpeg(None, (64, 64)))
    monkeypatch.setattr(TinyImageNetDataModule, "num_classes", 4)
    monkeypatch.setattr(TinyImageNetDataModule, "train_count", test_tiny_imagenet.TRAIN)
    monkeypatch.setattr(TinyImageNetDataModule, "test_count", test_tiny_imagenet.TEST)


def _imagenet(root, monkeypatch):
    folder, wnids = root / "imagenet", test_imagenet.WNIDS
    monkeypatch.setattr(test_imagenet, "_jpeg", _jpeg)  # no two images are equal
    test_imagenet._write_train(folder)
    test_imagenet._write_val(folder)
    monkeypatch.setattr(imagenet, "imagenet_classes", lambda: {wnid: f"word of {wnid}" for wnid in wnids})
    monkeypatch.setattr(ImageNetDataModule, "num_classes", 3)
    monkeypatch.setattr(ImageNetDataModule, "test_size", 3 * test_imagenet.TEST)


def _imagenet_v2(root, monkeypatch):
    _imagenet(root, monkeypatch)
    monkeypatch.setattr(ImageNetV2DataModule, "num_classes", 3)
    monkeypatch.setattr(ImageNetV2DataModule, "class_count", 2)
    for name, content in test_imagenet._v2_members(classes=3).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _textures(root, monkeypatch):
    test_textures._write(root)
    monkeypatch.setattr(TexturesDataModule, "num_classes", 3)
    monkeypatch.setattr(TexturesDataModule, "class_count", test_textures.COUNT)


def _folder(root, monkeypatch):
    for name in ("ant", "bee"):
        (root / name).mkdir()
        for number in range(20):
            Image.fromarray(_images(32, 32, 3)).save(root / name / f"{number}.png")


def _arrays(root, monkeypatch):
    np.savez(root.parent / "data.npz", images=_images(60, 32, 32, 3), labels=np.arange(60) % 3)


def _nothing(root, monkeypatch):
    pass


_FROM_TRAIN, _SHARED = {"val": VAL, "calibration": VAL}, {"val": VAL}
_TINY = {"val": 4, "calibration": 8}

SETS = {
    "cifar10": (_cifar10, _FROM_TRAIN),
    "cifar10_lt": (_cifar10, _FROM_TRAIN),
    "cifar10_mac_cal": (_cifar10, _SHARED),
    "cifar10h": (_cifar10h, _FROM_TRAIN),
    "cifar10_1": (_cifar10_1, {}),
    "cifar10_2": (_cifar10_2, {}),
    "cifar10_c": (_cifar10_c, {}),
    "cifar100_lt": (_cifar100, {"val": 100, "calibration": 100}),
    "cifar100_lt_refcal": (_cifar100, {}),
    "cifar100_mac_cal": (_cifar100, {"val": 100}),
    "cifar100_neural_clamping": (_cifar100, {"val": 100}),
    "svhn": (_svhn, _FROM_TRAIN),
    "mnist": (_mnist, _FROM_TRAIN),
    "fashion_mnist": (_fashion_mnist, _FROM_TRAIN),
    "bloodmnist": (_bloodmnist, {}),
    "breastmnist": (_breastmnist, {}),
    "tiny_imagenet": (_tiny_imagenet, _TINY),
    "tiny_imagenet_lt": (_tiny_imagenet, _TINY),
    "imagenet": (_imagenet, {"calibration": 6}),
    "imagenet_v2": (_imagenet_v2, {}),
    "textures": (_textures, {}),
    "folder": (_folder, {}),
    "arrays": (_arrays, {}),
    "digits": (_nothing, {}),
}
"""By the name of the data: what writes it, and the sizes of held-out sets that it has images for."""


def write_sets(names, root, monkeypatch):
    """Write data sets under a folder and let their modules take files of that size.

    The last one of the names has the files of those before it: what is shifted comes with what it is shifted from.
    """
    root.mkdir()
    SETS[names[-1]][0](root, monkeypatch)
