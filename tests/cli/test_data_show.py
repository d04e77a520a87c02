"""``calib data show``: counts, sheets whose pixels are those of the set, and what a sheet never replaces."""

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.data import (
    CIFAR10CDataModule,
    CropFlip,
    DigitsDataModule,
    FashionMNISTDataModule,
    FolderDataModule,
    InMemorySet,
    Normalize,
    SplitSpec,
    cifar_shift,
)
from calib_lightning.data.corruptions import CORRUPTIONS, unavailable
from calib_lightning.data.examples import class_examples, corruption_examples, generated_examples, image_bytes
from calib_lightning.plots import sheet

from .small_sets import write_sets
from .test_other_data import fill


def cells(path, rows, columns, height, width):
    """The images (rows, columns, height, width, 3) of a sheet, from the middle of each square."""
    scale = round(sheet._CELL / max(height, width))
    canvas = np.asarray(Image.open(path).convert("RGB"))
    found = np.empty((rows, columns, height, width, 3), dtype=np.uint8)
    for row, column in np.ndindex(rows, columns):
        top = sheet._TOP + row * (scale * height + sheet._GAP) + scale // 2
        left = sheet._LABELS + column * (max(scale * width, sheet._CELL) + sheet._GAP) + scale // 2
        found[row, column] = canvas[top : top + scale * height : scale, left : left + scale * width : scale]
    return found


def drawn(examples):
    """The same from examples."""
    return torch.stack([images for _, images in examples.rows]).expand(-1, -1, 3, -1, -1).permute(0, 1, 3, 4, 2).numpy()


@pytest.mark.parametrize(
    "mean_std", [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,), (0.5,)), ((0.3052,), (0.3760,))]
)
def test_normalisation_is_undone_exactly(mean_std):
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, len(mean_std[0]), 16, 16)
    image = Normalize(*mean_std)(every_byte, torch.tensor([0]), 0)
    assert torch.equal(image_bytes(image, *mean_std), every_byte)


def test_digits_are_shown_as_they_are(calib, tmp_path):
    done = calib("data", "show", "digits", "--images=3", "--seed=1")
    assert done.code == 0, done.err
    data = DigitsDataModule()
    data.setup()
    lines = [line.split() for line in done.out.splitlines()]
    assert ["images", "1,097", "100", "200", "400"] in lines
    for label in range(10):
        numbers = [int((data.evaluation_loader(name).data.label == label).sum()) for name in data.set_names]
        assert [str(label), *map(str, numbers)] in lines
    assert "image: 1 x 8 x 8 (channels, height, width)" in done.out
    assert "mean 0.3052 and std 0.376," in done.out
    assert "split: val=100, calibration=200; seed 0" in done.out
    assert lines[-1] == ["digits.png"]
    shown = cells(tmp_path / "digits.png", 10, 4, 8, 8)
    bytes_of_set = data.evaluation_loader("train").data.image[:, 0].numpy()
    labels = data.evaluation_loader("train").data.label.numpy()
    for label in range(10):
        mine = {image.tobytes() for image in bytes_of_set[labels == label]}
        assert {np.ascontiguousarray(shown[label, column, :, :, 0]).tobytes() for column in range(4)} <= mine
        assert len({shown[label, column].tobytes() for column in range(4)}) == 4


def test_a_second_sheet_gets_a_number(calib, tmp_path):
    for _ in range(2):
        assert calib("data", "show", "digits", "--images=1").code == 0
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["digits-2.png", "digits.png"]
    assert (tmp_path / files[0]).read_bytes() == (tmp_path / files[1]).read_bytes()
    assert calib("data", "show", "digits", "--images=1", "--seed=1", "--output=digits.png").code == 0
    assert (tmp_path / files[0]).read_bytes() != (tmp_path / files[1]).read_bytes()


def test_augmented_versions_are_those_of_training(calib, real_data, tmp_path):
    options = (f"--data.root={real_data}", "--data.augment=true", "--images=2", "--seed=3", "--output=new/sheet.png")
    done = calib("data", "show", "fashion_mnist", *options)
    assert done.code == 0, done.err
    assert "training images: shifted by up to 4 pixels and mirrored, at random" in done.out
    data = FashionMNISTDataModule(SplitSpec(val=5000, calibration=5000), root=real_data, augment=True)
    data.setup()
    train, shown = data.evaluation_loader("train").data, cells(tmp_path / "new" / "sheet.png", 10, 3, 28, 28)[..., 0]
    for label in range(10):
        same = (train.image[:, 0] == torch.from_numpy(shown[label, 0])).all(2).all(1) & (train.label == label)
        place = same.nonzero()[:, 0][:1]
        assert len(place) == 1
        for epoch in range(2):
            augmented = CropFlip(seed=3)(train.image[place], place, epoch)[0, 0]
            assert np.array_equal(shown[label, 1 + epoch], augmented.numpy())


