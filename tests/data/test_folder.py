"""One's own images: folders and arrays."""

import io
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.data import ArraysDataModule, FolderDataModule, Normalize, SplitSpec, folder, image_checks
from calib_lightning.data import arrays as arrays_file

SPLIT = SplitSpec(val=0.1, calibration=0.1, test=0.2, choose="proportional")


def ready(data):
    data.prepare_data()
    data.setup()
    return data


def fill(root, classes=("ant", "bee"), each=10, size=(6, 6), start=0):
    """Grey images whose brightness tells their place in the folder."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.new("L", size, start + 100 * label + number).save(root / name / f"{number:02}.png")
    return root


def values(data, name):
    """First pixel of each image of a set, as a byte."""
    batches = list(data.evaluation_loader(name))
    pixel = torch.cat([batch.image[:, 0, 0, 0] for batch in batches]) * data.std[0] + data.mean[0]
    return (pixel * 255).round().int().tolist(), torch.cat([batch.label for batch in batches]).tolist()


def test_flat_folder_is_split_class_by_class(tmp_path):
    data = ready(FolderDataModule(fill(tmp_path), num_workers=0))
    assert (data.num_classes, data.class_names) == (2, ("ant", "bee"))
    assert {name: len(data.source_rows(name)) for name in data.set_names} == {
        "train": 12,
        "val": 2,
        "calibration": 2,
        "test": 4,
    }
    seen = []
    for name in data.set_names:
        pixel, label = values(data, name)
        assert [value // 100 for value in pixel] == label
        assert label.count(0) == label.count(1)
        seen += pixel
    assert sorted(seen) == [*range(10), *range(100, 110)]
    assert data.frame.size == (6, 6)
    assert (tuple(data.mean), tuple(data.std)) == ((0.5,), (0.5,))


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "Validation", "testing")])
def test_folders_of_sets(tmp_path, names):
    for number, name in enumerate(names):
        fill(tmp_path / name, start=20 * number)
    data = ready(FolderDataModule(tmp_path, SPLIT, num_workers=0))
    sizes = {name: len(data.source_rows(name)) for name in data.set_names}
    assert sizes == {"train": 18, "val": 20, "calibration": 2, "test": 20}
    for number, file in enumerate(("train", "val", "test")):
        for name in data.set_names:
            if data.source_files[name] == file:
                assert all(20 * number <= value % 100 < 20 * number + 10 for value in values(data, name)[0])


def test_without_a_validation_folder_one_is_cut(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    data = ready(FolderDataModule(tmp_path, num_workers=0))
    assert data.has_validation
    assert {name: data.source_files[name] for name in data.set_names} == {
        "train": "train",
        "val": "train",
        "calibration": "train",
        "test": "test",
    }


def test_a_test_folder_alone_is_for_evaluation(tmp_path):
    fill(tmp_path / "test")
    data = ready(FolderDataModule(tmp_path, num_workers=0))
    assert data.set_names == ["test"]
    assert len(data.source_rows("test")) == 20


def test_everything_for_a_test(tmp_path):
    data = ready(FolderDataModule(fill(tmp_path), SplitSpec(test=1.0), num_workers=0))
    assert data.set_names == ["test"]
    assert len(data.source_rows("test")) == 20


def test_a_class_without_test_images_keeps_its_number(tmp_path):
    fill(tmp_path / "train", ("ant", "bee", "cat"))
    fill(tmp_path / "test", ("bee", "cat"))
    data = ready(FolderDataModule(tmp_path, num_workers=0))
    assert data.num_classes == 3
    assert set(values(data, "test")[1]) == {1, 2}


def test_kinds_of_images(tmp_path):
    """Grey, RGB, palette, transparent, one bit, CMYK; nested folders; upper-case endings; hidden and other files."""
    kinds = {
        "a.PNG": Image.new("L", (8, 8), 255),
        "b.png": Image.new("RGB", (8, 8), (255, 0, 0)),
        "c.png": Image.new("RGB", (8, 8), (255, 0, 0)).convert("P"),
        "d.png": Image.new("RGBA", (8, 8), (255, 0, 0, 0)),
        "e.png": Image.new("1", (8, 8), 1),
        "f.jpg": Image.new("CMYK", (8, 8), (0, 0, 0, 0)),
        "deep/g.webp": Image.new("RGB", (8, 8), (255, 0, 0)),
        "h.bmp": Image.new("RGB", (8, 8), (255, 0, 0)),
        "i.tif": Image.new("RGB", (8, 8), (255, 0, 0)),
        "j.ppm": Image.new("RGB", (8, 8), (255, 0, 0)),
        "k.gif": Image.new("RGB", (8, 8), (255, 0, 0)),
    }
    for name in ("x", "y"):
        for file, image in kinds.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        (tmp_path / name / ".hidden.png").write_bytes(b"no image")
        (tmp_path / name / "notes.txt").write_text("no image")
    data = ready(FolderDataModule(tmp_path, SplitSpec(test=1.0), num_workers=0, mean=(0, 0, 0), std=(1, 1, 1)))
    batch = next(iter(data.evaluation_loader("test")))
    assert batch.image.shape == (22, 3, 8, 8)
    colours = dict(
        zip([str(p) for p in data._sets["test"].image.names.astype(str)], batch.image[:, :, 0, 0], strict=True)
    )
    white, red = torch.ones(3), torch.tensor([1.0, 0, 0])
    for file in kinds:
        expected = white if file in ("a.PNG", "e.png", "f.jpg") else red
        atol = 0.02 if file.endswith(("webp", "jpg")) else 0
        torch.testing.assert_close(colours[f"x/{file}"], expected, rtol=0, atol=atol)


def test_images_are_turned_upright(tmp_path):
    fill(tmp_path, each=4, size=(4, 6))
    wide = np.zeros((4, 6), np.uint8)
    wide[0] = 200  # the top row of the file; orientation 6 means: turn it clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(wide).save(tmp_path / "ant" / "turned.png", exif=exif)
    data = ready(FolderDataModule(tmp_path, SplitSpec(test=1.0), num_workers=0, mean=(0,), std=(1,)))
    assert data.frame.size == (6, 4)
    row = data._sets["test"].image.names.tolist().index(b"ant/turned.png")
    image = (next(iter(data.evaluation_loader("test"))).image[row, 0] * 255).round()
    assert image[:, -1].tolist() == [200] * 6
    assert image[:, :-1].eq(0).all()


def test_images_of_different_sizes_get_one(tmp_path):
    fill(tmp_path)
    Image.new("RGB", (30, 20)).save(tmp_path / "ant" / "other.png")
    data = ready(FolderDataModule(tmp_path, num_workers=0))
    assert (data.frame.size, data.frame.channels) == ((224, 224), 3)
    data = ready(FolderDataModule(tmp_path, num_workers=0, size=(10, 12), channels=1))
    assert next(iter(data.evaluation_loader("test"))).image.shape == (4, 1, 10, 12)


def test_augmentation_is_seeded_and_for_training_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(8):
            noise = np.random.RandomState(number).randint(0, 256, (20, 20)).astype(np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{number}.png")
    passes = []
    for augment in (True, True, False):
        data = ready(FolderDataModule(tmp_path, SplitSpec(val=2), num_workers=0, augment=augment))
        passes.append(next(iter(data.train_dataloader())))
        clean = torch.cat([batch.image for batch in data.evaluation_loader("train")])
        assert torch.equal(passes[-1].image, clean[passes[-1].index]) is not augment
    assert torch.equal(passes[0].image, passes[1].image)
    data.augment = True
    loader = data.train_dataloader()
    first = next(iter(loader))
    loader.set_epoch(1)
    order = {row: place for place, row in enumerate(first.index.tolist())}
    second = next(iter(loader))
    assert not any(
        torch.equal(image, first.image[order[row]])
        for image, row in zip(second.image, second.index.tolist(), strict=True)
    )


# --- bad input -------------------------------------------------------------------------------------------------------


def _huge_png(path):
    """A file that says it is 20,000 x 20,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_files_that_cannot_be_used_are_all_named_before_the_start(tmp_path):
    fill(tmp_path)
    (tmp_path / "ant" / "page.png").write_bytes(b"<html>not found</html>")
    (tmp_path / "ant" / "empty.jpg").write_bytes(b"")
    _huge_png(tmp_path / "bee" / "huge.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "bee" / "deep.png")
    with pytest.raises(ValueError, match=r"4 of 24 image files under .* cannot be used") as error:
        FolderDataModule(tmp_path).prepare_data()
    message = str(error.value)
    for name, reason in (
        ("page.png", "it is not an image in one of the formats"),
        ("empty.jpg", "it is not an image in one of the formats"),
        ("huge.png", "Reduce the image size"),
        ("deep.png", "it must have 8 bits per channel: convert it to RGB or grey"),
    ):
        (line,) = [line for line in message.splitlines() if name in line]
        assert reason in line


def test_many_unusable_files_are_counted(tmp_path):
    fill(tmp_path)
    for number in range(15):
        (tmp_path / "ant" / f"bad-{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"15 of 35 image files") as error:
        FolderDataModule(tmp_path).prepare_data()
    assert "and 5 more" in str(error.value)
    assert str(error.value).count("bad-") == 10


def test_a_truncated_file_is_named_when_it_is_decoded(tmp_path):
    fill(tmp_path)
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (6, 6)).astype(np.uint8))
    path = tmp_path / "ant" / "00.jpg"
    noise.save(path)
    path.write_bytes(path.read_bytes()[:-30])
    data = ready(FolderDataModule(tmp_path, SplitSpec(test=1.0), num_workers=0))
    with pytest.raises(ValueError, match=r"ant/00.jpg cannot be read: .*truncated"):
        list(data.evaluation_loader("test"))


