"""Classes that live in a part are found where checkpoints and runs of before name them: in the file of their method."""

import pytest
import torch
from torch import nn

from calib_lightning import methods
from calib_lightning.core import ClassificationModule, Head, StageSwitch
from calib_lightning.core.module_record import module_record
from calib_lightning.utils.described import build
from calib_lightning.utils.registry import class_path_of, find_class

MOVED = {
    "balcal": ["ETFBranch"],
    "confidnet": ["ConfidenceHead"],
    "mac_cal": ["AdaptiveSparsity", "MaskedBottleneck", "MaskedHead", "MaskedLinearHead"],
    "refcal": ["ProjectionHead", "SimCLRLoss", "SupConLoss"],
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in MOVED.items() for name in names])
def test_moved_classes_are_found_under_their_method(file, name):
    assert find_class(f"calib_lightning.methods.{file}.{name}", object) is getattr(methods, name)


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("mac_cal.MaskedLinearHead", {"in_features": 6, "num_classes": 3, "gradient": "straight_through"}),
        ("mac_cal.MaskedBottleneck", {"in_features": 6, "num_classes": 3, "hidden": 4, "scaling": "none"}),
        ("confidnet.ConfidenceHead", {"in_features": 6, "num_classes": 3, "classifier": None, "width": 5}),
    ],
)
def test_heads_of_older_checkpoints_are_rebuilt(path, arguments):
    head = build({"class_path": f"calib_lightning.methods.{path}", "init_args": arguments}, Head)
    assert type(head) is getattr(methods, path.partition(".")[2])
    assert head(torch.zeros(2, 6)).shape == (2, 3)
    assert build(head.spec, Head).spec == head.spec  # under the path of today
    assert {name: head.spec["init_args"][name] for name in arguments} == arguments


def test_a_head_recorded_under_its_older_path_is_kept_as_the_stage_left_it():
    module = methods.ConfidNet(3, encoder="digits_cnn")
    module.head = methods.ConfidenceHead(module.encoder.num_features, 3)
    module.requires_grad_(False)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    recorded = module_record(checkpoint)["head"]
    recorded["class_path"] = "calib_lightning.methods.confidnet.ConfidenceHead"
    before = module.head
    module.on_load_checkpoint(checkpoint)
    assert module.head is before  # a new one would be trained as a whole
    recorded["init_args"]["width"] = 5
    module.on_load_checkpoint(checkpoint)
    assert module.head is not before


@pytest.mark.parametrize("name", ["MaskedClassifier", "ConfidenceSwitch", "ConfidenceTuning"])
def test_switches_keep_the_path_that_a_resumed_run_compares(name):
    file = {"MaskedClassifier": "mac_cal"}.get(name, "confidnet")
    assert issubclass(getattr(methods, name), StageSwitch)
    assert class_path_of(getattr(methods, name)) == f"calib_lightning.methods.{file}.{name}"


def test_parts_hold_no_method():
    for value in vars(methods).values():
        if isinstance(value, type) and issubclass(value, nn.Module) and ".parts." in value.__module__:
            assert not issubclass(value, ClassificationModule), value
