"""Bad input gets a message that names it and a non-zero exit; nothing is overwritten."""

import pickle
import zipfile

import pytest
import torch
from lightning.pytorch import Trainer

from calib_lightning.core import load_checkpoint, load_module, load_stages
from calib_lightning.data import ToyDataModule
from calib_lightning.methods import CrossEntropy

from .conftest import QUICK, TOY

NET = ("--model=CrossEntropy", "--model.encoder=digits_cnn", "--trainer.accelerator=cpu", "--trainer.max_epochs=1")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("fit", "-c", "quikstart"), ["quikstart", "Did you mean quickstart"]),
        ((*QUICK, "--model=Focl"), ["Focl", "Focal"]),
        ((*QUICK, "--model=focl"), ["focl", "Did you mean focal"]),
        ((*QUICK, "--data=DigitDataModule"), ["DigitDataModule", "DigitsDataModule"]),
        ((*QUICK, "--model=focal", "--model.gama=2"), ["gama", "gamma"]),
        ((*QUICK, "--trainer.max_epoch=2"), ["max_epoch", "max_epochs"]),
        ((*QUICK, "--trainer.max_epochs=many"), ["max_epochs", "many"]),
        ((*QUICK, "--trainer.profiler=none"), ["profiler", "simple"]),
        ((*QUICK, "--data.split.val=lots"), ["val", "lots"]),
        ((*QUICK, "--model.encoder=digit_cnn"), ["digit_cnn", "digits_cnn"]),
        ((*QUICK, "--model=focal", "--model.gamma=-1"), ["gamma", "-1", "at least 0"]),
        ((*QUICK, "--select_on=test/accuracy"), ["test/accuracy", "test set", "val/nll"]),
        ((*QUICK, "--select_on=val/acc"), ["val/acc", "val/accuracy"]),
        ((*QUICK, "--select_on=val/signed_gap"), ["val/signed_gap"]),
        ((*QUICK, "--data.split.val=0", "--select_on=val/nll"), ["validation split", "select_on"]),
        ((*QUICK, "--data.split.val=5000"), ["val=5000", "images"]),
        ((*QUICK, "--data.split.imbalance=2"), ["imbalance is 2", "(0, 1]"]),
        (
            (*QUICK, "--data", "cifar10", "--data.download=false"),
            ["cifar-10-batches-py", "c58f30108f718f92721af3b95e74349a"],
        ),
        ((*QUICK, "--ckpt_path=nowhere.ckpt"), ["nowhere.ckpt"]),
        (("test", "-c", "quickstart"), ["--ckpt_path"]),
        ((*QUICK, "--trainer.accelerator=tpu"), ["trainer.accelerator is 'tpu'", "not on this machine", "auto, "]),
        ((*QUICK, "--trainer.accelerator=abacus"), ["'abacus', which is not known", "cpu"]),
        ((*QUICK, "--trainer.devices=0"), ["trainer.devices is '0'", "above 0"]),
        ((*QUICK, "--trainer.devices=-3"), ["trainer.devices is '-3'", "above 0"]),
        ((*QUICK, "--trainer.devices=[]"), ["trainer.devices is []", "above 0"]),
        ((*QUICK, "--trainer.accumulate_grad_batches=0"), ["accumulate_grad_batches is 0", "at least 1"]),
        (("train",), ["train"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_message_names_what_is_wrong(calib, argv, words):
    done = calib(*argv)
    assert done.code not in (0, None)
    for word in words:
        assert word in done.err, done.err
    assert "Traceback (most recent call last)" not in done.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of three classes."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(CrossEntropy(3, encoder="digits_cnn"), datamodule=ToyDataModule())
    trainer.save_checkpoint(folder / "three.ckpt")
    return folder / "three.ckpt"


def test_checkpoint_of_another_class_count(calib, trained):
    done = calib(*QUICK, "--ckpt_path", trained)
    assert done.code == 1
    assert "3 classes" in done.err
    assert "has 10" in done.err


def test_checkpoint_of_another_method_and_setting_is_said(calib, trained):
    done = calib("test", *TOY, *NET, "--model=Focal", "--ckpt_path", trained)
    assert done.code == 0, done.err
    assert "CrossEntropy" in done.err
    assert "Focal" in done.err


def test_truncated_checkpoint(calib, trained, tmp_path):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(trained.read_bytes()[:2000])
    done = calib("test", *TOY, *NET, "--ckpt_path", broken)
    assert done.code == 1
    assert "broken.ckpt" in done.err
    assert "damaged" in done.err
    with pytest.raises(RuntimeError, match=r"broken\.ckpt"):
        load_module(broken)


class _Gadget:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def _hostile(kind, mark, trained):
    import os
    import subprocess

    command = f"touch {mark}"
    if kind == "instantiator":
        checkpoint = torch.load(trained, weights_only=True)
        checkpoint["hyper_parameters"]["_instantiator"] = "os.system"
        checkpoint["hyper_parameters"]["num_classes"] = command
        return checkpoint
    if kind == "class_path":
        checkpoint = torch.load(trained, weights_only=True)
        checkpoint["calib_lightning"]["class_path"] = "os.system"
        return checkpoint
    if kind == "head":
        checkpoint = torch.load(trained, weights_only=True)
        checkpoint["calib_lightning"]["head"] = {"class_path": "os.system", "init_args": {"command": command}}
        return checkpoint
    function, argument = {
        "os.system": (os.system, command),
        "eval": (eval, f"__import__('os').system({command!r})"),
        "subprocess": (subprocess.call, ["touch", str(mark)]),
    }[kind]
    return {"state_dict": {}, "gadget": _Gadget(function, argument)}


@pytest.mark.parametrize("kind", ["os.system", "eval", "subprocess", "instantiator", "class_path", "head"])
def test_nothing_in_a_checkpoint_is_executed(calib, trained, tmp_path, kind):
    mark, path = tmp_path / "executed", tmp_path / "hostile.ckpt"
    torch.save(_hostile(kind, mark, trained), path)
    harmless = kind in (
        "instantiator",
        "class_path",
    )  # what is not looked at may stay: the configuration builds the module
    for command in ("fit", "test", "validate", "predict"):
        done = calib(command, *TOY, *NET, "--ckpt_path", path, "--trainer.max_epochs=2", "--trainer.max_steps=2")
        assert done.code == 0 if harmless else done.code == 1, done.err
        assert not mark.exists()
    with pytest.raises((pickle.UnpicklingError, ValueError, TypeError)):
        load_module(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1], 3, torch.zeros(2), {}], ids=["list", "int", "tensor", "empty"])
