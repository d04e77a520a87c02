"""Outputs of real networks against figures that were computed from them in float64 numpy by others' code."""

import json

import numpy as np
import pytest
import torch

from calib_lightning.metrics import EvaluationState, functional

SETS = [
    "cifar10_human_experiments/resnet_basic_110_test.npz",
    "cifar10_human_experiments/wrn_28_10_test.npz",
    "expected_cost/adrenalmnist_resnet50",
    "expected_cost/cifar100_resnet-20",
    "expected_cost/cifar10_resnet-20",
    "expected_cost/cifar10_vgg19_bn",
    "expected_cost/pneumoniamnist_resnet50",
    "netcal/lenet-5-cifar-10.npz",
    "netcal/wideresnet-16-4-cifar-10.npz",
    "psr-calibration/resnet-50_cifar10/tst",
    "psr-calibration/resnet-50_cifar10/val",
]


def load(folder, name):
    path = folder / "logits" / name
    if name.startswith("netcal"):
        stored = np.load(path)
        logits, labels = np.log(np.maximum(stored["predictions"].astype(np.float64), 1e-45)), stored["ground_truth"]
    elif path.suffix == ".npz":
        stored = np.load(path)
        logits, labels = stored["logits"], stored["labels"]
    else:
        scores = "scores.npy" if name.startswith("expected_cost") else "predictions.npy"
        logits, labels = np.load(path / scores), np.load(path / "targets.npy")
    return torch.from_numpy(logits), torch.from_numpy(labels.reshape(-1).astype(np.int64))


@pytest.mark.parametrize("dtype", ["float64", "as stored"])
@pytest.mark.parametrize("name", SETS)
def test_reference_figures(real_data, name, dtype):
    expected = json.loads((real_data / "logits" / "reference_metrics.json").read_text())[name]
    logits, labels = load(real_data, name)
    if dtype == "float64":
        logits = logits.double()
    assert logits.shape == (expected["n"], expected["K"])
    state = EvaluationState()
    for start in range(0, len(labels), 512):
        state.update(logits[start : start + 512], labels[start : start + 512])
    values = {key: value.item() for key, value in state.compute().items()}
    ours = {
        "acc": values["accuracy"],
        "nll": values["nll"],
        "brier": values["brier"],
        "auroc": values["correctness_auroc"],
        "ece15": values["ece"],
        "ece10": functional.ece(logits, labels, n_bins=10).item(),
        "ece20": functional.ece(logits, labels, n_bins=20).item(),
    }
    assert ours == pytest.approx({key: expected[key] for key in ours}, abs=1e-6)
