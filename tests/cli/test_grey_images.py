"""Networks for colour and images in grey: the network follows the data."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from calib_lightning.core import load_module

RUN = ("-c", "quickstart", "--trainer.max_epochs=1", "--data.num_workers=0", "--quiet")
NET = "--model.encoder=test_resnet"  # timm's smallest


@pytest.fixture
def folder(tmp_path):
    """``folder("L")``: ten images of two classes, grey or in colour."""

    def write(mode):
        for name, level in (("bright", 200), ("dark", 40)):
            (tmp_path / mode / name).mkdir(parents=True)
            for row in range(10):
                image = np.random.default_rng([row, level]).integers(0, 50, (32, 32, len(mode))) + level
                Image.fromarray(image.squeeze().astype(np.uint8)).save(tmp_path / mode / name / f"{row}.png")
        return tmp_path / mode

    return write


def _encoder(run):
    return load_module(run / "checkpoints" / "last.ckpt").encoder


@pytest.mark.parametrize("options", [(NET,), (NET, "--model", "focal"), ("--model.encoder={name: test_resnet}",)])
def test_a_network_takes_the_channels_of_the_images(calib, folder, tmp_path, options):
    data = ("--data", "folder", f"--data.root={folder('L')}")
    done = calib("fit", *RUN, *data, *options, "--run_dir=run")
    assert done.code == 0, done.err
    assert _encoder(tmp_path / "run").in_channels == 1
    # what was asked for is written down, so that another run of it follows its own data
    asked = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]["encoder"]
    assert "in_channels" not in str(asked)

    again = calib("test", "-c", "run/config.yaml", "--quiet")
    assert again.code == 0, again.err
    assert "was trained with" not in again.err
    first, second = (
        json.loads((tmp_path / "run" / name).read_text())["results"]["test/nll"]
        for name in ("run.json", "test/run.json")
    )
    assert first == pytest.approx(second, rel=1e-6)


def test_a_network_for_grey_images_takes_colour(calib, folder, tmp_path):
    done = calib("fit", *RUN, "--data", "folder", f"--data.root={folder('RGB')}", "--run_dir=run")
    assert done.code == 0, done.err
    assert _encoder(tmp_path / "run").name == "digits_cnn"
    assert _encoder(tmp_path / "run").in_channels == 3


def test_arrays_are_followed_too(calib, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (40, 16, 16)).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", images=image, labels=np.arange(40) % 2)
    done = calib("fit", *RUN[:3], "--quiet", "--data", "arrays", "--data.file=mine.npz", NET, "--run_dir=run")
    assert done.code == 0, done.err
    assert _encoder(tmp_path / "run").in_channels == 1


def test_channels_that_are_set_stay(calib, folder):
    data = ("--data", "folder", f"--data.root={folder('L')}")
    done = calib("fit", *RUN, *data, "--model.encoder={name: test_resnet, in_channels: 3}", "--run_dir=run")
    assert done.code == 1
    assert "or that of your own images with --data.channels=3." in " ".join(done.err.split())


def test_a_trained_network_keeps_its_channels(calib, folder, tmp_path):
    data = ("--data", "folder", f"--data.root={folder('L')}")
    assert calib("fit", *RUN, *data, NET, "--run_dir=run").code == 0
    other = ("--data", "folder", f"--data.root={folder('RGB')}", "--data.split.test=1.0")
    refused = calib("test", "-c", "run/config.yaml", *other)
    assert refused.code == 1
    assert "with 3 channels; the encoder 'test_resnet' expects (N, 1, H, W)" in " ".join(refused.err.split())
    done = calib("test", "-c", "run/config.yaml", *other, "--data.channels=1", "--quiet")
    assert done.code == 0, done.err
    resumed = ("--trainer.max_epochs=2", "--ckpt_path=run/checkpoints/last.ckpt", "--quiet")
    done = calib("fit", "-c", "run/config.yaml", *resumed)
    assert done.code == 0, done.err
    assert "was trained with" not in done.err
    assert _encoder(tmp_path / "run").in_channels == 1
