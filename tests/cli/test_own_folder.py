"""The user's own images: what the run says of them, and where it can be used."""

import json
import os
import signal

import numpy as np
import pytest
import yaml
from PIL import Image

from calib_lightning.benchmark.identity import content_of
from calib_lightning.utils.run_folder import read_json, write_json

CLASSES = ["Manteau d\u2019hiver", "\u00c9charpe"]
FIT = ("fit", "-c", "quickstart", "--data", "folder", "--data.root=mes images", "--data.num_workers=0", "--quiet")


@pytest.fixture
def images(tmp_path):
    """Ten grey images of two classes in ``mes images``."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "mes images" / name).mkdir(parents=True)
        for row in range(10):
            image = np.random.default_rng([row, label]).integers(0, 256, (8, 8)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "mes images" / name / f"{row}.png")


def test_a_run_is_named_after_the_folder_and_tested_from_anywhere(calib, images, tmp_path, monkeypatch):
    done = calib(*FIT, "--trainer.max_epochs=1")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "mes_images-cross_entropy-0"
    asked = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert asked["data"]["init_args"]["root"] == str(tmp_path / "mes images")
    assert "d\u2019hiver" in (run / "run.json").read_text(encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = calib("test", "-c", run / "config.yaml", "--quiet")
    assert again.code == 0, again.err
    results = [
        json.loads((run / name).read_text(encoding="utf-8"))["results"] for name in ("run.json", "test/run.json")
    ]
    assert results[0]["test/nll"] == pytest.approx(results[1]["test/nll"], rel=1e-6)


@pytest.mark.parametrize(("name", "place"), [("FolderDataModule", "root"), ("ArraysDataModule", "file")])
def test_a_place_is_the_same_run_however_it_is_written(tmp_path, monkeypatch, name, place):
    monkeypatch.chdir(tmp_path)
    contents = [
        content_of({"data": {"class_path": f"calib_lightning.data.{name}", "init_args": {place: str(written)}}})
        for written in ("mine", "./mine", tmp_path / "mine", "other")
    ]
    assert contents[0] == contents[1] == contents[2] != contents[3]


def test_an_interrupted_run_says_once_how_it_goes_on(forked, images, tmp_path):
    process = forked(*FIT[:-1], "--trainer.max_epochs=500", "--trainer.enable_progress_bar=false", "--run_dir=run")
    process.wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").exists)
    os.kill(process.pid, signal.SIGINT)
    said = process.ended()
    assert process.returncode == 130, said
    assert "Go on with: calib fit -c run/config.yaml --ckpt_path run/checkpoints/last.ckpt" in said
    assert "Resume with" not in said
    assert "weights_only" not in said


def test_json_has_characters_as_they_are(tmp_path):
    content = {"file": "caf\udce9.png", "class": "\u00c9charpe"}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "\u00c9charpe" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_the_settings_of_data_have_a_title_for_people(calib):
    said = calib("fit", "--data.help", "folder").out
    assert "\nSettings of FolderDataModule, in the configuration of --data.\n" in said
    assert "Help for" not in said
