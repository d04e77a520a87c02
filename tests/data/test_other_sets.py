"""Sets that `shift` and `ood` name: which they are, how their images are fitted, what is refused."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from calib_lightning.data import (
    ArraysDataModule,
    BenchmarkDataModule,
    CIFAR10CDataModule,
    CIFAR10DataModule,
    DigitsDataModule,
    FolderDataModule,
    SplitSpec,
    SVHNDataModule,
    ToyDataModule,
    cifar_shift,
    generated,
)
from calib_lightning.data.corruptions import corrupt
from calib_lightning.data.generated import GeneratedShift


def pixels(data, batch):
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    return ((batch.image * std + mean) * 255).round().to(torch.uint8)


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def arrays(path, shape, classes=("ant", "bee"), size=12, seed=0):
    """A file of images of two classes, all in one part."""
    images = np.random.default_rng(seed).integers(0, 256, (size, *shape), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array([classes[row % 2] for row in range(size)]))
    return {"name": "arrays", "file": str(path)}, images


def image_of(data, name):
    return pixels(data, next(iter(data.evaluation_loader(name))))


@pytest.fixture
def site(tmp_path):
    """What `DigitsDataModule` is for others: a configuration file of one's own."""

    def write(name, **config):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return write


def test_sets_are_evaluated_after_the_data_s_own_and_do_not_count_as_its_splits(tmp_path):
    entry, images = arrays(tmp_path / "a.npz", (8, 8))
    plain = ready(DigitsDataModule())
    shifted = {"name": "generated", "corruptions": ["brightness"], "severities": [1, 5]}
    data = ready(DigitsDataModule(shift=[shifted], ood=[entry], shift_rows=30))
    names = ["test", "shift/generated/brightness_1", "shift/generated/brightness_5", "ood/arrays"]
    assert data.predict_names == names
    assert data.evaluation_names == [*names, "calibration"]
    assert data.splits_hash == plain.splits_hash
    assert {name: data.source_files[name] for name in names[1:]} == {name: name for name in names[1:]}
    batch = next(iter(data.evaluation_loader("ood/arrays")))
    assert batch.label.tolist() == [-1] * 12
    assert batch.image.shape[1:] == plain.set_of("test").image.shape[1:]
    np.testing.assert_array_equal(pixels(data, batch)[:, 0], images)
    assert next(iter(data.evaluation_loader(names[1]))).label.tolist() == plain.set_of("test").label[:30].tolist()
    assert data.other_notes == [
        "shift/generated: 1 corruption x 2 severities of 30 test images, constants 'cifar', seed 0; "
        "not the archive's images",
        "of shifted sets at most the first 30 test rows",
    ]


def test_other_sizes_and_channels_are_fitted_and_said(tmp_path):
    colour, images = arrays(tmp_path / "c.npz", (16, 16, 3))
    data = ready(DigitsDataModule(ood=colour))  # one entry stands for itself
    assert data.other_notes == ["ood/arrays: RGB turned grey, 16 x 16 resized to 8 x 8"]
    found = image_of(data, "ood/arrays")[:, 0].int()
    for got, image in zip(found, images, strict=True):
        grey = Image.fromarray(image).convert("L").resize((8, 8), Image.Resampling.BILINEAR)
        assert (got - torch.from_numpy(np.array(grey)).int()).abs().max() <= 2  # Pillow rounds twice

    own, _ = arrays(tmp_path / "own.npz", (6, 9, 3), ("cat", "dog"), 60)
    wide, images = arrays(tmp_path / "w.npz", (6, 12))
    data = ready(ArraysDataModule(own["file"], ood=[wide]))
    assert data.other_notes == ["ood/arrays: grey repeated as RGB, 6 x 12 resized to 6 x 9"]
    cut = torch.from_numpy(images[:, :, 2:11])  # the centre, to the left where it cannot be halved
    found = image_of(data, "ood/arrays")
    assert any(torch.equal(found[:, 0], torch.from_numpy(images[:, :, at : at + 9])) for at in (1, 2)), cut.shape
    assert torch.equal(found[:, 0], found[:, 2])