def _nothing(root):
    return root / "nothing"


def _no_classes(root):
    Image.new("L", (4, 4)).save(root / "a.png")
    return root


def _one_class(root):
    return fill(root, ("ant",))


def _empty_class(root):
    (fill(root) / "cat").mkdir()
    return root


def _only_val(root):
    fill(root / "val")
    return root


def _new_class_in_test(root):
    fill(root / "train")
    fill(root / "test", ("bee", "wasp"))
    return root


def _twice(root):
    fill(root / "val")
    fill(root / "valid")
    fill(root / "train")
    return root


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_nothing, "root is .*nothing'; it must be a folder"),
        (_no_classes, "has 0 folders; it must have one for each of at least two classes"),
        (_one_class, "has 1 folders; it must have one for each of at least two"),
        (_empty_class, r"has no images .* for 1 of 3 classes: cat"),
        (_only_val, "has the folders val, but none called train"),
        (_new_class_in_test, "has the class 'wasp', which has no training images; it must be one of ant, bee"),
        (_twice, "has two folders of val images, val and valid"),
    ],
)
def test_folders_that_are_refused(tmp_path, make, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        ready(FolderDataModule(make(tmp_path)))


def test_other_folders_beside_the_sets_are_named(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "calibration")
    with pytest.warns(UserWarning, match=r"other than train, val and test are ignored: \['calibration'\]"):
        FolderDataModule(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4}, "channels is 4"),
        ({"size": 0}, "size is 0; it must be"),
        ({"mean": (0.5,) * 3}, "must have 1 values"),
    ],
)
def test_settings_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ready(FolderDataModule(fill(tmp_path), **options))