def test_a_file_that_is_no_checkpoint_is_named(calib, tmp_path, content):
    path = tmp_path / "odd.ckpt"
    torch.save(content, path)
    said = r"odd\.ckpt has no 'state_dict'" if content == {} else r"odd\.ckpt holds an? \w+, not the dict"
    for load in (load_module, load_checkpoint, lambda path: load_stages(torch.nn.Linear(2, 2), path)):
        with pytest.raises(RuntimeError, match=said):
            load(path)
    for command in ("fit", "test"):
        done = calib(command, *TOY, *NET, "--ckpt_path", path)
        assert done.code == 1
        assert "odd.ckpt" in done.err
        assert "damaged" not in done.err
    assert not (tmp_path / "runs").exists()


LIGHTNING = ("pytorch-lightning_version", "loops", "optimizer_states", "lr_schedulers", "callbacks", "epoch")


@pytest.mark.parametrize("part", [*LIGHTNING, "fit_loop", "state_dict", "hyper_parameters", "calib_lightning"])
@pytest.mark.parametrize("how", ["missing", "wrong"])
def test_a_part_that_a_checkpoint_lacks_is_named_with_what_to_do(calib, trained, tmp_path, part, how):
    checkpoint, path = torch.load(trained, weights_only=True), tmp_path / "part.ckpt"
    held = checkpoint["loops"] if part == "fit_loop" else checkpoint
    del held[part]
    if how == "wrong":
        held[part] = torch.zeros(2)
    torch.save(checkpoint, path)
    if part in ("state_dict", "hyper_parameters", "calib_lightning"):
        with pytest.raises(
            (RuntimeError, ValueError), match=rf"part\.ckpt (has (no|a Tensor as) '{part}'|does not name)"
        ):
            load_module(path)
    else:
        load_module(path)  # the weights are all there
    if part != "hyper_parameters":  # the configuration has them
        done = calib("fit", *TOY, *NET, "--trainer.max_epochs=2", "--ckpt_path", path)
        assert done.code == 1, done.err
        assert "part.ckpt" in done.err
        assert ("does not name" if part == "calib_lightning" else f"'{part}'") in done.err
        assert not (tmp_path / "runs").exists()


def test_a_fit_in_python_names_what_a_checkpoint_lacks(trained, tmp_path):
    checkpoint, path = torch.load(trained, weights_only=True), tmp_path / "weights.ckpt"
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, path)
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match=r"weights\.ckpt has no 'optimizer_states'.*save_weights_only.*load_module"):
        trainer.fit(CrossEntropy(3, encoder="digits_cnn"), datamodule=ToyDataModule(), ckpt_path=path)


