"""Recipes, methods and cells of the papers' tables compose to the settings that were published."""

import shlex

import pytest
import yaml

from calib_lightning.core import encoder_names
from calib_lightning.utils.papers import cell, rows_and_columns

from .paper_cells import CELLS, FLSD, INDEX, RECIPES, options_of
from .test_configs import CONFIGS, METHODS

# --- composing -------------------------------------------------------------------------------------------------------


def composed(calib, command):
    """The configuration of a command."""
    done = calib(*shlex.split(command)[1:], "--print_config")
    assert done.code == 0, done.err
    return yaml.safe_load(done.out)


def _short(config):
    """What a recipe decides."""
    model, trainer = config["model"]["init_args"], config["trainer"]
    optimizer, scheduler = model.get("optimizer") or {}, model.get("scheduler") or {}
    return {
        "encoder": model["encoder"],
        "optimizer": optimizer.get("class_path", "").rpartition(".")[2],
        "lr": optimizer.get("init_args", {}).get("lr"),
        "decay": optimizer.get("init_args", {}).get("weight_decay"),
        "milestones": scheduler.get("init_args", {}).get("milestones"),
        "factor": scheduler.get("init_args", {}).get("gamma"),
        "epochs": trainer["max_epochs"],
        "callbacks": [each["class_path"].rpartition(".")[2] for each in trainer["callbacks"] or []],
        "seed": config["seed_everything"],
        "batch": config["batch_size"],
        "select": config["select_on"],
    }


SUITED = {
    "refcal": "refcal",
    "confidnet": "confidnet",
    "crl": "crl",
    "ldam": "ldam",
    "mukhoti-brier": "brier",
    "tst": "tst",
}
"""Recipes that were made for a method; the others go with the focal loss."""

EPOCHS = {
    **dict.fromkeys(("cifar350", "mukhoti", "mukhoti-brier"), 350),
    **dict.fromkeys(("tiny-imagenet", "tiny-imagenet-mean", "dark-imagenet", "mdca-svhn", "mdca-tiny-imagenet"), 100),
    **dict.fromkeys(("dark-cifar", "crl"), 300),
    **dict.fromkeys(("ldam", "mdca-cifar100"), 200),
    **{"refcal": 1000, "refcal-baseline": 500, "confidnet": 250, "mdca-cifar10": 160, "medmnist": 100, "tst": 600},
    **{"cpu-evening": 30, "gpu-hour": 120},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(calib, recipe):
    method = SUITED.get(recipe, "focal")
    found = _short(composed(calib, f"calib fit -c recipe/{recipe} --data cifar10_mac_cal --model {method}"))
    assert found["epochs"] == EPOCHS[recipe]
    assert found["encoder"] in encoder_names() or (recipe, found["encoder"]) == ("dark-imagenet", "resnet50")
    assert found["lr"] > 0
    batches = {"refcal": 1024, "mdca-tiny-imagenet": 64}
    batches |= dict.fromkeys(("tst", "refcal-baseline", "gpu-hour", "dark-imagenet"), 256)
    assert found["batch"] == batches.get(recipe, 128)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_with_the_recipe_of_the_focal_losses(calib, method):
    config = composed(calib, f"calib fit -c recipe/mukhoti --data cifar10_mac_cal --model {method}")
    found = _short(config)
    # refcal brings its own optimiser; all else is the recipe's
    assert (found["lr"], found["milestones"]) == ((0.5, None) if method == "refcal" else (12.8, [149, 249]))
    assert (found["epochs"], found["callbacks"], found["seed"]) == (350, ["ClipGradients"], 1)
    alone = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())
    assert config["model"]["class_path"].rpartition(".")[2] == alone["class_path"]
    for name, value in alone.get("init_args", {}).items():
        if isinstance(value, int | float | str):
            assert config["model"]["init_args"][name] == value


def _one_cell_of_each():
    """Every row and every column of every table at least once: the commands that train them, one of a table fast."""
    chosen = {}
    for paper, table in dict.fromkeys(each.where[:2] for each in CELLS):
        rows, columns = rows_and_columns(INDEX, paper, table)
        for number in range(max(len(rows), len(columns))):
            row, column = rows[number % len(rows)], columns[number % len(columns)]
            chosen.setdefault(cell(INDEX, paper, table, row, column).commands[0], pytest.mark.slow if number else ())
    return [pytest.param(command, marks=marks) for command, marks in chosen.items()]