def test_files_are_framed_and_cropped(calib, tmp_path):
    fill(tmp_path / "mine", size=(12, 12), mode="RGB")
    options = ("--data.root=mine", "--data.size=[10,8]", "--data.augment=true", "--images=2", "--output=out.png")
    done = calib("data", "show", "folder", *options)
    assert done.code == 0, done.err
    assert "image: 3 x 10 x 8" in done.out
    assert "training images: cut to 35% to 100% of the area and mirrored, at random" in done.out
    assert [line.split() for line in done.out.splitlines() if "ant" in line] == [["0", "ant", "12", "2", "2", "4"]]
    data = FolderDataModule(tmp_path / "mine", size=(10, 8), augment=True)
    data.setup()
    train = data.evaluation_loader("train").data
    framed = {train.image.read(place).permute(1, 2, 0).contiguous().numpy().tobytes() for place in range(len(train))}
    shown = cells(tmp_path / "out.png", 2, 3, 10, 8)
    for row in shown:
        assert row[0].tobytes() in framed
        assert not {image.tobytes() for image in row[1:]} & framed


def test_arrays_and_many_classes(calib, tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (300, 6, 6)).astype(np.uint8)
    labels = np.concatenate([np.repeat(np.arange(30), 9), np.repeat(0, 30)])
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    done = calib("data", "show", "arrays", "--data.file=mine.npz", "--data.split.test=1.0")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    for title, count in (("smallest class", 9), ("median class", 9), ("largest class", 39), ("0", 39), ("29", 9)):
        assert [*title.split(), str(count)] in lines
    assert ["1", "9"] not in lines
    assert len(cells(tmp_path / "arrays.png", 10, 6, 6, 6)) == 10


def test_data_for_evaluation_only_has_a_sheet_of_corruptions(calib, tmp_path, monkeypatch):
    write_sets(["cifar10_c"], tmp_path / "small", monkeypatch)
    done = calib("data", "show", "cifar10_c", "--data.root=small", "--images=1", "--seed=2")
    assert done.code == 0, done.err
    assert "shift/cifar10_c (95 sets)" in done.out
    assert ["images", "950"] in [line.split() for line in done.out.splitlines()]
    assert done.out.splitlines()[-2:] == ["cifar10_c.png", "cifar10_c_corruptions.png"]
    shown = cells(tmp_path / "cifar10_c_corruptions.png", 19, 5, 32, 32)
    place = int(torch.randperm(10, generator=torch.Generator().manual_seed(2))[0])
    for row, name in enumerate(cifar_shift.CORRUPTIONS):
        images = np.load(tmp_path / "small" / "CIFAR-10-C" / f"{name}.npy")
        assert np.array_equal(shown[row], images[[place + 10 * severity for severity in range(5)]])
    data = CIFAR10CDataModule(root=tmp_path / "small", severities=(2, 5), corruptions=("fog",))
    data.setup()
    (fog,) = corruption_examples(data, seed=2).values()
    assert fog.columns == ["2", "5"]
    assert np.array_equal(drawn(fog)[0], shown[cifar_shift.CORRUPTIONS.index("fog")][[1, 4]])


def test_classes_without_images_have_no_row():
    image = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
    data = DigitsDataModule()
    data.setup()
    data._sets = {
        "train": InMemorySet(image, torch.tensor([2, 2, 7, 7]), torch.arange(4), Normalize(data.mean, data.std))
    }
    examples = class_examples(data, images=5, seed=0)
    assert [(label, len(images)) for label, images in examples.rows] == [("2", 2), ("7", 2)]
    assert examples.columns == ["1", "2"]
    assert torch.equal(torch.cat([images for _, images in examples.rows]).sort(0).values, image)


