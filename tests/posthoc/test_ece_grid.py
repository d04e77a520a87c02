"""The temperature of the lowest calibration error on a grid."""

import math

import numpy as np
import pytest
import torch

from calib_lightning.metrics.functional import ece
from calib_lightning.posthoc.ece_grid import ECETemperature, grid_ece, grid_ece_interpolated
from calib_lightning.posthoc.temperature import Temperature
from tests.metrics.golden import random_set, reference
from tests.posthoc.test_temperature import CONSTANT, SEPARABLE, drawn, fits_of_golden

GRID = 0.001 * torch.arange(1, 5001, dtype=torch.float64)


def test_golden_fit():
    for exhaustive in (False, True):
        logits, labels = fits_of_golden()
        calibrator = ECETemperature(exhaustive=exhaustive).fit(logits, labels)
        assert calibrator.temperature == pytest.approx(0.471, abs=1e-12)
        assert calibrator.report.ece_after == pytest.approx(0.051129697, abs=1e-9)
        assert reference(logits / 0.471, labels)["ece"] == pytest.approx(0.051129697, abs=1e-9)
        assert calibrator.report.converged
        assert not calibrator.report.at_bound
        assert math.isnan(calibrator.report.gradient_norm)


@pytest.mark.parametrize(
    ("rows", "classes", "scale"),
    [
        *((500, 10, 1.7), (60, 2, 3.0), (30, 100, 0.4)),
        *(pytest.param(*size, marks=pytest.mark.slow) for size in ((300, 100, 0.4), (5000, 3, 1.0), (7, 1000, 2.0))),
    ],
)
def test_every_point_of_the_grid(rows, classes, scale):
    """Of some temperatures by plain loops and by the metric; of all by interpolation."""
    logits, labels = drawn(scale, rows, classes)
    for z in (logits, logits.float()):
        exact = grid_ece(z, labels, GRID)
        for j in range(0, 5000, 499):
            tempered = z.double() / GRID[j]
            assert float(exact[j]) == pytest.approx(float(ece(tempered, labels)), abs=1e-13)
            assert float(exact[j]) == pytest.approx(reference(tempered, labels)["ece"], abs=1e-13)
        near = grid_ece_interpolated(z, labels, GRID)
        assert float((near - exact).abs().max()) < 1e-7


def test_bins_of_the_grid():
    logits, labels = drawn(1.7, 200, 4)
    for n_bins in (1, 2, 10, 100):
        for some in (grid_ece, grid_ece_interpolated):
            found = some(logits, labels, GRID[::50], n_bins) if some is grid_ece else some(logits, labels, GRID, n_bins)
            expected = [float(ece(logits / t, labels, n_bins=n_bins)) for t in GRID[::50]]
            found = found if some is grid_ece else found[::50]
            assert found.tolist() == pytest.approx(expected, abs=1e-7)


def by_search(logits, labels, temperatures, n_bins=15):
    """The whole grid by the metric, ties broken by the distance to the T of the likelihood."""
    errors = np.array([float(ece(logits.double() / t, labels, n_bins=n_bins)) for t in temperatures])
    best = np.array(temperatures)[errors <= errors.min() + 1e-12]
    likely = Temperature().fit(logits, labels).temperature
    return best[np.abs(np.log(best / likely)).argmin()]


@pytest.mark.filterwarnings("ignore:.*bound")
@pytest.mark.parametrize(
    ("rows", "classes"),
    [
        *((10, 3), (60, 2)),
        *(
            pytest.param(*size, marks=pytest.mark.slow)
            for size in ((500, 10), (200, 100), (2000, 10), (5000, 10), (2000, 100))
        ),
    ],
)
def test_fast_search_finds_what_the_full_grid_finds(rows, classes):
    """In 20 of 20 sets, each of another best temperature."""
    for seed in range(20):
        logits, labels = drawn((0.4, 1.0, 1.7, 3.0)[seed % 4], rows, classes, seed)
        fast, full = (ECETemperature(exhaustive=way).fit(logits, labels) for way in (False, True))
        assert fast.temperature == full.temperature
        assert fast.report.ece_after == full.report.ece_after
        assert fast.report.passes < full.report.passes or rows <= 60


@pytest.mark.filterwarnings("ignore:.*bound")
@pytest.mark.parametrize("n_bins", [10, 15])
def test_coarse_grid_of_focal_calibration(n_bins):
    temperatures = [0.1 * j for j in range(1, 101)]
    for seed in range(5):
        logits, labels = drawn((0.4, 1.7, 8.0)[seed % 3], 150, 10, seed)
        calibrator = ECETemperature(step=0.1, largest=10.0, n_bins=n_bins).fit(logits, labels)
        assert calibrator.temperature == pytest.approx(by_search(logits, labels, temperatures, n_bins), rel=1e-12)


def test_of_equal_errors_the_one_next_to_the_likelihood_is_taken():
    """One bin and logits of two values: whole ranges of T have the same error."""
    assert ECETemperature(step=0.1, largest=5.0).fit(*CONSTANT).temperature == pytest.approx(1.0, rel=1e-12)
    # Where all confidences round to 1 the error does not depend on T: of 0.001 to 0.1 the largest is the closest.
    logits = 10.0 * torch.eye(4, dtype=torch.float64)[torch.arange(40) % 4]
    labels = (torch.arange(40) + (torch.arange(40) % 4 == 3)) % 4
    for exhaustive in (False, True):
        calibrator = ECETemperature(step=0.001, largest=0.1, exhaustive=exhaustive)
        with pytest.warns(UserWarning, match="bound"):
            calibrator.fit(logits, labels)
        assert calibrator.temperature == pytest.approx(0.1, rel=1e-12)


def test_ends_of_the_grid_are_reported():
    with pytest.warns(UserWarning, match="bound"):
        calibrator = ECETemperature().fit(SEPARABLE, SEPARABLE.argmax(1))
    assert calibrator.report.at_bound
    assert calibrator.temperature == 0.001
    with pytest.warns(UserWarning, match="bound"):
        calibrator = ECETemperature(largest=1.5).fit(*drawn(8.0, 300))
    assert calibrator.report.at_bound
    assert calibrator.temperature == pytest.approx(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_are_widened(dtype):
    logits, labels = random_set(300, 5)
    narrow = logits.to(dtype)
    assert ECETemperature().fit(narrow, labels).temperature == ECETemperature().fit(narrow.double(), labels).temperature


def test_logits_are_not_changed():
    logits, labels = random_set(300, 5)
    before = logits.clone()
    ECETemperature().fit(logits, labels)
    assert torch.equal(logits, before)


def test_invalid_arguments_are_named():
    for arguments in ({"step": 0.0}, {"step": -0.1}, {"step": 2.0, "largest": 1.0}, {"largest": math.inf}):
        with pytest.raises(ValueError, match="0 < step <= largest"):
            ECETemperature(**arguments)
    with pytest.raises(ValueError, match="at most 100,000"):
        ECETemperature(step=1e-6)
    with pytest.raises(ValueError, match="n_bins is 0"):
        ECETemperature(n_bins=0)
