"""What a configuration or a checkpoint names is called only if it is of the kind that the place is for."""

import sys

import pytest
import torch
import yaml

from calib_lightning.__main__ import main
from calib_lightning.core import ClassificationModule, load_module
from calib_lightning.utils.registry import find_class
from tests.ddp.cases import sgd, trainer

CALLED = "called"
OWN = """
from pathlib import Path
import torch

def touch(*args, **kwargs):
    Path("called").touch()

class Touch:
    def __init__(self, *args, **kwargs):
        touch()

def made(params) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_parts.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own_parts", None)


def fit(folder, model, *more):
    (folder / "c.yaml").write_text(yaml.safe_dump({"model": model}))
    words = ["fit", "-c", "default", "-c", "c.yaml", "--data=digits", "--trainer.max_epochs=1", "--run_dir=run"]
    small = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--test_after_fit=false", "--quiet"]
    try:
        return main([*words, *small, "--trainer.accelerator=cpu", *more])
    except SystemExit as end:
        return end.code


def model_with(place, value):
    """A model with a value at ``a.b.c``."""
    inner = value
    for key in reversed(place.split(".")):
        inner = {key: inner}
    staged = place.startswith("switch")
    class_path = "calib_lightning.methods.TwoStage" if staged else "calib_lightning.core.ClassificationModule"
    return {"class_path": class_path, "init_args": {"encoder": "digits_cnn", **inner}}


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "os.system", "init_args": {"command": f"touch {CALLED}"}},
        {"class_path": "os.system", "dict_kwargs": {"command": f"touch {CALLED}"}},
        {"class_path": "own_parts.touch"},
        {"class_path": "own_parts.Touch"},
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", CALLED]}},
    ],
    ids=lambda spec: f"{spec['class_path']} {', '.join(spec)}",
)
@pytest.mark.parametrize("place", ["optimizer", "scheduler", "criterion", "batch_transform"])
def test_only_the_right_kind_is_called(place, spec, folder, capsys):
    assert fit(folder, model_with(place, spec)) == 2
    assert not (folder / CALLED).exists()
    assert not (folder / "run").exists()
    said = capsys.readouterr().err
    assert spec["class_path"] in said
    assert "subclass of" in said


@pytest.mark.parametrize("place", ["optimizer", "scheduler"])
def test_a_stage_calls_no_other_function_either(place, folder, capsys):
    spec = {"class_path": "os.system", "init_args": {"command": f"touch {CALLED}"}}
    switch = {"class_path": "calib_lightning.core.StageSwitch", "init_args": {"at_epoch": 1}}
    switch["init_args"]["training"] = {
        "class_path": "calib_lightning.core.StageTraining",
        "init_args": {"epochs": 1, place: spec},
    }
    assert fit(folder, model_with("switch", switch)) == 2
    assert not (folder / CALLED).exists()
    assert "os.system" in capsys.readouterr().err


def test_how_a_function_of_ones_own_is_given_is_said(folder, capsys):
    assert fit(folder, model_with("optimizer", {"class_path": "own_parts.made"})) == 2
    remedy = "Of a function give the bare name without class_path and init_args, and annotate it with '-> Optimizer'."
    assert remedy in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["own_parts.made", {"class_path": "Adam", "init_args": {"lr": 0.01}}])
def test_ones_own_optimisers_are_taken(optimizer, folder):
    assert fit(folder, model_with("optimizer", optimizer)) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_path": "os.system"}, "does not exist in calib_lightning or an imported module"),
        ({"class_path": "subprocess.Popen"}, "not a ClassificationModule"),
        ({"class_path": "own_parts.Touch"}, "does not exist in calib_lightning or an imported module"),
        ({"encoder": "hf-hub:somebody/model"}, "does not exist"),
        ({"encoder": {"name": "resnet18", "checkpoint_path": "x.pth"}}, "no option 'checkpoint_path'"),
        ({"criterion": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", CALLED]}}}, "not a"),
    ],
)
def test_a_checkpoint_imports_and_calls_nothing_of_others(change, message, folder):
    run = trainer(folder)
    run.strategy.connect(ClassificationModule(3, encoder="digits_cnn", optimizer=sgd))
    run.save_checkpoint(folder / "a.ckpt")
    checkpoint = torch.load(folder / "a.ckpt", weights_only=True)
    checkpoint["calib_lightning"].update({key: value for key, value in change.items() if key == "class_path"})
    checkpoint["hyper_parameters"].update({key: value for key, value in change.items() if key != "class_path"})
    torch.save(checkpoint, folder / "b.ckpt")
    with pytest.raises((ValueError, TypeError), match=message):
        load_module(folder / "b.ckpt")
    assert not (folder / CALLED).exists()
    assert "own_parts" not in sys.modules


def test_a_name_leads_through_classes_only():
    for path in ("calib_lightning.utils.registry.sys.modules", "calib_lightning.utils.files.os.system"):
        with pytest.raises(ValueError, match="does not exist"):
            find_class(path, object)
