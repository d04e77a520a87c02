"""Every shipped configuration is complete and composes with the others."""

from pathlib import Path

import pytest
import torch
import yaml

from calib_lightning.utils.config_search import config_folders, find_config

from .conftest import TOY

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
KINDS = ("label_smoothing", "crl", "mixup", "mac_cal", "ada_focal")
"""One of each kind: a criterion, rows of an epoch, a batch transform, stages, a callback's state."""


def _files(*folders):
    return sorted(path for folder in folders for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_no_list_of_configs_and_no_anchor(path):
    text = path.read_text()
    content = yaml.safe_load(text)
    # a list under `config` is ignored in silence by the parser
    assert not isinstance(content.get("config"), list)
    assert "&" not in text
    assert text.startswith("#"), "a configuration begins with a comment that says what it is"


def test_every_axis_parses_with_every_other(calib):
    # every data with a recipe and a method, each in turn; tests of the papers' tables go over recipes and methods
    recipes = [path for path in _files("recipe") if path.stem != "refcal"]  # which leaves the optimiser to its method
    for number, data in enumerate(_files("data")):
        recipe, method = recipes[number % len(recipes)], METHODS[number % len(METHODS)]
        if method == "refcal":
            continue
        done = calib("fit", "-c", f"recipe/{recipe.stem}", "--data", data.stem, "--model", method, "--print_config")
        assert done.code == 0, done.err
        found, said = yaml.safe_load(done.out), yaml.safe_load(recipe.read_text())
        for name, value in said["model"]["init_args"]["optimizer"]["init_args"].items():
            assert found["model"]["init_args"]["optimizer"]["init_args"][name] == value, (recipe, method)
        assert found["batch_size"] == said["batch_size"]
        assert found["data"]["class_path"].rpartition(".")[2] == yaml.safe_load(data.read_text())["class_path"]


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in KINDS else pytest.mark.slow) for m in METHODS])
def test_every_method_is_stopped_resumed_and_tested(calib, tmp_path, method):
    # 160 training images in batches of 32: 5 steps an epoch, stopped in the middle of the second of three
    options = ("--model", method, "--model.encoder=digits_cnn", *TOY, "--data.train_size=220", "--trainer.max_epochs=3")
    options += ("--trainer.accelerator=cpu", "--trainer.devices=1", "--test_after_fit=false")
    arguments = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text()).get("init_args", {})
    if isinstance(arguments.get("switch"), dict):
        # the stop comes in the second stage
        options += ("--model.switch.at_epoch=1", "--model.switch.training.batch_size=32")
        options += ("--model.switch.training.optimizer.lr=0.01",)
    done = calib("fit", *options, "--run_dir=runs/whole")
    assert done.code == 0, done.err
    stop = ("--trainer.callbacks+=tests.cli.terminate.Terminate", "--trainer.callbacks.step=7")
    assert calib("fit", *options, *stop, "--run_dir=runs/part").code == 143
    part = tmp_path / "runs" / "part"
    last = part / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 7
    done = calib("fit", *options, "--run_dir=runs/part", "--ckpt_path", last)
    assert done.code == 0, done.err
    one = torch.load(tmp_path / "runs/whole/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    two = torch.load(last, weights_only=True)["state_dict"]
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    done = calib("test", "-c", part / "config.yaml")
    assert done.code == 0, done.err
    assert "test" in done.out


def test_names_are_found_in_working_directory_clone_and_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == CONFIGS / "quickstart.yaml"
    assert find_config("focal", "method") == CONFIGS / "method" / "focal.yaml"
    assert find_config("recipe/cifar350") == CONFIGS / "recipe" / "cifar350.yaml"
    assert find_config("nothing") is None
    own = tmp_path / "configs" / "quickstart.yaml"
    own.parent.mkdir()
    own.write_text("# mine\n")
    assert find_config("quickstart") == own
    assert config_folders()[0] == own.parent


def test_criteria_and_batch_transforms_compose(calib, tmp_path):
    quick = ("--model.encoder=digits_cnn", *TOY, "--trainer.accelerator=cpu", "--trainer.max_epochs=1")
    for name, options in {
        "focal-mixup": ("focal", "--model.batch_transform=MixupTransform", "--model.batch_transform.alpha=0.4"),
        "ls-mdca": ("mdca", "--model.criterion=LabelSmoothingLoss", "--model.criterion.smoothing=0.1"),
    }.items():
        done = calib("fit", "--model", *options, *quick, f"--run_dir=runs/{name}")
        assert done.code == 0, done.err
        done = calib("test", "-c", tmp_path / "runs" / name / "config.yaml")
        assert done.code == 0, done.err
    config = yaml.safe_load((tmp_path / "runs/focal-mixup/config.yaml").read_text())["model"]["init_args"]
    assert config["batch_transform"]["init_args"] == {"alpha": 0.4}
    config = yaml.safe_load((tmp_path / "runs/ls-mdca/config.yaml").read_text())["model"]["init_args"]
    assert config["criterion"]["init_args"] == {"smoothing": 0.1}
    done = calib("fit", "--model", "mixup", "--model.batch_transform=MITLTransform", *quick)
    assert done.code == 1
    assert "this method already has MixupTransform" in done.err


def _data(calib, *options):
    done = calib("fit", "-c", "quickstart", *options, "--print_config")
    assert done.code == 0, done.err
    return yaml.safe_load(done.out)["data"]["init_args"]


def test_naming_the_data_begins_it_anew(calib):
    # the quickstart has a long tail and batches of 32
    inherited = _data(calib)
    assert (inherited["split"]["imbalance"], inherited["batch_size"]) == (0.1, 32)
    for name in ("fashion_mnist", "digits", "FashionMNISTDataModule"):
        data = _data(calib, "--data", name)
        assert data["batch_size"] == 128
        assert data["split"] is None or data["split"]["imbalance"] == 1.0
    assert _data(calib, "--data=digits")["split"]["val"] == 100


def test_settings_of_the_data_count_before_and_after_its_name(calib):
    for options in (("--data.split.val=7", "--data", "digits"), ("--data=digits", "--data.split.val=7")):
        split = _data(calib, *options)["split"]
        assert (split["val"], split["calibration"], split["imbalance"]) == (7, 200, 1.0)
    assert _data(calib, "--data.split.val=7")["split"]["imbalance"] == 0.1
    # a configuration between them says nothing of what comes after it
    done = calib("fit", "--data.split.val", "7", "-c", "quickstart", "--data", "digits", "--print_config")
    data = yaml.safe_load(done.out)["data"]["init_args"]
    assert (data["split"]["val"], data["split"]["imbalance"], data["batch_size"]) == (7, 1.0, 128)