def test_a_run_that_is_finished_says_so_and_stays_as_it_is(calib, tmp_path):
    assert calib(*QUICK, "--trainer.max_epochs=2").code == 0
    run = tmp_path / "runs" / "quickstart"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for asked, more in (("2", "4"), ("1", "3")):
        done = calib(
            "fit",
            "-c",
            run / "config.yaml",
            "--ckpt_path",
            run / "checkpoints/last.ckpt",
            "--trainer.max_epochs",
            asked,
        )
        assert done.code == 1
        for words in (f"2 epochs, and trainer.max_epochs is {asked}:", f"--trainer.max_epochs={more}", "calib test -c"):
            assert words in done.err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in run.parent.iterdir()] == ["quickstart"]


def test_a_run_with_stages_that_is_finished_says_so(calib, tmp_path):
    staged = (
        "--model=TwoStage",
        "--model.encoder=digits_cnn",
        "--model.switch=StageSwitch",
        "--model.switch.at_epoch=-2",
    )
    same = ("fit", *TOY, *staged, "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--run_dir=runs/staged")
    assert calib(*same).code == 0
    last = tmp_path / "runs" / "staged" / "checkpoints" / "last.ckpt"
    done = calib(*same, "--ckpt_path", last)
    assert done.code == 1
    assert "3 epochs, and trainer.max_epochs is 1 beside 2 of later stages" in done.err
    assert "--trainer.max_epochs=2" in done.err


def test_a_checkpoint_with_a_foreign_zip_entry_is_no_checkpoint(tmp_path):
    path = tmp_path / "odd.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match=r"odd\.ckpt"):
        load_checkpoint(path)


def test_wrong_command_line_leaves_no_folder(calib, tmp_path):
    assert calib(*QUICK, "--model=Focl").code == 2
    assert calib(*QUICK, "--select_on=test/nll").code == 1
    assert not (tmp_path / "runs").exists()


def test_help_of_a_class_and_print_config(calib):
    assert "gamma" in calib("fit", "--model.help=Focal").out
    printed = calib(*QUICK, "--print_config")
    assert printed.code == 0
    assert "digits_cnn" in printed.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model=focal", "--model.gamma=-1"), "calib: error: gamma is -1.0; it must be at least 0 and finite"),
        (("--model=cpc", "--data.num_classes=2"), "calib: error: num_classes is 2; it must be at least 3"),
        (("--model=mit_a", "--model.encoder=vit_tiny_patch16_224"), "calib: error: The timm model"),
    ],
)
def test_a_method_that_cannot_be_built_says_why_and_leaves_no_folder(calib, tmp_path, options, said):
    done = calib("fit", *TOY, *options, "--run_dir=runs/x")
    assert done.code == 1
    assert said in done.err
    assert "Namespace" not in done.err
    assert "Union" not in done.err
    assert not (tmp_path / "runs" / "x").exists()


def test_a_refused_batch_transform_is_explained_without_pages_of_options(calib):
    for method, reason in (
        ("crl", "individual training samples"),
        ("balcal", "not a criterion"),
        ("mixup", "cannot be set"),
    ):
        done = calib("fit", *TOY, f"--model={method}", "--model.batch_transform=RegMixupTransform")
        assert done.code == 1
        assert reason in done.err
    done = calib("fit", *TOY, "--model=crl", "--model.strenght=1")
    assert done.code == 2
    assert "did you mean strength" in done.err
    assert "[--trainer." not in done.err


@pytest.mark.parametrize("how", ["another method", "a switch"])
def test_a_finished_run_may_go_on_with_a_stage_that_it_did_not_have(calib, trained, how):
    one = ("--data=ToyDataModule", "--data.split.val=30", "--data.split.calibration=30", "--model.encoder=digits_cnn")
    same = (
        "fit",
        *one,
        "--quiet=true",
        "--trainer.accelerator=cpu",
        "--test_after_fit=false",
        "--trainer.max_epochs=1",
    )
    switch = ("--trainer.callbacks=StageSwitch", "--trainer.callbacks.at_epoch=-1")
    stages = ("--model=TwoStage", "--model.switch=StageSwitch", "--model.switch.at_epoch=-1")
    asked = ("--model=CrossEntropy", *switch) if how == "a switch" else stages
    done = calib(*same, *asked, "--ckpt_path", trained)
    assert done.code == 0, done.err