def test_generated_corruptions_are_those_that_are_evaluated(calib, tmp_path, monkeypatch):
    write_sets(["mnist"], tmp_path / "small", monkeypatch)
    generated = "{name: generated, corruptions: [fog, jpeg_compression], severities: [2, 5]}"
    options = ("--data.root=small", "--data.split.val=20", "--data.split.calibration=20", "--images=1", "--seed=4")
    for number, option in enumerate(("--corruptions", f"--data.shift=[{generated}]")):
        done = calib("data", "show", "mnist", *options, option, f"--output={number}.png")
        assert done.code == 0, done.err
    names = [name for name in CORRUPTIONS if name not in unavailable(["frost"])]
    shapes = ((len(names), 6), (2, 3))
    made, stored = (cells(tmp_path / f"{i}_corruptions.png", *shapes[i], 28, 28) for i in range(2))
    assert np.array_equal(stored, made[[names.index("fog"), names.index("jpeg_compression")]][:, [0, 2, 5]])
    assert len({image.tobytes() for image in made[:, 1:].reshape(-1, 28, 28, 3)}) > 5 * len(names) - 5
    assert "shift/generated (4 sets)" in done.out
    assert "generated: 2 corruptions x 2 severities of 20 test images, constants 'cifar'" in done.out


def test_what_cannot_be_generated_is_left_out(monkeypatch):
    monkeypatch.setattr("calib_lightning.data.examples.unavailable", lambda names: {"frost": "no photographs"})
    data = DigitsDataModule()
    data.setup()
    examples, table, missing = generated_examples(data, seed=0)
    assert [name for name, _ in examples.rows] == [name for name in CORRUPTIONS if name != "frost"]
    assert (table, missing) == ("cifar", {"frost": "no photographs"})


def test_images_of_other_data_have_a_row(tmp_path, monkeypatch):
    write_sets(["fashion_mnist"], tmp_path / "more", monkeypatch)
    data = DigitsDataModule(ood=[{"name": "fashion_mnist", "root": tmp_path / "more"}])
    data.prepare_data()
    data.setup()
    label, images = class_examples(data, images=3, seed=0).rows[-1]
    assert (label, tuple(images.shape)) == ("ood/fashion_mnist", (4, 1, 8, 8))


# --- what a sheet never replaces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["itself", "link", "hard link"])
def test_an_image_of_the_data_stays(way, calib, tmp_path):
    target = fill(tmp_path / "mine") / "ant" / "03.png"
    before, output = target.read_bytes(), "mine/ant/03.png"
    if way != "itself":
        output = "other.png"
        (tmp_path / output).symlink_to(target) if way == "link" else (tmp_path / output).hardlink_to(target)
    done = calib("data", "show", "folder", "--data.root=mine", f"--output={output}")
    assert done.code == 1
    assert f"--output is {output}, which this command reads" in done.err
    assert target.read_bytes() == before


def test_the_sheet_of_corruptions_is_checked_before_any_is_drawn(calib, tmp_path, monkeypatch):
    write_sets(["cifar10_c"], tmp_path / "small", monkeypatch)
    fog = tmp_path / "small" / "CIFAR-10-C" / "fog.npy"
    (tmp_path / "new_corruptions.png").symlink_to(fog)
    before = fog.read_bytes()
    done = calib("data", "show", "cifar10_c", "--data.root=small", "--output=new.png")
    assert done.code == 1
    assert "new_corruptions.png, which this command reads" in done.err
    assert fog.read_bytes() == before
    assert not (tmp_path / "new.png").exists()


@pytest.mark.parametrize(("output", "said"), [("file/x.png", "file is not a folder"), ("folder.png", "is a folder")])
def test_where_no_sheet_can_be(output, said, calib, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder.png").mkdir()
    done = calib("data", "show", "digits", f"--output={output}")
    assert done.code == 1
    assert said in done.err
    assert (tmp_path / "file").read_text() == "text"


def test_no_file_that_nobody_named_is_replaced(calib, tmp_path):
    for name in ("digits.png", "digits-2_corruptions.png"):
        (tmp_path / name).write_text("mine")
    assert calib("data", "show", "digits", "--images=1", "--corruptions").code == 0
    files = sorted(path.name for path in tmp_path.iterdir() if path.read_bytes()[1:4] == b"PNG")
    assert files == ["digits-2.png", "digits-2_corruptions-2.png"]


def test_compressed_files_stay(calib, tmp_path, monkeypatch):
    write_sets(["mnist"], tmp_path / "small", monkeypatch)
    target = tmp_path / "small" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    (tmp_path / "x.png").symlink_to(target)
    before = target.read_bytes()
    held_out = ("--data.split.val=20", "--data.split.calibration=20")
    done = calib("data", "show", "mnist", "--data.root=small", "--output=x.png", *held_out)
    assert done.code == 1
    assert "--output is x.png, which this command reads" in done.err
    assert target.read_bytes() == before