def test_large_folders_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(image_checks, "_CHECKED", 5)
    fill(tmp_path)
    (tmp_path / "bee" / "09.png").write_bytes(b"")  # the last one is always looked at
    with pytest.raises(ValueError, match="1 of 5 image files"):
        FolderDataModule(tmp_path).prepare_data()


READ_TWICE = """
import pathlib, sys
from calib_lightning.data import FolderDataModule, SplitSpec

def peak():
    # not getrusage, whose peak is that of the process which started this one
    return next(line.split()[1] for line in pathlib.Path("/proc/self/status").open() if line.startswith("VmHWM"))

data = FolderDataModule(sys.argv[1], SplitSpec(), batch_size=4, num_workers=0)
data.setup()
peaks = []
for _ in range(2):
    for number, batch in enumerate(data.train_dataloader()):
        if number in (5, 49):
            peaks.append(peak())
print(*peaks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read the memory of a process from")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    # 200 images of 512 x 512 are 150 MiB of pixels; a batch of 4 is 3 MiB, 12 once it is floating point
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for number in range(100):
            Image.new("RGB", (512, 512), (number, 0, 0)).save(tmp_path / label / f"{number}.png", compress_level=1)
    done = subprocess.run([sys.executable, "-c", READ_TWICE, tmp_path], capture_output=True, text=True, check=True)
    first, *_, last = (int(peak) / 1024 for peak in done.stdout.split())
    assert last - first < 50


# --- arrays ----------------------------------------------------------------------------------------------------------


def arrays(size=40, shape=(6, 6), dtype=np.uint8):
    return np.random.RandomState(size).randint(0, 256, (size, *shape)).astype(dtype), np.arange(size) % 4


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 1), (6, 6, 3), (3, 6, 6), (1, 6, 6)])
def test_layouts_of_arrays(tmp_path, shape):
    image, label = arrays(shape=shape)
    np.savez(tmp_path / "a.npz", images=image, labels=label)
    data = ready(ArraysDataModule(tmp_path / "a.npz"))
    assert data.num_classes == 4
    assert [len(data.source_rows(name)) for name in data.set_names] == [24, 4, 4, 8]
    expected = image if shape[0] in (1, 3) else image[:, None] if len(shape) == 2 else image.transpose(0, 3, 1, 2)
    normalize = Normalize(data.mean, data.std)
    for name in data.set_names:
        rows = data.source_rows(name)
        batch = next(iter(data.evaluation_loader(name)))
        assert batch.label.tolist() == label[rows].tolist()
        assert torch.equal(batch.image, normalize(torch.from_numpy(expected[rows].copy()), batch.index, 0))


@pytest.mark.parametrize("shape", [(20, 6, 6), (20, 6, 6, 3), (20, 1, 6, 6), (20, 3, 3, 3)])
def test_channels_are_known_without_reading_the_images(tmp_path, monkeypatch, shape):
    file = tmp_path / "mine.npz"
    np.savez(file, images=np.zeros(shape, np.uint8), labels=np.arange(20) % 2)
    data = ArraysDataModule(file, SPLIT)
    with monkeypatch.context() as patch:
        patch.setattr(arrays_file, "load_npz", None)
        channels = data.image_channels
    assert channels == ready(data).train_dataloader().data.image.shape[1]


def test_arrays_of_sets_and_class_names(tmp_path):
    content = {}
    for part, size in (("train", 20), ("val", 8), ("test", 12)):
        content[f"{part}_images"], content[f"{part}_labels"] = arrays(size)
    content["train_labels"] = content["train_labels"][:, None]
    np.savez(tmp_path / "a.npz", **content, class_names=np.array(["a", "b", "c", "d", "e"]))
    data = ready(ArraysDataModule(tmp_path / "a.npz", SplitSpec(val=0.1, calibration=0.5, calibration_from="val")))
    assert (data.num_classes, data.class_names[4]) == (5, "e")
    assert {name: (data.source_files[name], len(data.source_rows(name))) for name in data.set_names} == {
        "train": ("train", 20),
        "val": ("val", 4),
        "calibration": ("val", 4),
        "test": ("test", 12),
    }


def test_labels_may_be_names(tmp_path):
    image, _ = arrays(4)
    np.savez(tmp_path / "a.npz", images=image, labels=np.array(["dog", "ant", "dog", "cat"]))
    data = ready(ArraysDataModule(tmp_path / "a.npz", SplitSpec(test=1.0)))
    assert data.class_names == ("ant", "cat", "dog")
    assert next(iter(data.evaluation_loader("test"))).label.tolist() == [2, 0, 2, 1]


IMAGES, LABELS = arrays()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": IMAGES, "y": LABELS}, "holds x, y; it must hold images and labels"),
        ({"images": IMAGES}, "holds images but no labels. Save both"),
        (
            {"images": IMAGES, "labels": LABELS[:-1]},
            "has 39 labels for 40 train images; it must have one label per image",
        ),
        ({"images": IMAGES, "labels": LABELS * 1.0}, r"labels.astype\(int\)"),
        ({"images": IMAGES, "labels": np.eye(4, dtype=int)[LABELS]}, r"Save labels.argmax\(1\) of one-hot labels"),
        (
            {"images": IMAGES / 255, "labels": LABELS},
            r"images of .* is float64; it must be uint8.* Save fractions as",
        ),
        ({"images": IMAGES[:, 0], "labels": LABELS}, r"images of .* has shape \(40, 6\); .* Reshape it"),
        (
            {"images": IMAGES, "labels": LABELS - 1},
            "labels of .* holds -1; labels must be integers from 0 on. Map them",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a", "b"])},
            "label in row 2 .* is 2; it must be in 0..1",
        ),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, "Python objects"),
        ({"images": IMAGES, "labels": LABELS * 0}, "has 1 class; it must have at least two"),
        (
            {"images": IMAGES, "labels": LABELS + 1},
            r"are 1..4; they must start at 0. Save labels - 1, or set num_classes=5",
        ),
        (
            {"images": IMAGES, "labels": LABELS * np.nan},
            r"is float64 of shape \(40,\); .* Save one label per image",
        ),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"of shape \(0,\)"),
        (
            {
                "train_images": IMAGES,
                "train_labels": LABELS,
                "test_images": IMAGES[:, None].repeat(3, 1),
                "test_labels": LABELS,
            },
            "The test images of .* have 3 channels, but there are 1 means",
        ),
    ],
)
def test_arrays_that_are_refused(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=message):
        ready(ArraysDataModule(tmp_path / "a.npz"))


def test_a_file_of_arrays_that_is_damaged_or_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.npz"):
        ArraysDataModule(tmp_path / "nothing.npz")
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"a.npz"):
        ArraysDataModule(tmp_path / "a.npz")


def test_number_of_classes_of_a_file_without_images_of_each(tmp_path):
    np.savez(tmp_path / "a.npz", test_images=IMAGES, test_labels=LABELS + 1)
    data = ready(ArraysDataModule(tmp_path / "a.npz", num_classes=10))
    assert data.num_classes == 10
    assert data.set_names == ["test"]
    assert not data.has_validation


def test_a_header_that_promises_too_much_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as pack:
        for name in ("images", "labels"):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
            pack.writestr(f"{name}.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"a.npz is damaged, truncated"):
        ArraysDataModule(tmp_path / "a.npz")


# --- what is one set today is not another one tomorrow ----------------------------------------------------------------


def test_hash_follows_the_files_and_identity_the_folder(tmp_path):
    one = ready(FolderDataModule(fill(tmp_path / "a"), num_workers=0))
    other = ready(FolderDataModule(fill(tmp_path / "b"), num_workers=0))
    assert one.splits_hash == other.splits_hash
    assert one.identity != other.identity
    (tmp_path / "a" / "ant" / "03.png").rename(tmp_path / "a" / "ant" / "zz.png")
    renamed = ready(FolderDataModule(tmp_path / "a", num_workers=0))
    assert renamed.identity == one.identity
    assert renamed.splits_hash != one.splits_hash


def test_hash_follows_the_labels(tmp_path):
    hashes = set()
    for label in (LABELS, LABELS[::-1]):
        np.savez(tmp_path / "a.npz", images=IMAGES, labels=label)
        hashes.add(ready(ArraysDataModule(tmp_path / "a.npz", SplitSpec(test=1.0))).splits_hash)
    assert len(hashes) == 2


def test_a_link_to_another_class_is_not_followed(tmp_path):
    fill(tmp_path)
    (tmp_path / "ant" / "more").symlink_to(tmp_path / "bee")
    (tmp_path / "ant" / "self").symlink_to(tmp_path / "ant")
    data = ready(FolderDataModule(tmp_path, SplitSpec(test=1.0), num_workers=0))
    assert len(data.source_rows("test")) == 20


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path, ("bus", "train"))
    data = ready(FolderDataModule(tmp_path, num_workers=0))
    assert data.class_names == ("bus", "train")


def test_a_coloured_image_among_grey_ones_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_LOOKED_AT", 2)
    fill(tmp_path)
    Image.new("RGB", (6, 6)).save(tmp_path / "ant" / "05.png")
    with pytest.raises(ValueError, match=r"ant/05.png is in colour, but most images are grey. Set channels to 1 or 3"):
        FolderDataModule(tmp_path).prepare_data()
    FolderDataModule(tmp_path, channels=1).prepare_data()


def test_an_image_that_is_a_line_is_named(tmp_path):
    fill(tmp_path)
    Image.new("L", (1, 2000)).save(tmp_path / "bee" / "line.png")
    with pytest.raises(ValueError, match=r"line.png: it is 1 x 2000, too elongated; crop it"):
        FolderDataModule(tmp_path).prepare_data()


def test_every_class_keeps_a_training_image(tmp_path):
    fill(tmp_path, ("ant", "bee"), each=20)
    fill(tmp_path / "more", ("wasp", "fly"), each=1)
    for name in ("wasp", "fly"):
        (tmp_path / "more" / name).rename(tmp_path / name)
    (tmp_path / "more").rmdir()
    for seed in range(5):
        data = ready(FolderDataModule(tmp_path, SplitSpec(val=0.1, test=0.2, seed=seed), num_workers=0))
        assert data.class_counts.min() == 1


def test_a_small_fraction_is_one_image_at_least(tmp_path):
    data = ready(FolderDataModule(fill(tmp_path, each=3), num_workers=0))
    assert [len(data.source_rows(name)) for name in ("val", "calibration", "test")] == [1, 1, 1]
