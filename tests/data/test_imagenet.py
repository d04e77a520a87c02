import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets.imagenet import ARCHIVE_META
from torchvision.transforms import CenterCrop, Resize

from calib_lightning.data import SplitSpec, imagenet
from calib_lightning.data.imagenet import ImageNetDataModule, ImageNetV2DataModule, imagenet_classes

WNIDS = ["n01", "n02", "n10"]
DEVKIT_ORDER = ["n10", "n01", "n02"]  # ids 1, 2, 3 of the devkit are not the order of the labels
TRAIN, TEST = 5, 4
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
ROWS = np.random.RandomState(0).permutation(np.repeat(range(3), TEST)).tolist()  # labels of the val images in order


def _grey(label):
    return 15 * label + 40


def _jpeg(label, size=(80, 60)):
    file = io.BytesIO()
    Image.new("RGB", size, (_grey(label),) * 3).save(file, "JPEG", quality=95)
    return file.getvalue()


def _tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tape:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tape.addfile(info, io.BytesIO(content))
    return path


def _val_members():
    return {f"ILSVRC2012_val_{number:08}.JPEG": _jpeg(label) for number, label in enumerate(ROWS, start=1)}


def _write_val(root):
    for label, wnid in enumerate(WNIDS):
        (root / "val" / wnid).mkdir(parents=True)
        for number in (number for number, row in enumerate(ROWS, start=1) if row == label):
            (root / "val" / wnid / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(_jpeg(label))


def _write_train(root):
    for label, wnid in enumerate(WNIDS):
        (root / "train" / wnid).mkdir(parents=True)
        for number in range(TRAIN):
            (root / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(_jpeg(label))


def _archives(root, monkeypatch):
    """The three official archives, small."""
    root.mkdir(exist_ok=True)
    classes = {}
    for label, wnid in enumerate(WNIDS):
        path = _tar(root / "class.tar", {f"{wnid}_{number}.JPEG": _jpeg(label) for number in range(TRAIN)})
        classes[f"{wnid}.tar"] = path.read_bytes()
        path.unlink()
    _tar(root / ARCHIVE_META["train"][0], classes)
    _tar(root / ARCHIVE_META["val"][0], _val_members())
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    rows = [(number, wnid, f"{wnid}, word", "", 0, 0) for number, wnid in enumerate(DEVKIT_ORDER, start=1)]
    file = io.BytesIO()
    savemat(file, {"synsets": np.array([*rows, (4, "n99", "thing", "", 3, 0)], dtype=kinds)})
    truth = "".join(f"{DEVKIT_ORDER.index(WNIDS[label]) + 1}\n" for label in ROWS).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    members = {f"{folder}/meta.mat": file.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth}
    _tar(root / ARCHIVE_META["devkit"][0], members, "w:gz")
    for part, (name, _) in list(ARCHIVE_META.items()):
        monkeypatch.setitem(ARCHIVE_META, part, (name, hashlib.md5((root / name).read_bytes()).hexdigest()))


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(imagenet, "imagenet_classes", lambda: {wnid: f"word of {wnid}" for wnid in WNIDS})
    monkeypatch.setattr(ImageNetDataModule, "num_classes", 3)
    monkeypatch.setattr(ImageNetDataModule, "test_size", 3 * TEST)


HALVES = SplitSpec(calibration=6, calibration_from="test")


def _module(root, split=HALVES, **options):
    data = ImageNetDataModule(split, root=root, size=32, **options)
    data.prepare_data()
    data.setup()
    return data


def _check_pixels(data, name):
    seen = []
    for image, label, _ in data.evaluation_loader(name):
        expected = _grey(label).float().view(-1, 1, 1, 1).expand_as(image)
        torch.testing.assert_close((image * STD + MEAN) * 255, expected, rtol=0, atol=3)
        seen += label.tolist()
    return seen


@pytest.mark.usefixtures("_small")
def test_labels_are_ranks_of_the_folders(tmp_path):
    _write_val(tmp_path)
    _write_train(tmp_path)
    data = _module(tmp_path)
    assert data.class_names == ("word of n01", "word of n02", "word of n10")
    assert data.class_counts.tolist() == [TRAIN] * 3
    for name in ("train", "calibration", "test"):
        labels = _check_pixels(data, name)
        assert set(labels) == {0, 1, 2}
    assert _module(tmp_path, SplitSpec()).evaluation_loader("test").data.label.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.usefixtures("_small")
def test_validation_images_are_halved_class_by_class(tmp_path):
    _write_val(tmp_path)
    _write_train(tmp_path)
    data = _module(tmp_path)
    assert data.source_files == {"train": "train", "calibration": "test", "test": "test"}
    calibration, test = data.source_rows("calibration"), data.source_rows("test")
    assert sorted([*calibration, *test]) == list(range(12))
    assert np.bincount(calibration // TEST).tolist() == np.bincount(test // TEST).tolist() == [2, 2, 2]
    assert data.splits_hash == _module(tmp_path).splits_hash
    data.save_splits(tmp_path / "splits.npz")
    assert np.load(tmp_path / "splits.npz")["calibration"].tolist() == calibration.tolist()


def test_the_default_halves_the_validation_images(tmp_path):
    labels = np.repeat(np.arange(1000), 50)
    parts = ImageNetDataModule(root=tmp_path).split.divide({"test": labels}, 1000)
    assert list(parts) == ["calibration", "test"]
    for part in parts.values():
        assert part.file == "test"
        assert np.bincount(labels[part.rows]).tolist() == [25] * 1000


@pytest.mark.usefixtures("_small")
def test_without_training_images_it_is_for_evaluation(tmp_path):
    _write_val(tmp_path)
    data = _module(tmp_path)
    assert data.set_names == ["calibration", "test"]
    assert data.load_train() is None


@pytest.mark.usefixtures("_small")
def test_official_archives_are_unpacked(tmp_path, monkeypatch):
    _archives(tmp_path, monkeypatch)
    data = _module(tmp_path)
    assert data.class_counts.tolist() == [TRAIN] * 3
    assert sorted(_check_pixels(data, "calibration") + _check_pixels(data, "test")) == sorted(ROWS)
    _check_pixels(data, "train")
    for label, wnid in enumerate(WNIDS):
        numbers = [number for number, row in enumerate(ROWS, start=1) if row == label]
        names = [f"ILSVRC2012_val_{number:08}.JPEG" for number in numbers]
        assert sorted(path.name for path in (tmp_path / "val" / wnid).iterdir()) == names
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == WNIDS
    archives = [name for name, _ in ARCHIVE_META.values()]
    visible = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock"))
    assert visible == sorted([*archives, "train", "val"])
    for name in archives:
        (tmp_path / name).unlink()
    _module(tmp_path)  # the folders are there, so the archives are not needed


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("part", ["train", "val", "devkit"])
def test_a_damaged_archive_leaves_nothing(tmp_path, monkeypatch, part):
    _archives(tmp_path, monkeypatch)
    path = tmp_path / ARCHIVE_META[part][0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .* expected {ARCHIVE_META[part][1]}.*image-net.org"):
        _module(tmp_path)
    assert not (tmp_path / ("train" if part == "train" else "val")).exists()
    assert not list(tmp_path.glob(".unpacking*"))


@pytest.mark.usefixtures("_small")
def test_archives_that_do_not_belong_together_leave_nothing(tmp_path, monkeypatch):
    _archives(tmp_path, monkeypatch)
    name = ARCHIVE_META["val"][0]
    _tar(tmp_path / name, dict(list(_val_members().items())[1:]))
    monkeypatch.setitem(ARCHIVE_META, "val", (name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match="has 11 images; it must have 12"):
        _module(tmp_path)
    assert not (tmp_path / "val").exists()


@pytest.mark.usefixtures("_small")
def test_missing_devkit(tmp_path, monkeypatch):
    _archives(tmp_path, monkeypatch)
    (tmp_path / ARCHIVE_META["devkit"][0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the archive ILSVRC2012_devkit_t12\.tar\.gz"):
        _module(tmp_path)


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_nothing_there(tmp_path, step):
    with pytest.raises(FileNotFoundError, match="lacks the folder val/") as error:
        getattr(ImageNetDataModule(root=tmp_path / "nothing"), step)()
    for part in (repr(str(tmp_path / "nothing")), "image-net.org", *(name for name, _ in ARCHIVE_META.values())):
        assert part in str(error.value)


@pytest.mark.usefixtures("_small")
def test_a_class_without_a_folder_is_named(tmp_path):
    _write_val(tmp_path)
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n05")  # would shift no rank, and be wrong
    with pytest.raises(FileNotFoundError, match="for 1 of 3 classes: n02"):
        _module(tmp_path)


@pytest.mark.usefixtures("_small")
def test_partial_sets_warn_and_say_what_does_not_fit(tmp_path):
    _write_val(tmp_path)
    next((tmp_path / "val" / "n02").iterdir()).unlink()
    with pytest.warns(UserWarning, match="has 11 images instead of 12"):
        assert len(_module(tmp_path).source_rows("test")) == 5
    split = SplitSpec(calibration=11, calibration_from="test")
    message = r"split.calibration is 11; it must be below 11, .* Set split.calibration=0"
    with pytest.warns(UserWarning, match="images instead of"), pytest.raises(ValueError, match=message):
        _module(tmp_path, split)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_frames_are_those_of_torchvision(crop_mode):
    pixels = np.random.RandomState(0).randint(0, 256, (300, 401, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    frame = imagenet.imagenet_frame(224, crop_mode)
    expected = CenterCrop(224)(Resize(256)(image)) if crop_mode == "center" else Resize((224, 224))(image)
    assert torch.equal(frame(image), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.usefixtures("_small")
def test_training_crops_are_random_parts(tmp_path):
    _write_val(tmp_path)
    _write_train(tmp_path)
    gradient = np.broadcast_to(np.linspace(80, 250, 80).astype(np.uint8)[None, :, None], (60, 80, 3))
    Image.fromarray(gradient.copy()).save(tmp_path / "train" / "n01" / "n01_0.JPEG")
    for augment, different in ((True, 4), (False, 1)):
        loader = _module(tmp_path, augment=augment).train_dataloader()
        images = [loader.data.fetch(torch.tensor([0]), epoch).image for epoch in range(4)]
        assert len({float(image.mean()) for image in images}) == different
        # no black border: the image was not shifted, as smaller ones are
        assert min(float((image * STD + MEAN).min()) for image in images) > 70 / 255


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": 0}, "size is 0; it must be at least 1"), ({"crop_mode": "pad"}, "center, squash")],
)
@pytest.mark.parametrize("module", [ImageNetDataModule, ImageNetV2DataModule])
def test_what_is_refused(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_classes_are_sorted_and_have_words():
    classes = imagenet_classes()
    assert list(classes) == sorted(classes)
    assert len(classes) == 1000
    assert classes["n01440764"] == "tench, Tinca tinca"


def test_real_pictures(real_data):
    with pytest.warns(UserWarning, match="has 1000 images instead of 50000"):
        data = _module(real_data / "imagenet-sample", SplitSpec())
    assert data.set_names == ["test"]
    assert data.class_names[281] == "tabby, tabby cat"
    loader = data.evaluation_loader("test")
    assert loader.data.label.tolist() == list(range(1000))
    wnids = sorted(path.name for path in (real_data / "imagenet-sample" / "val").iterdir())
    assert [loader.data.image.path(row).parent.name for row in range(1000)] == wnids
    batch = loader.data.fetch(torch.tensor([0, 281, 999]), 0)
    assert batch.image.shape == (3, 3, 32, 32)
    assert batch.image.std() > 0.5


def test_real_pictures_are_too_few_for_the_default(real_data):
    message = r"split.calibration is 25000; it must be below 1000, .* Set split.calibration=0"
    with pytest.warns(UserWarning, match="images instead of"), pytest.raises(ValueError, match=message):
        _module(real_data / "imagenet-sample", None)
    halves = SplitSpec(calibration=0.5, calibration_from="test", choose="proportional")
    with pytest.warns(UserWarning, match="images instead of 50000"):
        data = _module(real_data / "imagenet-sample", halves)
    rows = [data.source_rows(name).tolist() for name in ("calibration", "test")]
    assert [len(part) for part in rows] == [500, 500]
    assert sorted(rows[0] + rows[1]) == list(range(1000))


V2 = "imagenetv2-matched-frequency"


def _v2_members(classes=12, count=2):
    names = {f"{V2}-format-val/{label}/{number:040}.jpeg": label for label in range(classes) for number in range(count)}
    return {name: _jpeg(label) for name, label in names.items()}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A module that downloads from a folder, and the archive in that folder."""
    monkeypatch.setattr(ImageNetV2DataModule, "num_classes", 12)
    monkeypatch.setattr(ImageNetV2DataModule, "class_count", 2)
    path = _tar(tmp_path / "served.tar.gz", _v2_members(), "w:gz")

    def module(**options):
        data = ImageNetV2DataModule(root=tmp_path / "root", size=32, **options)
        data.archives = (data.archives[0]._replace(url=path.as_uri()),)
        return data

    return path, module


def test_v2_folders_are_numbers(served):
    path, module = served
    module().prepare_data()
    path.unlink()
    (module().root / f"{V2}.tar.gz").unlink()
    data = module()
    data.prepare_data()  # the folder is there, so neither is needed
    data.setup()
    assert data.set_names == data.evaluation_names == ["shift/imagenet_v2_matched_frequency"]
    assert data.source_files == {data.set_names[0]: data.set_names[0]}
    image, label, _ = next(iter(data.evaluation_loader(data.set_names[0])))
    assert label.tolist() == [number // 2 for number in range(24)]  # "10" after "9"
    expected = _grey(label).float().view(-1, 1, 1, 1).expand_as(image)
    torch.testing.assert_close((image * STD + MEAN) * 255, expected, rtol=0, atol=3)


@pytest.mark.parametrize(
    ("variant", "name", "archive"),
    [
        ("matched-frequency", "matched_frequency", "matched-frequency"),
        ("threshold-0.7", "threshold_0_7", "threshold0.7"),
        ("top-images", "top_images", "top-images"),
    ],
)
def test_v2_variants(tmp_path, monkeypatch, variant, name, archive):
    data = ImageNetV2DataModule(variant=variant, root=tmp_path)
    site = "https://imagenetv2public.s3-us-west-2.amazonaws.com"
    assert data.archives[0].url == f"{site}/imagenetv2-{archive}.tar.gz"
    for label in range(2):
        (tmp_path / f"imagenetv2-{archive}-format-val" / str(label)).mkdir(parents=True)
        (tmp_path / f"imagenetv2-{archive}-format-val" / str(label) / "a.jpeg").write_bytes(_jpeg(0))
    monkeypatch.setattr(ImageNetV2DataModule, "num_classes", 2)
    monkeypatch.setattr(ImageNetV2DataModule, "class_count", 1)
    assert list(data.load_more()) == [f"shift/imagenet_v2_{name}"]


def test_v2_counts(served):
    path, module = served
    members = _v2_members()
    members.pop(next(name for name in members if "/7/" in name))
    _tar(path, members, "w:gz")
    module().prepare_data()
    with pytest.raises(ValueError, match="has 1 images of the class 7; it must have 2 of each class"):
        module().setup()


def test_v2_missing_class(served):
    path, module = served
    _tar(path, _v2_members(classes=11), "w:gz")
    module().prepare_data()
    with pytest.raises(FileNotFoundError, match="for 1 of 12 classes: 11"):
        module().setup()


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_v2_missing_files(tmp_path, step):
    data = ImageNetV2DataModule(root=tmp_path, download=False)
    with pytest.raises(FileNotFoundError, match=rf"{V2}-format-val/: missing") as error:
        getattr(data, step)()
    assert repr(str(tmp_path)) in str(error.value)
    assert f"Set download=True, or unpack {V2}.tar.gz" in str(error.value)


def test_v2_web_page_in_place_of_the_archive(served):
    path, module = served
    path.write_bytes(b"<!DOCTYPE html><html>busy</html>")
    with pytest.raises(FileNotFoundError, match=r"the download failed: .*a web page"):
        module().prepare_data()


def test_v2_unknown_variant():
    with pytest.raises(ValueError, match=r"variant is 'new'; it must be one of matched-frequency, threshold-0.7"):
        ImageNetV2DataModule(variant="new")
