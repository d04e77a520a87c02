"""Methods with stages: what Python builds by default is what the configuration says, or the docstring names more."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from calib_lightning import methods
from calib_lightning.core import ClassificationModule, CosineToEnd

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "method"
# what Python leaves to the base, or to a fit that knows the data, as the docstring says
ELSEWHERE = {"refcal": {"optimizer", "schedule"}, "mac_cal": {"switch.views", "switch.batch_size"}}
RECIPES = {"refcal": "recipe/refcal", "balcal": "recipe/tst", "tst": "recipe/tst", "v_tst": "recipe/tst"}


def _configured(file):
    config = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())
    config["init_args"] |= {"num_classes": 3, "encoder": "digits_cnn"}
    parser = ArgumentParser()
    parser.add_subclass_arguments(ClassificationModule, "model")
    return parser.instantiate(parser.parse_object({"model": config})).model


def _plain(value):
    """An object without state as its class and attributes."""
    public = {name: each for name, each in vars(value).items() if not name.startswith("_")}
    return type(value).__name__, {name: repr(each) for name, each in public.items()}


def _training(optimizer, scheduler):
    built = optimizer([torch.nn.Parameter(torch.zeros(1))])
    schedule = scheduler and scheduler(built)
    if isinstance(schedule, CosineToEnd):
        schedule.set_epochs(100)
    rates = []
    for _ in range(100 if schedule else 0):
        rates.append(round(schedule.get_last_lr()[0], 9))
        built.step()
        schedule.step()
    return {"optimizer": (type(built).__name__, built.defaults), "schedule": (type(schedule).__name__, rates)}


def _settings(module):
    found = _training(module.optimizer, module.scheduler)
    plain = {name: value for name, value in module.hparams.items() if isinstance(value, int | float | str)}
    found |= {f"model.{name}": value for name, value in plain.items()}
    found |= {
        f"model.{name}": _plain(getattr(module, name)) for name in ("views", "refinement_loss") if name in vars(module)
    }
    switch = getattr(module, "switch", None)
    if switch is not None:
        training = switch.training
        head = switch.new_head(module, module.head)
        found |= {f"switch.{name}": value for name, value in _training(training.optimizer, training.scheduler).items()}
        found |= {
            "switch.at_epoch": switch.at_epoch,
            "switch.head": (head.spec, str(head)),
            "switch.criterion": training.criterion and (str(training.criterion), training.criterion.spec),
            "switch.views": training.views and _plain(training.views),
            "switch.batch_size": training.batch_size,
            "switch.frozen_bn": training.frozen_bn,
        }
    return found


@pytest.mark.parametrize("file", ["balcal", "confidnet", "mac_cal", "refcal", "tst", "two_stage", "v_tst"])
def test_python_defaults_are_those_of_the_configuration(file):
    configured = _configured(file)
    ours = _settings(type(configured)(3, encoder="digits_cnn"))
    theirs = _settings(configured)
    assert ours.keys() == theirs.keys()
    assert {name for name, value in theirs.items() if value != ours[name]} == ELSEWHERE.get(file, set())


@pytest.mark.parametrize(("file", "recipe"), RECIPES.items())
def test_docstring_names_the_recipe_of_the_first_stage(file, recipe):
    assert (CONFIGS.parent / f"{recipe}.yaml").is_file()
    method = {"refcal": methods.RefCal, "balcal": methods.BalCAL, "tst": methods.TST, "v_tst": methods.VTST}[file]
    assert f"``{recipe}``" in method.__doc__
