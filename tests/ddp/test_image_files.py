"""Image files on one, two and three processes, stopped and resumed."""

import numpy as np
import pytest
from PIL import Image

from calib_lightning.data import ToyDataModule
from tests.ddp import cases


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with 300 files of the toy images."""
    root, toys = tmp_path_factory.mktemp("images"), ToyDataModule().load_train()
    for row, (image, label) in enumerate(zip(toys.image[:, 0], toys.label.tolist(), strict=True)):
        (root / f"class-{label}").mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(root / f"class-{label}" / f"{row:03}.png")
    return str(root)


def fit(pool, images, folder, stop_after=None, resume=False, workers=0):
    return pool.run(cases.fit, str(folder), stop_after, resume, workers, None, images)


@pytest.mark.parametrize("stop_after", [3, 8])
def test_resumed_run_is_bit_equal_on_two_processes(pool2, images, tmp_path, stop_after):
    # 239 training images in batches of 2 x 16: 8 steps an epoch
    whole = fit(pool2, images, tmp_path / "whole")
    stopped = fit(pool2, images, tmp_path / "part", stop_after)
    resumed = fit(pool2, images, tmp_path / "part", resume=True)
    assert [part["stopped"] for part in stopped] == [143, 143]
    assert whole[0]["digest"] == whole[1]["digest"] == resumed[0]["digest"] == resumed[1]["digest"]
    for epoch in range(3):
        seen = [row for runs in (stopped, resumed) for run in runs for row in run["rows"].get(epoch, [])]
        assert sorted(seen) == list(range(239))


def test_workers_change_no_bit(images, tmp_path):
    runs = [cases.fit(0, 1, str(tmp_path / str(n)), None, False, n, None, images) for n in (0, 2)]
    assert runs[0]["digest"] == runs[1]["digest"]


def test_evaluation_on_two_and_three_processes_is_that_on_one(pool2, pool3, images, tmp_path):
    alone = cases.test_network(0, 1, str(tmp_path / "1"), images)
    assert (alone["metrics"]["test/n"], alone["metrics"]["calibration/n"]) == (151, 33)
    for world, pool in ((2, pool2), (3, pool3)):
        together, *_ = pool.run(cases.test_network, str(tmp_path / str(world)), images)
        assert together["metrics"]["test/n"] == 151
        assert together["metrics"]["test/accuracy"] == alone["metrics"]["test/accuracy"]
        assert together["metrics"] == pytest.approx(alone["metrics"], abs=1e-5, nan_ok=True)
        for name, columns in alone["files"].items():
            np.testing.assert_array_equal(together["files"][name]["index"], columns["index"])
            np.testing.assert_allclose(together["files"][name]["logits"], columns["logits"], atol=1e-5)