@pytest.mark.parametrize("command", _one_cell_of_each(), ids=lambda command: options_of(command)["--run_dir"][0][5:])
def test_every_row_and_every_column_composes(calib, command):
    found, options = composed(calib, command), options_of(command)
    assert found["model"]["init_args"]["encoder"] == yaml.safe_load(options["--model.encoder"][0])
    assert found["run_dir"] == options["--run_dir"][0]
    paths = [callback["class_path"] for callback in found["trainer"]["callbacks"] or []]
    assert any("MaskedClassifier" in path for path in paths) == any(
        "mac_cal_paper" in name or name == "callback/mac_cal" for name in options.get("-c", [])
    )


MUKHOTI = {
    "optimizer": "SGD",
    "lr": 12.8,
    "decay": 3.90625e-6,
    "milestones": [149, 249],
    "factor": 0.1,
    "epochs": 350,
    "callbacks": ["ClipGradients"],
    "seed": 1,
    "batch": 128,
    "select": "last",
}
PLAIN = MUKHOTI | {"lr": 0.1, "decay": 5e-4, "milestones": [150, 250], "callbacks": []}
STEP = {"optimizer": "SGD", "lr": 0.1, "select": "last", "callbacks": [], "batch": 128, "seed": 0, "decay": 5e-4}
DARK = STEP | {"milestones": [150, 225], "factor": 0.2, "epochs": 300}
DARK_IMAGENET = STEP | {"milestones": [30, 60, 90], "factor": 0.1, "epochs": 100, "batch": 256, "decay": 1e-4}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("mac_cal", "table1", "vanilla", "cifar100/resnet110"), MUKHOTI | {"encoder": "resnet110_bottleneck"}),
        (("mac_cal", "table1", "acls", "cifar10/wrn26_10"), PLAIN | {"encoder": "wrn26_10"}),
        (
            ("mac_cal", "table3", "fl+mac_cal", "tiny_imagenet/resnet50"),
            MUKHOTI
            | {"milestones": [39, 59], "epochs": 100, "callbacks": ["ClipGradients", "MaskedClassifier"]}
            | {"encoder": "resnet50_tiny_imagenet"},
        ),
        (
            ("mac_cal", "table3", "mbls+mac_cal", "tiny_imagenet/resnet50"),
            PLAIN
            | {"milestones": [40, 60], "epochs": 100, "callbacks": ["MaskedClassifier"], "batch": 128}
            | {"encoder": "resnet50_tiny_imagenet"},
        ),
        (("dark_side", "table2", "mx", "cifar100/densenet121"), DARK | {"encoder": "densenet121_cifar"}),
        (("dark_side", "table2", "fl", "cifar10/vgg16"), DARK | {"encoder": "vgg16_bn_cifar", "factor": 0.1}),
        (("dark_side", "table3", "ls", "cifar10_1/vgg16"), DARK | {"encoder": "vgg16_bn_cifar", "factor": 0.1}),
        (("dark_side", "table1", "baseline", "imagenet/resnet50"), DARK_IMAGENET | {"encoder": "resnet50"}),
        (("dark_side", "table1", "mx", "imagenet_v2/resnet50"), DARK_IMAGENET | {"encoder": "resnet50"}),
        (
            ("dark_side", "table4", "confidnet", "cifar10/vgg16"),
            STEP | {"encoder": "vgg16_bn_cifar", "lr": 1e-3, "milestones": None, "factor": None, "epochs": 250},
        ),
        (
            ("refcal", "headline", "refcal", "cifar100_lt/resnet50"),
            STEP
            | {"encoder": "resnet50_cifar", "lr": 0.5, "decay": 1e-4, "milestones": None, "factor": None}
            | {"epochs": 1000, "batch": 1024, "seed": 1234},
        ),
        (
            ("neural_clamping", "table1", "ts", "bloodmnist/resnet50"),
            STEP
            | {"encoder": "resnet50_cifar", "optimizer": "Adam", "lr": 1e-3, "decay": 0.0, "milestones": [50, 75]}
            | {"factor": 0.1, "epochs": 100},
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_cells_compose_to_the_settings_of_the_papers(calib, where, expected):
    assert _short(composed(calib, cell(INDEX, *where).commands[0])) == expected


def test_parameters_of_methods_are_those_of_the_papers(calib):
    def model(*where):
        return composed(calib, cell(INDEX, *where).commands[0])["model"]["init_args"]

    assert model("dark_side", "table2", "ls", "cifar10/vgg16")["smoothing"] == 0.05
    assert model("dark_side", "table1", "ls", "imagenet/resnet50")["smoothing"] == 0.1
    assert model("dark_side", "table2", "mx", "cifar10/vgg16")["alpha"] == 0.2
    assert model("dark_side", "table2", "fl", "cifar10/vgg16")["gamma"] == 3
    assert model("mac_cal", "table1", "mbls", "cifar10/resnet50")["margin"] == 6
    assert model("mac_cal", "table1", "mbls", "tiny_imagenet/resnet50")["margin"] == 10
    assert model("dark_side", "table1", "erl", "imagenet_v2/resnet50")["strength"] == 0.1
    temperatures = [
        options_of(cell(INDEX, "dark_side", *where).commands[1])["--calibrators"]
        for where in (("table1", "ts", "imagenet/resnet50"), ("table2", "ts", "cifar10/vgg16"))
    ]
    assert temperatures == [["FixedTemperature(1.1)"], ["FixedTemperature(1.5)"]]


def test_the_clip_of_the_literal_recipe(calib):
    found = composed(calib, FLSD)
    assert found["trainer"]["callbacks"][0]["init_args"] == {"max_norm": 2 / 128}
    assert found["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 5e-4 / 128
    split = found["data"]["init_args"]["split"]
    assert (split["val"], split["share"], split["choose"], split["seed"]) == (5000, True, "shuffled", 1)


@pytest.mark.parametrize("row", ["tst", "vtst"])
def test_heads_of_tst_are_trained_as_in_mac_cal(calib, row):
    found = composed(calib, cell(INDEX, "mac_cal", "table1", row, "cifar100/wrn26_10").commands[0])
    switch = found["model"]["init_args"]["switch"]["init_args"]
    assert switch["at_epoch"] == -40
    training = switch["training"]["init_args"]
    assert training["optimizer"]["class_path"] == "torch.optim.SGD"
    assert training["optimizer"]["init_args"]["lr"] == 0.1
    assert training["optimizer"]["init_args"]["momentum"] == 0.9
    assert training["optimizer"]["init_args"]["weight_decay"] == 5e-4
    assert (training["batch_size"], training["scheduler"]) == (128, None)
    assert _short(found) == MUKHOTI | {"encoder": "wrn26_10"}


@pytest.mark.parametrize(
    ("row", "head", "gradient", "scaling", "eta"),
    [
        ("masked_retraining", "MaskedLinearHead", "straight_through", "none", [0, 0]),
        ("gradient_restriction", "MaskedLinearHead", "restricted", "none", [0, 0]),
        ("classifier_restructure", "MaskedBottleneck", "restricted", "none", [0, 0]),
        ("static_sparsity", "MaskedBottleneck", "restricted", "none", [0.1, 0.1]),
        ("decaying_sparsity", "MaskedBottleneck", "restricted", "none", [0.1, 0.001]),
    ],
)
def test_the_ablation_of_mac_cal_adds_one_part_after_the_other(calib, row, head, gradient, scaling, eta):
    found = composed(calib, cell(INDEX, "mac_cal", "table5", row, "cifar10/densenet121").commands[0])
    clip, masked = found["trainer"]["callbacks"]
    assert clip["init_args"] == {"max_norm": 2 / 128}
    classifier = masked["init_args"]["classifier"]
    assert classifier["class_path"].rpartition(".")[2] == head
    assert (classifier["init_args"]["gradient"], classifier["init_args"]["scaling"]) == (gradient, scaling)
    assert masked["init_args"]["sparsity"]["eta"] == eta
    assert (masked["init_args"]["sparsity"]["q_is"], masked["init_args"]["sparsity"]["start"]) == ("keep", 0.5)


def test_another_seed_counts_after_that_of_the_paper(calib):
    for where in (
        ("mac_cal", "table1", "flsd", "cifar100/resnet110"),
        ("refcal", "headline", "crl", "cifar100_lt/resnet50"),
    ):
        assert composed(calib, cell(INDEX, *where, 5).commands[0])["seed_everything"] == 5


def test_null_reaches_a_stage_and_our_criterion_is_meant(calib):
    plain = composed(calib, "calib fit -c recipe/mukhoti --data cifar10_mac_cal --model mac_cal")
    stage = plain["model"]["init_args"]["switch"]["init_args"]["training"]["init_args"]
    assert stage["scheduler"]["class_path"].endswith(".CosineToEnd")
    options = (
        "--model.scheduler=null --model.switch.training.scheduler=null "
        "--model.switch.training.criterion=CrossEntropyLoss"
    )
    found = composed(calib, f"calib fit -c recipe/mukhoti --data cifar10_mac_cal --model mac_cal {options}")
    stage = found["model"]["init_args"]["switch"]["init_args"]["training"]["init_args"]
    assert stage["scheduler"] is None
    assert found["model"]["init_args"]["scheduler"] is None
    assert stage["criterion"]["class_path"].startswith("calib_lightning.methods.")


def test_a_criterion_in_a_file_is_ours(calib, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model: {class_path: MDCA, init_args: {criterion: CrossEntropyLoss}}\ndata: ToyDataModule\n"
    )
    found = composed(calib, "calib fit -c mine.yaml")
    assert found["model"]["init_args"]["criterion"]["class_path"].startswith("calib_lightning.methods.")