def test_image_files_take_the_frame_of_the_data(tmp_path):
    for name, size in (("ant", (10, 20)), ("bee", (31, 17))):
        (tmp_path / "files" / name).mkdir(parents=True)
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(tmp_path / "files" / name / "1.png")
    data = ready(DigitsDataModule(ood=[{"name": "folder", "root": str(tmp_path / "files")}]))
    assert image_of(data, "ood/folder").unique().tolist() == [90]
    assert data.other_notes == ["ood/folder: files as (1, 8, 8)"]


def test_images_of_other_classes_need_no_class_folders(tmp_path):
    folder = tmp_path / "odd"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, value in (("b.png", 10), ("a.JPG", 200), ("more/c.png", 90), (".hidden/d.png", 0)):
        Image.fromarray(np.full((20, 9, 3), value, np.uint8)).save(folder / name, format="PNG")
    data = ready(DigitsDataModule(ood=[{"name": "folder", "root": str(folder)}]))
    assert image_of(data, "ood/folder").amax(dim=(1, 2, 3)).tolist() == [200, 10, 90]
    assert data.other_notes == ["ood/folder: classes have no names, so they are not compared; files as (1, 8, 8)"]
    with pytest.raises(ValueError, match=r"shift: folder: .* has 1 folders"):
        ready(DigitsDataModule(shift=[{"name": "folder", "root": str(folder)}]))
    (folder / "e.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of 4 image files under .*odd cannot be used"):
        ready(DigitsDataModule(ood=[{"name": "folder", "root": str(folder)}]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"ood: folder: .*empty has no images"):
        ready(DigitsDataModule(ood=[{"name": "folder", "root": str(tmp_path / "empty")}]))


def test_the_same_classes_in_other_images_are_a_shift(tmp_path, site):
    digits = [str(k) for k in range(10)]
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    labels = np.array([digits[row % 10] for row in range(40)])
    np.savez(
        tmp_path / "d.npz", train_images=images, train_labels=labels, test_images=images[:20], test_labels=labels[:20]
    )
    mine = site("other_digits", class_path="ArraysDataModule", init_args={"file": str(tmp_path / "d.npz")})
    data = ready(DigitsDataModule(shift=[mine], shift_rows=15))
    batch = next(iter(data.evaluation_loader("shift/other_digits")))
    assert batch.label.tolist() == [row % 10 for row in range(15)]
    with pytest.raises(ValueError, match=r"ood has 'other_digits', whose classes are those of DigitsDataModule"):
        ready(DigitsDataModule(ood=[mine]))


SMALL = {"name": "generated", "corruptions": ["fog"]}
REFUSED = {
    "ood has 'svnh'; it must be a name of `calib data list` or a file.*Did you mean svhn": {"ood": ["svnh"]},
    "shift has 'generate'.*Did you mean generated": {"shift": ["generate"]},
    "shift has '/'; it must be a name": {"shift": ["/"]},
    "ood has 5; each entry must be a name": {"ood": [5]},
    "ood has 7; each entry must be a name": {"ood": 7},
    "ood has 'aaa.*; each entry must be a name": {"ood": ["a" * 5000]},
    r"shift has \{'root': 'x'\}; each entry must be a name": {"shift": [{"root": "x"}]},
    "shift: generated: as is 'a/b'; it must be a word": {"shift": [SMALL | {"as": "a/b"}]},
    "ood has 'generated'; corrupted test images keep their classes": {"ood": ["generated"]},
    "corruption is 'fogg'; it must be one of gaussian_noise, .*Did you mean fog": {
        "shift": [SMALL | {"corruptions": "fogg"}]
    },
    "severity is 6; it must be one of 1, 2, 3, 4, 5": {"shift": [SMALL | {"severities": [6]}]},
    "severity is 1.0; it must be one of 1, 2, 3, 4, 5": {"shift": [SMALL | {"severities": [1.0]}]},
    "severities is .None.; each must be one of 1, 2, 3": {"shift": [SMALL | {"severities": [None]}]},
    "severities is empty": {"shift": [SMALL | {"severities": []}]},
    "corruptions is .*; each must be named once": {"shift": [SMALL | {"corruptions": ["fog", "fog"]}]},
    "table is 'svhn'; it must be one of cifar, imagenet": {"shift": [SMALL | {"table": "svhn"}]},
    "seed is -1; it must be a whole number, at least 0": {"shift": [SMALL | {"seed": -1}]},
    "seed is 'a'; it must be a whole number": {"shift": [SMALL | {"seed": "a"}]},
    "shift: generated: .*'colour'.*Its settings are those of GeneratedShift": {"shift": [SMALL | {"colour": 1}]},
    "shift_rows is 0; it must be a whole number, at least 1": {"shift": [SMALL], "shift_rows": 0},
    "shift_rows is True; it must be a whole number": {"shift": [SMALL], "shift_rows": True},
    "shift/generated is named twice; every set must have a name of its own": {"shift": [SMALL, SMALL | {"seed": 1}]},
    "shift: mnist: split is given; of other sets all test": {"shift": [{"name": "mnist", "split": {"val": 5}}]},
    "MNISTDataModule cannot use the files": {"shift": [{"name": "mnist", "download": False, "root": "nowhere"}]},
    "ood has 'digits', which is the data itself": {"ood": ["digits"]},
    "shift has 'digits_lt', which is the data itself": {"shift": ["digits_lt"]},
    "corruptions or severities are .*; they must be a list": {"shift": [SMALL | {"corruptions": {"fog": 1}}]},
    "shift has 'cifar10', whose class 0 is 'airplane'": {"shift": ["cifar10"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_by_name(message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready(DigitsDataModule(**REFUSED[message]))


def test_images_that_cannot_be_fitted_are_refused(tmp_path):
    long, _ = arrays(tmp_path / "l.npz", (8, 80))
    with pytest.raises(ValueError, match=r"ood/arrays has images of 8 x 80 pixels; .* 90% of each would be cut away"):
        ready(DigitsDataModule(ood=[long]))

    class Bands(DigitsDataModule):
        mean, std = (0.5,) * 5, (0.5,) * 5

        def load_test(self):
            source = super().load_test()
            return source._replace(image=source.image.expand(-1, 5, -1, -1))

        load_train = load_test

    good, _ = arrays(tmp_path / "g.npz", (8, 8))
    with pytest.raises(ValueError, match="ood/arrays has images of 1 channels; the network takes 5"):
        ready(Bands(SplitSpec(), ood=[good]))


def test_classes_of_a_shifted_set_must_be_those_of_the_data(tmp_path, site):
    entry, _ = arrays(tmp_path / "a.npz", (8, 8))
    with pytest.raises(ValueError, match="shift has 'arrays' with 2 classes; DigitsDataModule has 10"):
        ready(DigitsDataModule(shift=[entry]))
    swapped, _ = arrays(tmp_path / "s.npz", (8, 8), ("bee", "cow"))
    with pytest.raises(ValueError, match="whose class 0 is 'bee'; that of ArraysDataModule is 'ant'"):
        ready(ArraysDataModule(entry["file"], shift=[swapped]))
    for wrong in ({"data": 1}, {"class_path": "ArraysDataModule", "init_args": [1]}):
        with pytest.raises(ValueError, match=r"ood names .*mine.yaml; it must have a class_path and init_args"):
            ready(DigitsDataModule(ood=[site("mine", **wrong)]))
    (tmp_path / "bad.yaml").write_text("class_path: [")
    with pytest.raises(ValueError, match=r"ood names .*bad.yaml, which cannot be read"):
        ready(DigitsDataModule(ood=[str(tmp_path / "bad.yaml")]))


def test_classes_that_are_partly_known_or_have_no_names_are_said(tmp_path):
    known, _ = arrays(tmp_path / "k.npz", (8, 8), ("3", "x"))
    data = ready(DigitsDataModule(ood=[known | {"as": "mixed"}]))
    assert data.other_notes == ["ood/mixed: 1 of its 2 classes are known to the network (3)"]
    np.savez(tmp_path / "n.npz", images=np.zeros((8, 8, 8), np.uint8), labels=np.arange(8) % 2)
    data = ready(DigitsDataModule(ood={"name": "arrays", "file": str(tmp_path / "n.npz")}))
    assert data.other_notes == ["ood/arrays: classes have no names, so they are not compared"]
    two = [known | {"as": "one"}, known | {"as": "two"}]
    assert ready(DigitsDataModule(ood=two)).set_names[-2:] == ["ood/one", "ood/two"]


def test_a_root_of_one_s_own_stays(tmp_path, site):
    mine = site("mine", class_path="SVHNDataModule", init_args={"root": str(tmp_path / "mine"), "download": False})
    found = CIFAR10DataModule(root=tmp_path / "own", ood=[mine])._other_sets().named[0].data
    assert found.root == tmp_path / "mine"
    usual = CIFAR10DataModule(root=tmp_path / "own", ood=["svhn"], download=False)._other_sets().named[0].data
    assert (usual.root, usual.download, usual.test_only) == (tmp_path / "own", False, True)


def test_an_archive_that_lacks_severities_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_shift, "_ROWS", 20)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(np.arange(20) % 10, 5).astype(np.uint8)
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", labels)
    monkeypatch.setattr(CIFAR10CDataModule, "labels_md5", None)

    class Small(ToyDataModule):
        def __init__(self, **options):
            super().__init__(num_classes=10, **options)
            self.class_names = CIFAR10DataModule.class_names

    entry = {"name": "cifar10_c", "root": str(tmp_path), "corruptions": ["fog"], "download": False}
    data = ready(Small(shift=[entry], shift_rows=7))
    names = [f"shift/cifar10_c/fog_{severity}" for severity in range(1, 6)]
    assert [name for name in data.set_names if name.startswith("shift/")] == names
    assert next(iter(data.evaluation_loader(names[4]))).label.tolist() == list(range(7))
    assert data.source_rows(names[4]).tolist() == list(range(80, 87))
    divided = ready(Small(split=SplitSpec(calibration=30, calibration_from="test"), shift=[entry]))
    fitted = "shift/cifar10_c: RGB turned grey, 32 x 32 resized to 8 x 8"
    warned = "shift/cifar10_c: of the whole test file, some of which is calibration here"
    assert divided.other_notes == [fitted, warned]
    assert data.other_notes == [fitted, "of shifted sets at most the first 7 test rows"]
    own = ready(CIFAR10CDataModule(root=tmp_path, corruptions=["fog"], severities=[2], shift_rows=7))
    assert own.source_rows("shift/cifar10_c/fog_2").tolist() == list(range(20, 27))
    with pytest.raises(ValueError, match="shift/cifar10_c/fog_1 is named twice"):
        ready(Small(shift=[entry, entry | {"as": "again"}]))
    with pytest.raises(FileNotFoundError, match=r"CIFAR10CDataModule cannot use .*(?s:.)*CIFAR-10-C/snow.npy: missing"):
        ready(Small(shift=[entry | {"corruptions": ["fog", "snow"]}]))
    np.save(folder / "fog.npy", images[:60])  # three severities
    with pytest.raises(ValueError, match=r"fog.npy holds images uint8 \(60, 32, 32, 3\).*it must hold uint8 \(100, 32"):
        ready(Small(shift=[entry]))
    np.save(folder / "fog.npy", images)
    with pytest.raises(ValueError, match="ood has 'cifar10_c', whose images are shifted ones of known classes"):
        ready(ToyDataModule(ood=[entry]))


def test_only_the_files_of_the_test_images_are_wanted(tmp_path):
    data = SVHNDataModule(root=tmp_path, download=False)
    assert set(data.bad_files()) == {"train_32x32.mat", "test_32x32.mat"}
    with pytest.raises(FileNotFoundError) as caught:
        BenchmarkDataModule.prepare_data(CIFAR10DataModule(root=tmp_path, download=False, ood=["svhn"]))
    assert "test_32x32.mat" in str(caught.value)
    assert "train_32x32.mat" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)  # beside the files of the data itself


def test_generated_images_are_stored_once_and_are_those_of_the_function(tmp_path, cifar10_root, monkeypatch):
    shifted = {"name": "generated", "corruptions": ["shot_noise", "contrast"], "severities": [2, 4], "seed": 7}

    def made(**options):
        data = CIFAR10DataModule(root=tmp_path, **options)
        data.root, root = cifar10_root, data.root
        data.prepare_data()
        monkeypatch.setattr(CIFAR10DataModule, "file_options", {"root": root, "download": False})
        data.setup()
        return data

    data = made(shift=[shifted], shift_rows=24)
    clean = data.load_test().image[:24]
    want = corrupt(clean, "shot_noise", 4, torch.arange(24), table="cifar", seed=7)
    name = "shift/generated/shot_noise_4"
    assert torch.equal(data.set_of(name).image, want)
    assert torch.equal(image_of(data, name), want)
    files = sorted(path for path in tmp_path.rglob("*.npy"))
    assert [path.stem for path in files] == ["contrast_2", "contrast_4", "shot_noise_2", "shot_noise_4"]
    assert files[0].parent.name.startswith("cifar10-cifar-24-")

    def never(*args, **kwargs):
        raise AssertionError("generated again")

    monkeypatch.setattr(generated, "corrupt", never)
    assert torch.equal(made(shift=[shifted], shift_rows=24).set_of(name).image, want)
    with pytest.raises(AssertionError, match="generated again"):
        made(shift=[shifted | {"seed": 8}], shift_rows=24)
    np.save(files[0], np.zeros((3, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"contrast_2.npy holds uint8 of shape \(3, 3, 32, 32\); it must hold uint8"):
        made(shift=[shifted], shift_rows=24)


def test_under_a_root_that_must_not_be_written_images_are_corrupted_as_they_are_read(tmp_path, cifar10_root):
    for path in (cifar10_root / "cifar-10-batches-py").iterdir():
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        (tmp_path / "cifar-10-batches-py" / path.name).symlink_to(path)
    tmp_path.chmod(0o555)
    shifted = {"name": "generated", "corruptions": ["shot_noise"], "severities": [2]}
    data = ready(CIFAR10DataModule(root=tmp_path, shift=[shifted], shift_rows=5))
    want = corrupt(data.set_of("test").image[:5], "shot_noise", 2, torch.arange(5), table="cifar")
    assert torch.equal(image_of(data, "shift/generated/shot_noise_2"), want)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]
    tmp_path.chmod(0o755)


def test_image_files_are_corrupted_as_they_are_read(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for row in range(10):
            pixels_ = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels_).save(tmp_path / name / f"{row}.png")
    shifted = {"name": "generated", "corruptions": ["gaussian_noise"], "severities": [3], "table": "imagenet"}
    data = ready(FolderDataModule(tmp_path, num_workers=0, shift=[shifted]))
    clean = image_of(data, "test")
    rows = torch.from_numpy(data.source_rows("test"))
    want = corrupt(clean, "gaussian_noise", 3, rows, table="imagenet")
    assert torch.equal(image_of(data, "shift/generated/gaussian_noise_3"), want)
    assert not list(tmp_path.rglob("*.npy"))


def test_without_a_root_images_are_corrupted_once_and_kept_in_memory(monkeypatch):
    counted = []

    def counting(image, *args, **kwargs):
        counted.append(len(image))
        return corrupt(image, *args, **kwargs)

    monkeypatch.setattr(generated, "corrupt", counting)
    for kept, calls in ((2**29, [12]), (0, [1, 12, 12])):
        monkeypatch.setattr(generated, "_KEPT", kept)
        counted.clear()
        data = ready(DigitsDataModule(shift=[SMALL | {"severities": 4}], shift_rows=12))
        images = [image_of(data, "shift/generated/fog_4") for _ in range(2)]
        rows = torch.from_numpy(data.source_rows("test")[:12])
        want = corrupt(data.set_of("test").image[:12], "fog", 4, rows, table="cifar")
        assert all(torch.equal(image, want) for image in images)
        assert counted == calls


def test_images_that_are_too_small_to_corrupt_are_refused_before_a_run(tmp_path):
    entry, _ = arrays(tmp_path / "t.npz", (2, 8), size=40)
    with pytest.raises(ValueError, match="pixels"):
        ready(ArraysDataModule(entry["file"], shift=[SMALL]))


def test_without_what_a_corruption_needs_the_run_is_refused(monkeypatch):
    monkeypatch.setattr(generated, "unavailable", lambda names, folder: {"frost": "no photographs"})
    with pytest.raises(ValueError, match=r"lacks what it needs: frost: no photographs\. Without: .*fog"):
        GeneratedShift(corruptions=("fog", "frost")).prepare_data()

    class Untested(DigitsDataModule):
        def load_test(self):
            return None

    monkeypatch.setattr(generated, "unavailable", lambda names, folder: {})
    untested = Untested(shift=[{"name": "generated", "corruptions": ["fog"]}])
    with pytest.raises(ValueError, match="has no test set to corrupt"):
        ready(untested)
