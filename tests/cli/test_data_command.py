"""``calib data list | prepare | show``: facts that hold, files that arrive, pixels that are those of the set."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from medmnist.info import INFO
from PIL import Image

from calib_lightning import data as every
from calib_lightning.commands import data_list
from calib_lightning.data import (
    CIFAR10CDataModule,
    CIFAR101DataModule,
    CIFAR102DataModule,
    CropFlip,
    DigitsDataModule,
    FashionMNISTDataModule,
    FolderDataModule,
    ImageNetDataModule,
    ImageNetV2DataModule,
    InMemorySet,
    MedMNISTDataModule,
    MNISTDataModule,
    Normalize,
    SplitSpec,
    SVHNDataModule,
    TexturesDataModule,
    TinyImageNetDataModule,
    cifar_shift,
)
from calib_lightning.data.card import Card
from calib_lightning.data.examples import class_examples, corruption_examples, image_bytes
from calib_lightning.data.web_files import Archive
from calib_lightning.plots import sheet
from calib_lightning.utils.config_search import config_names

from .small_sets import write_sets
from .test_other_data import fill

CARDS = {name: cls for name in every.__all__ if "card" in vars(cls := getattr(every, name))}


# --- list ------------------------------------------------------------------------------------------------------------


def test_every_name_has_a_complete_line(calib):
    lines = data_list.data_lines()
    assert sorted(line.name for line in lines) == sorted([*config_names("data"), "generated"])
    assert all(all(line) for line in lines)
    done = calib("data", "list")
    printed = [line.split()[0] for line in done.out.splitlines() if "  " in line]
    assert (done.code, printed[1:]) == (0, [line.name for line in lines])


def test_it_is_there_at_once():
    code = "import sys; from calib_lightning.__main__ import main; assert main(['data', 'list']) == 0"
    script = f"{code}; assert not {{'torch', 'medmnist', 'lightning', 'matplotlib'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_data_module_has_a_card_that_is_read_as_it_is():
    modules = [getattr(every, name) for name in every.__all__ if name.endswith("DataModule")]
    abstract = (every.BenchmarkDataModule, every.DownloadedDataModule, every.ToyDataModule, MedMNISTDataModule)
    assert set(CARDS.values()) == set(modules) - set(abstract)
    assert Card._fields == data_list.FIELDS
    assert {cls.__name__: cls.card._asdict() for cls in CARDS.values()} == data_list._cards()
    for cls in CARDS.values():
        assert cls.card.classes in (None, cls.num_classes) if hasattr(cls, "num_classes") else not cls.card.classes
        assert cls.card.shape is None or len(cls.mean if hasattr(cls, "mean") else (0, 0, 0)) == cls.card.shape[0]


def test_cards_agree_with_what_the_modules_check():
    assert TinyImageNetDataModule.card.images == (200 * TinyImageNetDataModule.train_count, 0, 200 * 50)
    assert TinyImageNetDataModule.card.download == TinyImageNetDataModule.archives[0].size
    assert TexturesDataModule.card.images == (47 * TexturesDataModule.class_count,) * 3
    assert ImageNetDataModule.card.images[2] == ImageNetDataModule.test_size
    assert ImageNetV2DataModule.card.images[2] == 1000 * ImageNetV2DataModule.class_count
    assert CIFAR101DataModule.card.images[2] == CIFAR101DataModule.versions["v6"][0]
    assert CIFAR102DataModule.card.images[2] == CIFAR102DataModule.sizes["test"]
    assert CIFAR10CDataModule.card.images[2] == len(cifar_shift.CORRUPTIONS) * 5 * cifar_shift._ROWS
    for cls in (MNISTDataModule, FashionMNISTDataModule):
        assert cls.card.images == (cls.sizes["train"], 0, cls.sizes["t10k"])


def test_medmnist_is_as_its_package_says(real_data):
    lines = {line.name: line for line in data_list.data_lines() if line.name in INFO}
    assert set(lines) == set(MedMNISTDataModule.downloads)
    assert data_list._medmnist_info() == INFO
    for name, line in lines.items():
        assert line.licence == INFO[name]["license"]
        assert line.classes == str(MedMNISTDataModule(name=name).num_classes)
    assert (real_data / "medmnist" / "breastmnist.npz").stat().st_size == MedMNISTDataModule.downloads["breastmnist"]


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "breastmnist", "pneumoniamnist"])
def test_numbers_are_those_of_the_real_files(name, request):
    root = None if name == "digits" else request.getfixturevalue("real_data")
    data = {
        "digits": DigitsDataModule,
        "fashion_mnist": lambda: FashionMNISTDataModule(root=root),
        "breastmnist": lambda: MedMNISTDataModule(name=name, root=root / "medmnist"),
        "pneumoniamnist": lambda: MedMNISTDataModule(name=name, root=root / "medmnist"),
    }[name]()
    data.setup()
    sizes = [0 if source is None else len(source.label) for source in map(data.load_part, ("train", "val", "test"))]
    if name == "digits":
        sizes = [len(data.load_train().label), 0, len(data.load_test().label)]
    (line,) = (line for line in data_list.data_lines() if line.name == name)
    assert line.images == " / ".join(f"{size:,}" if size else "-" for size in sizes)
    assert line.image == " x ".join(map(str, data.image_facts["shape"]))
    assert line.classes == str(data.num_classes)


def test_data_of_the_working_directory_is_ones_own(calib, tmp_path):
    (tmp_path / "configs" / "data").mkdir(parents=True)
    (tmp_path / "configs" / "data" / "mine.yaml").write_text("class_path: my_module.MyDataModule\n")
    assert calib("data", "list").out.partition("your own files:")[2].split("\n")[3].startswith("mine ")


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "nothing"), (999, "999 bytes"), (559_580, "560 kB"), (15_500_000, "15.5 MB"), (155e9, "155 GB")],
)
def test_sizes_in_units(size, said):
    assert data_list.in_units(size) == said


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["lst"], "'lst' must be one of list, prepare, show. Did you mean list?"),
        (["list", "digits"], "unrecognized arguments: digits"),
        (["prepare"], "NAME is missing: calib data prepare NAME"),
        (["show", "--data.root=DIR"], "NAME is missing"),
        (["prepare", "fashon_mnist"], "NAME is 'fashon_mnist'; it must be a file, a class or a name"),
        (["prepare", "fashon_mnist"], "Did you mean fashion_mnist?"),
        (["show", "DigitDataModule"], "did you mean DigitsDataModule?"),
        (["show", "digits", "--data.bach_size=3"], "did you mean batch_size?"),
        (["show", "digits", "--imags=3"], "--imags: did you mean --images?"),
        (["prepare", "digits", "--output=x.png"], "unrecognized arguments: --output=x.png"),
        (["show", "digits", "--images=0"], "--images is 0; it must be in 1..20"),
        (["show", "digits", "--output=x.jpg"], "--output is x.jpg; its suffix must be .png or .svg"),
    ],
)
def test_a_wrong_command_line(argv, said, calib, tmp_path):
    done = calib("data", *argv)
    assert done.code == 2
    assert said in done.err
    assert list(tmp_path.iterdir()) == []


# --- prepare ---------------------------------------------------------------------------------------------------------

HELD_OUT = ("--data.split.val=20", "--data.split.calibration=20")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The small files of SVHN as a server has them; ``root`` does not exist yet."""
    write_sets(["svhn"], tmp_path / "server", monkeypatch)
    archives = tuple(
        Archive((tmp_path / "server" / name).as_uri(), name, md5) for name, md5 in SVHNDataModule.needed.items()
    )
    monkeypatch.setattr(SVHNDataModule, "archives", archives)
    return tmp_path / "server"


