"""Options of a run: batch size, folder, images that an encoder cannot take, a network that is not trained, names."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from calib_lightning.core import StageTraining, load_module
from calib_lightning.methods import CrossEntropyLoss
from calib_lightning.utils.registry import find_class

from .conftest import TOY

NET = ("--model=CrossEntropy", "--trainer.accelerator=cpu", "--test_after_fit=false")
SMALL = (*NET, "--model.encoder=digits_cnn")
ROWS = 240  # training images of TOY


@pytest.fixture
def recipe(tmp_path):
    """A recipe with batches of its own."""
    (tmp_path / "mine.yaml").write_text("batch_size: 24\ntrainer:\n  max_epochs: 1\n")
    return "-c", tmp_path / "mine.yaml"


def steps(run):
    return json.loads((run / "run.json").read_text())["stages"][0]["steps"]


# --- batch size ------------------------------------------------------------------------------------------------------


def test_the_batch_size_of_a_recipe_reaches_data_that_are_named_after_it(calib, recipe, only_run):
    done = calib("fit", *recipe, *TOY, *SMALL)
    assert done.code == 0, done.err
    assert steps(only_run()) == ROWS / 24
    saved = yaml.safe_load((only_run() / "config.yaml").read_text())
    assert saved["data"]["init_args"]["batch_size"] == saved["batch_size"] == 24


@pytest.mark.parametrize(
    "own", [("--data.batch_size=16",), ("--data.batch_size", "16"), ("--data.init_args.batch_size=16",)]
)
def test_that_of_the_data_on_the_command_line_wins(calib, recipe, only_run, own):
    done = calib("fit", *recipe, *TOY, *own, *SMALL)
    assert done.code == 0, done.err
    assert steps(only_run()) == ROWS / 16


def test_one_on_the_command_line_wins_over_the_recipe_and_one_in_a_file_of_data(calib, recipe, only_run, tmp_path):
    (tmp_path / "own.yaml").write_text("class_path: ToyDataModule\ninit_args:\n  batch_size: 16\n")
    held_out = ("--data.split.val=30", "--data.split.calibration=30", "--quiet=true")
    done = calib("fit", *recipe, "--data=own.yaml", *held_out, "--batch_size=40", *SMALL)
    assert done.code == 0, done.err
    assert steps(only_run()) == ROWS / 40


@pytest.fixture
def without_batch_size(tmp_path):
    """Data without that option, in a module that no other test has imported."""
    (tmp_path / "data_of_fixed_batches.py").write_text(
        "from calib_lightning.data import SplitSpec, ToyDataModule\n\n\n"
        "class FixedDataModule(ToyDataModule):\n"
        "    def __init__(self) -> None:\n"
        "        super().__init__(SplitSpec(val=30, calibration=30), 60)\n"
    )
    before = [*sys.path]
    yield "--data=data_of_fixed_batches.FixedDataModule"
    sys.path[:] = before
    sys.modules.pop("data_of_fixed_batches", None)


def test_data_without_a_batch_size_keep_theirs_and_say_so(calib, recipe, only_run, without_batch_size):
    done = calib("fit", *recipe, without_batch_size, "--quiet=true", *SMALL)
    assert done.code == 0, done.err
    assert "asks for batches of 24, but FixedDataModule has no batch_size" in done.err
    assert steps(only_run()) == ROWS / 60


def test_no_rows_are_no_batch(calib, tmp_path):
    done = calib("fit", *TOY, *SMALL, "--batch_size=0", "--trainer.max_epochs=1")
    assert done.code == 1
    assert "batch_size is 0; it must be at least 1" in done.err
    assert not (tmp_path / "runs").exists()


# --- where an evaluation goes ----------------------------------------------------------------------------------------


def test_an_evaluation_goes_where_it_is_told_or_into_the_run(calib, tmp_path):
    run = tmp_path / "runs" / "mine"
    done = calib("fit", *TOY, *SMALL, "--trainer.max_epochs=1", "--run_dir=runs/mine")
    assert done.code == 0, done.err
    assert yaml.safe_load((run / "config.yaml").read_text())["run_dir"] == "runs/mine"
    for options, folder in (
        ((), run / "test"),
        (("--run_dir=elsewhere/x",), tmp_path / "elsewhere" / "x"),
        (("--run_dir", "elsewhere/x"), tmp_path / "elsewhere" / "x-2"),
    ):
        before = {path for path in tmp_path.rglob("*") if path.is_file()}
        done = calib("test", "-c", run / "config.yaml", *options)
        assert done.code == 0, done.err
        made = {path for path in tmp_path.rglob("*") if path.is_file()} - before
        assert {folder / "run.json", folder / "predictions" / "test.npz"} <= made
        assert all(path.is_relative_to(folder) for path in made), made


# --- images that an encoder cannot take ------------------------------------------------------------------------------


def grey(name, **options):
    return "--model.encoder=" + json.dumps({"name": name, "in_channels": 1, **options})


def test_images_that_are_too_small_end_the_run_before_it_begins(calib, tmp_path):
    done = calib("fit", *TOY, *NET, grey("vgg16_bn_cifar"), "--run_dir=runs/small", "--trainer.max_epochs=1")
    assert done.code == 1
    assert "The encoder 'vgg16_bn_cifar' cannot process images of 8 x 8 pixels" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "runs" / "small").exists()


def test_a_network_for_large_images_is_warned_of_and_ours_is_named(calib):
    done = calib("fit", *TOY, *NET, grey("resnet18"), "--trainer.max_epochs=0")
    assert done.code == 0, done.err
    assert done.err.count("The images have 8 pixels, but timm's resnet18 is designed for 224") == 1
    assert "--model.encoder=resnet18_cifar" in done.err
    assert "is designed for" not in calib("fit", *TOY, *SMALL, "--trainer.max_epochs=0").err


# --- a network that is not trained -----------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch):
    """Weights of the pretrained models that were asked for, which are made without a download."""
    import timm

    asked, create = [], timm.create_model

    def pretend(*args, pretrained=False, **options):
        model = create(*args, **options)
        if pretrained:
            asked.append({name: value.clone() for name, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(timm, "create_model", pretend)
    return asked


def test_a_pretrained_network_is_kept_tested_and_calibrated_without_training(calib, tmp_path, downloads):
    encoder = grey("test_resnet", pretrained=True)
    options = ("--trainer.accelerator=cpu", "--trainer.max_epochs=0", "--run_dir=runs/made")
    done = calib("fit", *TOY, "--model=CrossEntropy", encoder, *options)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "made"
    assert (run / "config.yaml").is_file()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    record = json.loads((run / "run.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["finished", "finished"]
    assert record["stages"][0]["steps"] == 0
    assert record["checkpoint"] == {"select_on": "last", "path": "checkpoints/last.ckpt"}
    assert (record["results"]["test/n"], record["results"]["calibration/n"]) == (150, 30)

    built = next(weights for weights in downloads if "fc.weight" not in weights)
    downloads.clear()
    module = load_module(run / "checkpoints" / "last.ckpt")
    found = module.encoder.network.state_dict()
    assert found.keys() == built.keys()
    for name, value in built.items():
        assert torch.equal(found[name], value), name
    with np.load(run / "predictions" / "test.npz") as saved:
        assert saved["logits"].shape == (150, 3)
        right = (saved["logits"].argmax(axis=1) == saved["labels"]).mean()
    assert record["results"]["test/accuracy"] == pytest.approx(right, abs=1e-6)

    done = calib("test", "-c", run / "config.yaml")
    assert done.code == 0, done.err
    assert json.loads((run / "test" / "run.json").read_text())["results"] == record["results"]
    done = calib("calibrate", run, "--calibrators", "Temperature", "--no-intervals")
    assert done.code == 0, done.err
    assert "Temperature" in done.out
    assert downloads == []


# --- names -----------------------------------------------------------------------------------------------------------


def test_our_names_win_over_those_of_torch(calib):
    assert find_class("CrossEntropyLoss", nn.Module) is CrossEntropyLoss
    assert find_class("torch.nn.CrossEntropyLoss", nn.Module) is nn.CrossEntropyLoss
    stage = "--model.switch.training.criterion"
    for name, expected in (
        ("CrossEntropyLoss", "calib_lightning.methods.CrossEntropyLoss"),
        ("torch.nn.CrossEntropyLoss", "torch.nn.CrossEntropyLoss"),
        ("SmoothL1Loss", "torch.nn.SmoothL1Loss"),
    ):
        done = calib("fit", *TOY, "--model=two_stage", f"{stage}={name}", "--print_config")
        assert done.code == 0, done.err
        training = yaml.safe_load(done.out)["model"]["init_args"]["switch"]["init_args"]["training"]
        assert training["class_path"].rpartition(".")[2] == StageTraining.__name__
        assert training["init_args"]["criterion"]["class_path"] == expected


def test_a_stage_is_trained_with_our_criterion_of_that_name(calib, only_run, monkeypatch):
    calls, forward = [], CrossEntropyLoss.forward
    monkeypatch.setattr(
        CrossEntropyLoss, "forward", lambda self, *args: calls.append(len(args[0])) or forward(self, *args)
    )
    two = ("--model=two_stage", "--model.encoder=digits_cnn", "--model.switch.at_epoch=1", "--data.batch_size=60")
    criterion = "--model.switch.training.criterion=CrossEntropyLoss"
    done = calib("fit", *TOY, *two, criterion, *NET[1:], "--trainer.max_epochs=2")
    assert done.code == 0, done.err
    assert steps(only_run()) == 2 * ROWS / 60
    assert calls == [60] * (2 * ROWS // 60)  # torch's in the second stage would leave half of them
