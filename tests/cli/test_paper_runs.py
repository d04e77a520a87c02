"""Every cell of the papers' tables is built, and a covering set is run; slow."""

import json
import re
import shlex
import shutil
from collections import Counter

import pytest
import timm
import yaml

from calib_lightning.commands.fit import CalibCLI
from calib_lightning.utils.config_search import find_config
from calib_lightning.utils.papers import cell, rows_and_columns

from .paper_cells import CELLS, INDEX, RECIPES, fits, options_of
from .small_sets import SETS, write_sets
from .test_configs import CONFIGS, METHODS


@pytest.fixture
def built(calib, monkeypatch):
    """What ``calib fit`` has built of a command, and what it said; it does not train."""
    kept = []
    monkeypatch.setattr(CalibCLI, "_run_subcommand", lambda cli, subcommand: kept.append(cli))

    def build(command):
        done = calib(*shlex.split(command)[1:])
        assert done.code == 0, done.err
        return kept.pop(), done.err

    return build


# --- slow: every cell is built, and some are run ---------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch):
    """``timm.create_model`` without pretrained weights; the names that were asked for with them."""
    create, asked = timm.create_model, []

    def untrained(name, pretrained=False, **options):
        asked.extend([name] if pretrained else [])
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", untrained)
    return asked


CLASSES = {"cifar10": 10, "cifar100": 100, "cifar100_lt": 100, "tiny_imagenet": 200, "imagenet": 1000, "bloodmnist": 8}


@pytest.mark.slow
def test_every_training_of_the_index_is_built(built, no_download, tmp_path):
    for command, found in fits().items():
        cli, _ = built(command)
        encoder = yaml.safe_load(options_of(command)["--model.encoder"][0])
        name = encoder if isinstance(encoder, str) else encoder["name"]
        data = found.where.column.partition("/")[0]
        assert cli.model.encoder.name == name
        assert (
            cli.model.num_classes
            == CLASSES[{"cifar10_1": "cifar10", "cifar10_2": "cifar10"}.get(data, data.removesuffix("_v2"))]
        )
        assert (name in no_download) == isinstance(encoder, dict)
        stages = [type(each).__name__ for each in cli.trainer.callbacks]
        assert ("MaskedClassifier" in stages) == any(
            "mac_cal" in piece for piece in options_of(command).get("-c", [])
        ), command
        assert ("ClipGradients" in stages) == any(
            piece in ("recipe/mukhoti", "recipe/tiny-imagenet") for piece in options_of(command).get("-c", [])
        )
        shutil.rmtree(tmp_path / "runs")
    print(f"{len(CELLS)} cells, {len(fits())} trainings: all built")


def _of_index():
    """Cells of the index: all rows of MaC-Cal's Table 1 and of its ablation, and what the other papers add."""
    rows, columns = rows_and_columns(INDEX, "mac_cal", "table1")
    columns = [column for column in columns if "tiny" not in column] + ["tiny_imagenet/resnet50"]
    chosen = [("mac_cal", "table1", row, columns[number % 9]) for number, row in enumerate(rows)]
    chosen += [
        ("mac_cal", "table5", row, "cifar10/densenet121")
        for row in rows_and_columns(INDEX, "mac_cal", "table5")[0][1:5]
    ]
    chosen += [
        ("mac_cal", "table3", "mit+mac_cal", "tiny_imagenet/resnet50"),
        ("mac_cal", "table3", "mixup+mac_cal", "cifar10/resnet50"),
        ("mac_cal", "table3", "dfl+mac_cal", "tiny_imagenet/resnet50"),
        ("refcal", "headline", "refcal", "cifar100_lt/resnet50"),
        ("refcal", "headline", "crl", "cifar100_lt/resnet50"),
        ("dark_side", "table1", "ts", "imagenet_v2/resnet50"),
        ("dark_side", "table1", "mx", "imagenet/resnet50"),
        ("dark_side", "table2", "erl", "cifar100/vgg16"),
        ("dark_side", "table2", "ts", "cifar10/densenet121"),
        ("dark_side", "table3", "ts", "cifar10_1/vgg16"),
        ("dark_side", "table3", "fl", "cifar10_2/vgg16"),
        ("dark_side", "table4", "confidnet", "cifar10/vgg16"),
        ("neural_clamping", "table1", "nc_fl", "bloodmnist/resnet50"),
        ("neural_clamping", "table2", "dir_odir", "cifar100/resnet110"),
        ("neural_clamping", "table2", "vs", "cifar100/wrn40_10"),
        ("neural_clamping", "table3", "ts", "imagenet/resnet101"),
        ("neural_clamping", "table3", "ts", "imagenet/vit_s16"),
        ("neural_clamping", "table3", "ts", "imagenet/mixer_b16"),
        ("neural_clamping", "table4", "output_only", "cifar100/resnet110"),
    ]
    return {"-".join(where).replace("/", "-"): cell(INDEX, *where).commands for where in chosen}


