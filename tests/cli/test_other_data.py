"""A trained network on other data, and data that is refused before anything is written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.core import load_module
from calib_lightning.data import FolderDataModule
from calib_lightning.deploy import Preprocessing

FIT = ("fit", "-c", "quickstart", "--quiet=true", "--trainer.max_epochs=1", "--data.batch_size=8", "--run_dir=runs/one")


def fill(root, classes=("ant", "bee"), each=20, size=(8, 8), mode="L"):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            noise = np.random.RandomState(100 * label + number).randint(0, 256, (*size, 3)).astype(np.uint8)
            Image.fromarray(noise).convert(mode).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture
def trained(calib, tmp_path):
    """A run on a folder of grey images."""
    fill(tmp_path / "mine")
    done = calib(*FIT, "--data", "folder", "--data.root=mine")
    assert done.code == 0, done.err
    return tmp_path / "runs" / "one"


def test_a_network_is_tested_on_another_folder(calib, trained, tmp_path):
    fill(tmp_path / "theirs" / "test", each=5)
    done = calib("test", "-c", trained / "config.yaml", "--data", "folder", "--data.root=theirs", "--quiet=true")
    assert done.code == 0, done.err
    results = json.loads((trained / "test" / "run.json").read_text())["results"]
    assert results["test/n"] == 10
    assert "prepared differently from" not in done.err


def test_images_that_are_prepared_in_another_way_are_told(calib, trained, tmp_path):
    fill(tmp_path / "theirs", each=5, size=(12, 12))
    options = ("--data", "folder", "--data.root=theirs", "--data.split.test=1.0", "--quiet=true")
    done = calib("test", "-c", trained / "config.yaml", *options)
    assert done.code == 0, done.err
    assert "shape is [1, 12, 12] instead of [1, 8, 8]" in done.err
    done = calib("test", "-c", trained / "config.yaml", *options, "--data.size=8")
    assert "prepared differently from" not in done.err


def test_other_splits_of_the_same_folder_are_refused(calib, trained):
    done = calib("test", "-c", trained / "config.yaml", "--data.split.seed=5")
    assert done.code == 1
    assert "differ from those of the run" in done.err
    assert not (trained / "test").exists()


def test_a_renamed_file_is_another_split(calib, trained, tmp_path):
    (tmp_path / "mine" / "ant" / "03.png").rename(tmp_path / "mine" / "ant" / "zz.png")
    last = trained / "checkpoints" / "last.ckpt"
    done = calib(*FIT, "--data", "folder", "--data.root=mine", "--trainer.max_epochs=2", "--ckpt_path", last)
    assert done.code == 1
    assert "differ from those of the run" in done.err


def test_other_classes_than_those_of_the_checkpoint(calib, trained, tmp_path):
    fill(tmp_path / "theirs", ("ant", "bee", "cat"))
    done = calib("test", "-c", trained / "config.yaml", "--data", "folder", "--data.root=theirs")
    assert done.code == 1
    assert "The checkpoint was trained on 2 classes, the data has 3" in done.err
    assert not (trained / "test").exists()


def _empty_class(root):
    (root / "mine" / "cat").mkdir()


def _web_page(root):
    (root / "mine" / "ant" / "page.png").write_bytes(b"<html>")


def _nothing(root):
    pass


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (
            _empty_class,
            (),
            "1 of 3 classes: cat. Give each class a folder of its name with images, or remove the class",
        ),
        (_web_page, (), "page.png: it is not an image in one of the formats"),
        (_nothing, ("--data.split.val=5000",), "val=5000"),
        (_nothing, ("--data.root=nowhere",), "it must be a folder"),
        (_nothing, ("--data=cifar10", "--data.download=false"), "cifar-10-batches-py/test_batch: missing"),
    ],
)
def test_refused_data_leaves_no_folder_behind(calib, tmp_path, spoil, options, message):
    fill(tmp_path / "mine")
    spoil(tmp_path)
    done = calib(*FIT, "--data", "folder", "--data.root=mine", *options)
    assert done.code == 1
    assert message in done.err
    assert not (tmp_path / "runs" / "one").exists()


def test_the_run_says_how_its_images_are_prepared(trained, tmp_path):
    prepare = Preprocessing.from_run(trained)
    assert prepare == Preprocessing(size=(8, 8), mean=(0.5,), std=(0.5,))
    data = FolderDataModule(tmp_path / "mine", num_workers=0)
    data.setup()
    batch = next(iter(data.evaluation_loader("test")))
    image = Image.open(data._sets["test"].image.path(0))
    assert torch.equal(prepare(image), batch.image[0])
    assert load_module(trained / "checkpoints" / "best.ckpt").class_names == ("ant", "bee")
    with pytest.raises(ValueError, match=r"run.json does not say how images are prepared"):
        Preprocessing.from_run(tmp_path)
