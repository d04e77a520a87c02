"""Temperature scaling of real networks against published figures, and figures computed by others' code."""

import json

import pytest
import torch

from calib_lightning.metrics.functional import brier, ece, nll
from calib_lightning.posthoc.temperature import Temperature
from tests.metrics.test_real_data import SETS, load

# Ferrer and Ramos (2024), Table 2, after temperature scaling with 5-fold cross-validation: ECE in percent, and NLL over
# the entropy of the label frequencies. Which rows were in which fold was not published.
LARGE = {
    "cifar10_resnet-20": (0.9, 0.101),
    "cifar10_vgg19_bn": (2.1, 0.104),
    "cifar100_resnet-20": (1.7, 0.244),
}
SMALL = {"pneumoniamnist_resnet50": (2.2, 0.394), "adrenalmnist_resnet50": (3.9, 0.779)}


def cross_validated(logits, labels, seed, folds=5):
    """ECE in percent and NLL over the entropy of the labels, of rows each calibrated by a fit to the other folds."""
    n = len(labels)
    fold = torch.empty(n, dtype=torch.int64)
    fold[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] = torch.arange(n) % folds
    log_q = torch.empty(logits.shape, dtype=torch.float64)
    for held_out in range(folds):
        rows = fold == held_out
        log_q[rows] = Temperature().fit(logits[~rows], labels[~rows])(logits[rows].double())
    entropy = torch.special.entr(torch.bincount(labels) / n).sum()
    return 100.0 * ece(log_q, labels).item(), (nll(log_q, labels) / entropy).item()


@pytest.mark.parametrize("name", LARGE)
def test_published_figures_of_large_sets(real_data, name):
    logits, labels = load(real_data, f"expected_cost/{name}")
    for seed in range(2):
        error, loss = cross_validated(logits, labels, seed)
        assert error == pytest.approx(LARGE[name][0], abs=0.2)
        assert loss == pytest.approx(LARGE[name][1], abs=0.002)


@pytest.mark.parametrize("name", SMALL)
def test_published_figures_of_small_sets_lie_in_the_range_of_folds(real_data, name):
    logits, labels = load(real_data, f"expected_cost/{name}")
    errors, losses = zip(*(cross_validated(logits, labels, seed) for seed in range(20)), strict=True)
    assert min(errors) <= SMALL[name][0] <= max(errors)
    assert min(losses) <= SMALL[name][1] <= max(losses)
    assert max(errors) - min(errors) < 2.5  # a range of anything would show nothing
    assert max(losses) - min(losses) < 0.05


@pytest.mark.parametrize("name", SETS)
def test_fit_in_sample(real_data, name):
    expected = json.loads((real_data / "logits" / "reference_metrics.json").read_text())[name]
    logits, labels = load(real_data, name)
    calibrator = Temperature().fit(logits, labels)
    assert calibrator.temperature == pytest.approx(expected["T_in_sample"], rel=1e-6)
    report = calibrator.report
    assert (report.converged, report.at_bound, report.accuracy_change) == (True, False, 0.0)
    assert report.nll_before == pytest.approx(expected["nll"], abs=1e-6)
    log_q = calibrator(logits.double())
    assert nll(log_q, labels).item() == pytest.approx(expected["nll_T"], abs=1e-9)
    assert ece(log_q, labels).item() == pytest.approx(expected["ece15_T"], abs=1e-6)
    assert brier(log_q, labels).item() == pytest.approx(expected["brier_T"], abs=1e-6)
