"""``calib data list | prepare | show``: facts that hold, files that arrive, pixels that are those of the set."""

import subprocess
import sys

import pytest
from medmnist.info import INFO

from calib_lightning import data as every
from calib_lightning.commands import data_list
from calib_lightning.data import (
    CIFAR10CDataModule,
    CIFAR101DataModule,
    CIFAR102DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageNetDataModule,
    ImageNetV2DataModule,
    MedMNISTDataModule,
    MNISTDataModule,
    SVHNDataModule,
    TexturesDataModule,
    TinyImageNetDataModule,
    cifar_shift,
)
from calib_lightning.data.card import Card
from calib_lightning.data.corruptions import CORRUPTIONS, SEVERITIES
from calib_lightning.data.generated import GENERATED
from calib_lightning.data.web_files import Archive
from calib_lightning.utils.config_search import config_names

from .small_sets import write_sets

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


def test_generated_corruptions_are_counted_as_they_are():
    (line,) = (line for line in data_list.data_lines() if line.name == GENERATED)
    assert line.images == f"{len(CORRUPTIONS)} corruptions x {len(SEVERITIES)} severities of test"


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
        (["list", "digits"], "unrecognized arguments: digits. calib data show NAME shows one of them"),
        (["list", "--markdwn"], "Did you mean --markdown?"),
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