def _beside_the_index():
    """Methods, recipes and layouts that no table has."""
    grey = "--model.encoder='{name: NAME, in_channels: 1}'"
    trainings = {
        "mdca-svhn": "-c recipe/mdca-svhn --data svhn --model mdca",
        "mdca-cifar10": "-c recipe/mdca-cifar10 --data cifar10 --model dca",
        "mdca-cifar100": "-c recipe/mdca-cifar100 --data cifar100_lt --model class_balanced",
        "mdca-tiny": "-c recipe/mdca-tiny-imagenet --data tiny_imagenet_lt --model logit_norm",
        "ldam": "-c recipe/ldam --data cifar10_lt --model ldam",
        "crl": "-c recipe/crl --data cifar10 --model crl",
        "tst": "-c recipe/tst --data cifar10_mac_cal --model tst",
        "brier-mnist": f"-c recipe/mukhoti-brier --data mnist --model brier {grey.replace('NAME', 'resnet20_classic')}",
        "fashion": f"-c recipe/cifar350 --data fashion_mnist --model mit_a {grey.replace('NAME', 'preact_resnet18')}",
        "breast": f"-c recipe/medmnist --data breastmnist --model focal_schedule {grey.replace('NAME', 'wrn40_2')}",
        "textures": "-c recipe/dark-imagenet --data textures --model regmixup --model.encoder=resnet18",
        "folder": "-c recipe/gpu-hour --data folder --model two_stage --model.encoder=resnet18_cifar "
        "--trainer.callbacks.compile=false",
        "arrays": "-c recipe/cpu-evening --data arrays --model mac_cal",
        "augmix": "-c recipe/cifar350 --data cifar10h --model augmix --model.encoder=densenet_bc100",
        "ada-focal": "-c recipe/cifar350 -c callback/temperature --data cifar10 --model ada_focal",
        "digits": "-c recipe/cifar350 --data digits --model entropy_regularization --model.encoder=digits_cnn",
    }
    commands = {name: (f"calib fit {options} --run_dir=runs/{name}",) for name, options in trainings.items()}
    shifted = "calib test -c runs/shift/config.yaml --data cifar10_c --data.corruptions=[fog] --run_dir=runs/shift/fog"
    fit = "calib fit -c recipe/refcal-baseline --data cifar10 --model focal --model.encoder=resnet20_classic"
    return commands | {"shift": (f"{fit} --run_dir=runs/shift", shifted)}


COVERING = _of_index() | _beside_the_index()
SHORT = (
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--quiet=true"),
    *(f"--trainer.limit_{name}_batches=1" for name in ("train", "val", "test")),
)