def test_files_are_downloaded_and_counted(calib, served, tmp_path):
    done = calib("data", "prepare", "svhn", "--data.root=root", *HELD_OUT)
    assert done.code == 0, done.err
    for name in SVHNDataModule.needed:
        assert (tmp_path / "root" / name).read_bytes() == (served / name).read_bytes()
    first, *table = done.out.splitlines()
    assert first == f"svhn: SVHNDataModule, {tmp_path / 'root'}"
    assert [line.split() for line in table] == [
        ["train", "val", "calibration", "test"],
        ["images", "60", "20", "20", "20"],
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.download=false"], "(download=False):\n  train_32x32.mat: missing"),
        ([], "damaged"),
    ],
)
def test_files_that_cannot_be_had_are_named(options, said, calib, served, tmp_path):
    if not options:
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "train_32x32.mat").write_bytes(b"not it")
    done = calib("data", "prepare", "svhn", "--data.root=root", *HELD_OUT, *options)
    assert done.code == 1
    assert "SVHNDataModule cannot use the files under root=" in done.err
    assert said in done.err
    assert done.out == ""


def test_a_server_without_the_files(calib, served):
    for name in SVHNDataModule.needed:
        (served / name).unlink()
    done = calib("data", "prepare", "svhn", "--data.root=root", *HELD_OUT)
    assert done.code == 1
    assert "the download failed: " in done.err


def test_a_data_module_of_ones_own(calib, tmp_path, monkeypatch):
    text = "from lightning.pytorch import LightningDataModule\n\n\nclass Mine(LightningDataModule):\n    pass\n"
    (tmp_path / "own_data_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    done = calib("data", "prepare", "own_data_module.Mine")
    assert (done.code, done.out) == (0, "own_data_module.Mine: Mine\n")
    done = calib("data", "show", "own_data_module.Mine")
    assert "own_data_module.Mine is Mine; it must be a BenchmarkDataModule to be shown" in done.err


# --- show ------------------------------------------------------------------------------------------------------------


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
    assert torch.equal(torch.cat([images for _, images in examples.rows]).sort(0).values, image)


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
