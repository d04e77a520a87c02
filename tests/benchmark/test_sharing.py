"""First stages that several runs have in common: trained once, with the results of runs that train them alone."""

import shlex

import numpy as np
import pytest
import torch
import yaml

from calib_lightning.benchmark.identity import content_of, first_stage

from ..conftest import REPOSITORY
from .grids import results_of, runs_of, stages_of, write_grid

STAGED = {
    "two_stage": {},
    "tst": {},
    "v_tst": {},
    "mac_cal": {},
    "confidnet": {},
    "tuned": {"model.tuning": {"class_path": "ConfidenceTuning", "init_args": {"at_epoch": -1}}},
}


def _staged(name):
    options = {"model.switch.at_epoch": -2, "model.switch.training.batch_size": 32, **STAGED[name]}
    return {"as": name, "method": "confidnet" if name == "tuned" else name, "options": options}


def _masked(method):
    options = {"trainer.callbacks.at_epoch": -2, "trainer.callbacks.training.batch_size": 32}
    return {"method": method, "callback": "mac_cal", "options": options}


PLAIN = sorted(
    path.stem
    for path in (REPOSITORY / "configs/method").glob("*.yaml")
    if "switch" not in yaml.safe_load(path.read_text()).get("init_args", {})
)


def _equal_to_runs_alone(out, calib):
    """Compare every run that has begun with another's checkpoint with the same command without it."""
    for name, entry in runs_of(out).items():
        if entry["first_stage"] is None:
            continue
        line = (out / "logs" / f"{name}.txt").read_text().splitlines()[0]
        words = shlex.split(line.removeprefix("$ calib "))
        own = [word for word in words if not word.startswith(("--ckpt_path=", "--run_dir="))]
        assert f"--ckpt_path=runs/grid/{entry['first_stage']}/checkpoints/last.ckpt" in words
        alone = out.parents[1] / "alone" / name
        done = calib(*own, f"--run_dir={alone}")
        assert done.code == 0, done.err
        done = calib("calibrate", alone, "--calibrators=Temperature", "--no_intervals")
        assert done.code == 0, done.err
        assert stages_of(alone) == stages_of(out / name) == ["fit", "test"]
        for path in sorted(alone.glob("checkpoints/[bl]*.ckpt")):
            one, two = (torch.load(p, weights_only=True) for p in (path, out / name / "checkpoints" / path.name))
            assert one["global_step"] == two["global_step"]
            assert one["state_dict"].keys() == two["state_dict"].keys()
            for key, value in one["state_dict"].items():
                assert torch.equal(value, two["state_dict"][key]), (name, path.name, key)
        one, two = results_of(out / name), results_of(alone)
        assert one.keys() == two.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, two[key], err_msg=f"{name} {key}")


@pytest.mark.parametrize(
    "names", [("mac_cal", "tuned"), pytest.param(("two_stage", "tst", "v_tst", "confidnet"), marks=pytest.mark.slow)]
)
def test_runs_that_share_their_first_stage_are_equal_to_those_that_do_not(run_grid, calib, tmp_path, names):
    methods = ["cross_entropy", *map(_staged, names), "focal", _masked("focal")]
    write_grid(tmp_path, method=methods, options={"trainer.max_epochs": 3, "model.scheduler": "CosineToEnd"})
    done = run_grid("grid.yaml")
    assert done.code == 0, done.err
    out = tmp_path / "runs/grid"
    shared = {entry["method"]: entry["first_stage"] for entry in runs_of(out).values()}
    of_ce, of_focal = (f"toy-digits_cnn-{name}-0" for name in ("cross_entropy", "focal"))
    assert shared == {"cross_entropy": None, "focal": None, "focal+mac_cal": of_focal} | dict.fromkeys(names, of_ce)
    _equal_to_runs_alone(out, calib)


@pytest.mark.slow
@pytest.mark.parametrize("method", PLAIN)
def test_every_method_is_a_first_stage(run_grid, calib, tmp_path, method):
    write_grid(tmp_path, method=[method, _masked(method)], options={"trainer.max_epochs": 3})
    done = run_grid("grid.yaml")
    assert done.code == 0, done.err
    assert f"toy-digits_cnn-{method}-0" in [run["first_stage"] for run in runs_of(tmp_path / "runs/grid").values()]
    _equal_to_runs_alone(tmp_path / "runs/grid", calib)


def _content(**changes):
    switch = {"class_path": "calib_lightning.core.StageSwitch", "init_args": {"at_epoch": -2, "init_from": None}}
    arguments = {"encoder": "digits_cnn", "optimizer": None, "scheduler": None, "batch_transform": None}
    content = {
        "seed_everything": 0,
        "trainer": {"max_epochs": 3, "max_steps": -1, "max_time": None, "callbacks": None},
        "model": {"class_path": "calib_lightning.methods.TwoStage", "init_args": {**arguments, "switch": switch}},
        "data": {"class_path": "calib_lightning.data.ToyDataModule", "init_args": {"batch_size": 32}},
        "select_on": None,
    }
    for path, value in changes.items():
        part = content
        *parents, name = path.split("__")
        for parent in parents:
            part = part[parent]
        part[name] = value
    return content_of(content)


def test_the_first_stage_of_a_staged_method_is_cross_entropy():
    plain = _content()
    plain["model"] = {"class_path": "calib_lightning.methods.CrossEntropy", "init_args": plain["model"]["init_args"]}
    del plain["model"]["init_args"]["switch"]
    staged = first_stage(_content())
    assert staged == (first_stage(plain)[0], True)
    assert first_stage(plain)[1] is False
    assert first_stage(_content(select_on="last")) == staged


@pytest.mark.parametrize(
    "changes",
    [
        {"seed_everything": 1},
        {"trainer__max_epochs": 4},
        {"data__init_args__batch_size": 16},
        {"model__init_args__scheduler": "CosineToEnd"},
        {"model__init_args__encoder": "resnet18_cifar"},
    ],
)
def test_another_first_stage(changes):
    assert first_stage(_content(**changes))[0] != first_stage(_content())[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"model__init_args__switch__init_args__at_epoch": 2},  # it would be shorter
        {"model__init_args__switch__init_args__init_from": "other.ckpt"},  # there is none
        {"model__class_path": "own.TwoStage"},  # who knows
        {"model__class_path": "calib_lightning.methods.RefCal"},
        {"trainer__callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]},
        {"trainer__max_steps": 100},
        {"trainer__max_time": "00:01:00:00"},
        {"trainer__max_epochs": -1},
        {"model__init_args__switch": None},
    ],
)
def test_a_first_stage_that_is_not_shared(changes):
    found = first_stage(_content(**changes))
    assert found is None or found[1] is False