def _short_fit(options):
    """What makes a training one of a single step in each stage."""
    sizes = SETS[options["--data"][0]][1]
    more = [f"--data.split.{name}={size}" for name, size in sizes.items() if f"--data.split.{name}" not in options]
    if options.get("--trainer.max_epochs") != ["0"]:
        more += ["--trainer.max_epochs=1"]
    if options["--model"][0] in ("tst", "v_tst", "mac_cal", "two_stage", "refcal", "confidnet"):
        more += ["--model.switch.at_epoch=-1", "--model.switch.training.batch_size=4"]
    if any(name.startswith("callback/mac_cal") for name in options.get("-c", [])):
        more += ["--trainer.callbacks.at_epoch=-1", "--trainer.callbacks.training.batch_size=4"]
    return [*SHORT, "--batch_size=4", *more]


def test_the_covering_set_has_every_method_network_and_layout():
    trained = [options_of(commands[0]) for commands in COVERING.values()]
    all_of_them = [options_of(command) for commands in COVERING.values() for command in commands]
    assert {options["--model"][0] for options in trained} == set(METHODS)
    assert {name for options in all_of_them for name in options.get("--data", [])} == set(SETS)
    pieces = Counter(name for options in trained for name in options.get("-c", []))
    assert set(pieces) == {f"recipe/{name}" for name in RECIPES} | {
        f"callback/{path.stem}" for path in (CONFIGS / "callback").glob("*.yaml")
    }
    configured = {each["encoder"] for each in map(_recipe_model, trained)}
    asked = {options["--model.encoder"][0] for options in trained if "--model.encoder" in options} | configured
    for network in (
        *("resnet20_classic", "resnet110_classic", "resnet50_cifar", "resnet110_bottleneck", "wrn26_10", "wrn40_10"),
        *("densenet121_cifar", "vgg16_bn_cifar", "preact_resnet110", "resnet50_tiny_imagenet", "resnet50"),
    ):
        assert any(network in name for name in asked), network
    # every network and every piece of data of the index
    assert {options_of(command)["--model.encoder"][0] for command in fits()} <= asked
    print(f"{len(COVERING)} cells cover the methods, networks and layouts")


def _recipe_model(options):
    return (
        yaml.safe_load(find_config(options["-c"][0]).read_text())["model"]["init_args"]
        if "-c" in options
        else {"encoder": ""}
    )


@pytest.fixture(scope="module")
def count():
    """Prints how many cells were run."""
    done = []
    yield done
    print(f"\n{len(done)} of {len(COVERING)} cells of the covering set were run")


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERING)
def test_cells_are_run(calib, tmp_path, monkeypatch, no_download, count, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    commands = COVERING[name]
    options = [options_of(command) for command in commands]
    write_sets([data for each in options for data in each.get("--data", [])], tmp_path / "work" / "data", monkeypatch)
    for command, each in zip(commands, options, strict=True):
        kind = each[""][0]
        more = {"fit": _short_fit, "test": lambda _: SHORT}.get(kind, lambda _: ())(each)
        if "NeuralClamping" in commands[-1]:  # which sees all images again
            more = [word for word in more if "limit_test" not in word]
        done = calib(*shlex.split(command)[1:], *more)
        assert done.code == 0, done.err
        if kind in ("fit", "test"):
            record = json.loads((tmp_path / "work" / each["--run_dir"][0] / "run.json").read_text())
            assert [stage["status"] for stage in record["stages"]] == ["finished"] * len(record["stages"])
            assert any(re.fullmatch(r"(test|shift/\w+(/\w+)?)/nll", key) for key in record["results"]), record[
                "results"
            ]
        if kind == "fit":
            # one step in each stage, none of a network that is taken as it is
            stages = 0 if each.get("--trainer.max_epochs") == ["0"] else 2 if _staged(each) else 1
            assert (record["stages"][0]["epochs"], record["stages"][0]["steps"]) == (stages, stages)
            run = tmp_path / "work" / each["--run_dir"][0]
    if "--trainer.max_epochs" in options[0]:
        assert set(no_download) == {yaml.safe_load(options[0]["--model.encoder"][0])["name"]}
        assert (run / "calibrate" / "Temperature.pt").is_file()
    count.append(name)
    shutil.rmtree(tmp_path / "work" / "runs")


def _staged(options):
    return any(word.endswith("at_epoch=-1") for word in _short_fit(options))
