"""The relief of spatter's water, step by step: worked values, and OpenCV where it can be imported."""

import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt, gaussian_filter

from calib_lightning.data.corruptions import relief as steps
from calib_lightning.data.corruptions.constants import TABLES
from calib_lightning.data.corruptions.draws import normal, streams
from calib_lightning.data.corruptions.filters import gaussian, unit
from calib_lightning.data.corruptions.spatter import spatter
from tests.data.test_corruptions import pictures

SLOPE = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


@pytest.fixture(scope="module")
def cv2():
    return pytest.importorskip("cv2", reason="OpenCV cannot be imported here", exc_type=ImportError)


def layers(kind, size):
    """Random images (20, H, W): noise, or what blurring leaves of it, whole or above a level."""
    rng = np.random.default_rng(7)
    if kind == "noise":
        return rng.integers(0, 256, (20, *size), dtype=np.uint8)
    blurred = gaussian_filter(rng.normal(size=(20, *size)), (0, 2, 2))
    grey = np.clip(128 + 500 * blurred, 0, 255).astype(np.uint8)
    return np.where((grey < 170) & (kind == "drops"), 0, grey).astype(np.uint8)


def by_opencv(function, images, *arguments):
    return np.stack([function(image, *arguments) for image in images])


@pytest.mark.parametrize("size", [(32, 32), (3, 5), (70, 41)])
@pytest.mark.parametrize("kind", ["noise", "smooth", "drops"])
def test_every_step_is_that_of_opencv(cv2, kind, size):
    grey = layers(kind, size)
    edges = steps.canny(grey)
    expected = by_opencv(cv2.Canny, grey, 50, 150)
    np.testing.assert_array_equal(edges, expected > 0)
    assert 0.05 < edges.mean() < 0.7
    distance = by_opencv(cv2.distanceTransform, 255 - expected, cv2.DIST_L2, 5)
    # fixed point or float32, as OpenCV was built: 1.4 and 2.1969 are rounded at the fifth digit
    np.testing.assert_allclose(steps.far_from(edges) / 1e4, np.minimum(distance, 20), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.rint(steps.around(grey) / 9), by_opencv(cv2.blur, grey, (3, 3)))
    whole = grey.astype(np.float32)
    np.testing.assert_array_equal(steps.around(grey) // 9, by_opencv(cv2.blur, whole, (3, 3)).astype(int))
    np.testing.assert_array_equal(steps.equalized(grey), by_opencv(cv2.equalizeHist, grey))
    np.testing.assert_array_equal(steps.lit(grey), by_opencv(cv2.filter2D, grey, cv2.CV_8U, SLOPE))


@pytest.mark.parametrize(("table", "side", "count"), [("cifar", 32, 300), ("imagenet", 224, 8)])
def test_spattered_images_are_those_of_opencv(cv2, table, side, count):
    image, rows = pictures(count, 3, side, side).numpy(), range(count)
    different = 0.0
    for constants in TABLES[table]["spatter"][:3]:
        mean, scale, sigma, threshold, strength, _ = constants
        layer = gaussian(normal(streams(0, 3, 1, rows), side, side) * np.float32(scale) + np.float32(mean), sigma)
        water = np.where(layer < threshold, 0, layer * 255).astype(np.uint8)
        light = np.zeros((count, side, side))
        for drops, out in zip(water, light, strict=True):
            distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
            distance = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
            relief = drops * cv2.blur(cv2.filter2D(distance, cv2.CV_8U, SLOPE), (3, 3)).astype(np.float32)
            out[:] = relief / max(relief.max(), 1)
        colour = np.array([175, 238, 238])[:, None, None] / 255
        expected = unit(image) + strength * light[:, None] * colour
        made = spatter(image, constants, streams(0, 3, 1, rows))
        different = max(different, (np.abs(made - expected) > 1e-5).mean())
        assert np.abs(made - unit(image)).mean() > 1e-3
    assert different < 1e-3  # a distance that its rounding brings to the next whole number


def test_edges_of_steps_worked_by_hand():
    grey = np.zeros((3, 8, 8), dtype=np.uint8)
    grey[0, :, 4:] = 40  # Sobel differences of 160 on both sides of the step: the first is the edge
    grey[1, :, 4:] = 37  # 148: not strong
    grey[2, :, 4:] = 20 + 5 * np.arange(8)[:, None]  # weak ones above strong ones that they touch
    edges = steps.canny(grey)
    assert edges[0, :, 3].all()
    assert edges[0].sum() == 8
    assert not edges[1].any()
    assert edges[2, :, 4].all()
    assert edges[2].sum() == 8
    assert not steps.canny(grey[2:, :4]).any()  # without the strong ones
    np.testing.assert_array_equal(steps.canny(grey[:1].swapaxes(1, 2)), edges[:1].swapaxes(1, 2))


def test_distances_are_euclidean_within_two_percent_and_of_the_own_image():
    edges = np.random.default_rng(1).random((4, 60, 45)) < 0.003
    edges[1] = False
    edges[2] = False
    edges[2, 0, 0] = True
    far = steps.far_from(edges) / 1e4
    for image in (0, 2, 3):
        euclidean = np.minimum(distance_transform_edt(~edges[image]), 20)
        np.testing.assert_allclose(far[image], euclidean, rtol=0.02)
        assert (far[image] == 20).any()
    assert (far[1] == 20).all()
    np.testing.assert_allclose(far[2, :3, :4], [[0, 1, 2, 3], [1, 1.4, 2.1969, 3.1969], [2, 2.1969, 2.8, 3.5969]])


def test_equalisation_and_light_worked_by_hand():
    grey = np.array([[[3, 3, 3], [4, 4, 9]], [[6, 6, 6], [6, 6, 6]]], dtype=np.uint8)
    assert steps.equalized(grey).tolist() == [[[0, 0, 0], [170, 170, 255]], [[6] * 3] * 2]
    hill = np.array([[[9, 0, 0], [0, 5, 0], [0, 0, 9]], [[0, 0, 0], [0, 5, 0], [0, 0, 200]]], dtype=np.uint8)
    assert steps.lit(hill)[:, 1, 1].tolist() == [5, 255]
    assert steps.around(hill)[:, 1, 1].tolist() == [23, 205]
    assert steps.around(hill)[0, 0].tolist() == [9 + 4 * 5, 9 + 2 * 5, 4 * 5]  # mirrored about the outer pixels


def test_drops_without_an_edge_are_lit_evenly():
    assert (steps.relief(np.full((2, 9, 12), 77, dtype=np.uint8)) == 20).all()


def test_spatter_does_not_import_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    image = pictures(2)
    made = spatter(image.numpy(), TABLES["cifar"]["spatter"][2], streams(0, 3, 1, [0, 1]))
    assert (torch.from_numpy(made) - image / 255).abs().amax(dim=(1, 2, 3)).min() > 0.3
