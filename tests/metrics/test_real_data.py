"""Outputs of real networks against figures that were computed from them in float64 numpy by others' code."""

import hashlib
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


FIGURES = {
    "acc": "accuracy",
    "nll": "nll",
    "brier": "brier",
    "auroc": "correctness_auroc",
    "ece15": "ece",
    "mce15": "mce",
    "aece15": "aece_split",
    "cwece15": "classwise_ece",
}
KEYS = tuple(FIGURES.values())


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


def ours(logits, labels, n):
    """Every figure of the reference, from the package alone."""
    state = EvaluationState(KEYS)
    for start in range(0, len(labels), 512):
        state.update(logits[start : start + 512], labels[start : start + 512])
    values = {name: state.compute()[key].item() for name, key in FIGURES.items()}
    values |= {f"ece{m}": functional.ece(logits, labels, n_bins=m).item() for m in (10, 20)}
    shares = torch.bincount(labels).double() / n
    prior_entropy = torch.special.entr(shares).sum().item()
    beta = functional.optimal_inverse_temperature(logits, labels).beta
    tempered = logits.double() * beta
    values |= {
        "nll_over_prior_entropy": values["nll"] / prior_entropy,
        "err_over_majority": (1 - values["acc"]) / (1 - shares.max().item()),
        "T_in_sample": 1 / beta,
        "ece15_T": functional.ece(tempered, labels).item(),
        "nll_T": functional.nll(tempered, labels).item(),
        "brier_T": functional.brier(tempered, labels).item(),
    }
    values["nllT_over_prior_entropy"] = values["nll_T"] / prior_entropy
    return values


@pytest.mark.parametrize("dtype", ["float64", "as stored"])
@pytest.mark.parametrize("name", SETS)
def test_every_reference_figure(real_data, name, dtype):
    expected = json.loads((real_data / "logits" / "reference_metrics.json").read_text())[name]
    logits, labels = load(real_data, name)
    assert hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16] == expected.pop("labels_sha256_int64")
    n = expected.pop("n")
    assert logits.shape == (n, expected.pop("K"))
    values = ours(logits.double() if dtype == "float64" else logits, labels, n)
    # The temperature is where the gradient is nearly flat, so it carries fewer digits than what it minimises.
    assert values.pop("T_in_sample") == pytest.approx(expected.pop("T_in_sample"), rel=1e-5)
    assert values == pytest.approx(expected, abs=1e-6)


def test_dark_side_assumption_of_a_real_network(real_data):
    logits, labels = (each.numpy() for each in load(real_data, "expected_cost/cifar100_resnet-20"))
    p = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, correct = p.max(1), p.argmax(1) == labels
    holds = []
    for m in range(100):
        inside = (confidence > m / 100) & (confidence <= (m + 1) / 100)
        if inside.any():
            holds.append(correct[inside].mean() <= confidence[inside].mean())
    share = functional.dark_side_assumption(torch.from_numpy(logits).double(), torch.from_numpy(labels)).item()
    print(share, len(holds))
    assert share == np.mean(holds)
