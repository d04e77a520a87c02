"""The classifier of a run: the same answers as the predictions that the run has saved."""

import contextlib
import csv
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.__main__ import main
from calib_lightning.deploy import classifier_of_run
from calib_lightning.posthoc import VectorScaling, load_calibrator, save_calibrator

from ..cli.conftest import calib

__all__ = ["calib"]

CLASSES = ("hiver", "été")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Grey images in ``mine/{train,test}/<class>``, the working directory of a run."""
    home = tmp_path_factory.mktemp("home")
    for part, rows in (("train", 40), ("test", 12)):
        for label, name in enumerate(CLASSES):
            (home / "mine" / part / name).mkdir(parents=True)
            for row in range(rows):
                level = np.random.default_rng([row, label, rows]).integers(0, 120, (16, 16)) + 40 * label
                Image.fromarray(level.astype(np.uint8)).save(home / "mine" / part / name / f"{row:02}.png")
    return home


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A run on them, with two calibrators."""
    options = ("--data.num_workers=0", "--trainer.max_epochs=2", "--quiet", "--run_dir=run")
    with contextlib.chdir(folder):
        assert main(["fit", "-c", "quickstart", "--data", "folder", "--data.root=mine", *options]) == 0
        assert main(["calibrate", "run", "--calibrators", "Temperature,VectorScaling", "--no_intervals"]) == 0
    return folder / "run"


def _answers(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _saved(run, temperature=1.0):
    with np.load(run / "predictions" / "test.npz") as arrays:
        probs = torch.softmax(torch.from_numpy(arrays["logits"]).double() / temperature, dim=1)
    return probs.max(dim=1)


@pytest.mark.parametrize("model", ["run", "run/checkpoints/best.ckpt"])
@pytest.mark.parametrize("calibrator", [None, "Temperature", "run/calibrate/Temperature.pt"])
def test_a_run_classifies_as_it_predicts(calib, run, folder, tmp_path, monkeypatch, model, calibrator):
    monkeypatch.chdir(folder)
    chosen = [] if calibrator is None else ["--calibrator", calibrator]
    done = calib("classify", "mine/test", "--model", model, *chosen, f"--output={tmp_path / 'out.csv'}")
    assert done.code == 0, done.err
    temperature = 1.0 if calibrator is None else load_calibrator(run / "calibrate" / "Temperature.pt").temperature
    confidence, label = _saved(run, temperature)
    rows = _answers(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == [f"{name}/{row:02}.png" for name in CLASSES for row in range(12)]
    assert [row["label"] for row in rows] == [CLASSES[place] for place in label]
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], confidence.numpy(), atol=2e-5)
    assert ("no calibrator: confidences are those of the network" in done.err) == (calibrator is None)
    assert calibrator is not None or "takes one (Temperature, VectorScaling)" in done.err
    said = [line for line in done.err.splitlines() if line.startswith("calib: note: calibrator: ")]
    assert [line.endswith("run/calibrate/Temperature.pt") for line in said] == [True] * (calibrator is not None)


@pytest.mark.parametrize("newest", ["calibrate", "calibrate-2"])
def test_the_newest_calibrator_of_a_name_is_taken(run, tmp_path, newest):
    copy = shutil.copytree(run, tmp_path / "run")
    for seed, name in enumerate(("calibrate", "calibrate-2")):
        logits = torch.randn(60, 2, generator=torch.Generator().manual_seed(seed))
        (copy / name).mkdir(exist_ok=True)
        save_calibrator(VectorScaling().fit(logits, torch.arange(60) % 2), copy / name / "VectorScaling.pt")
        os.utime(copy / name, (1e9 + (name == newest),) * 2)
    image = torch.randn(3, 1, 16, 16)
    given, *by_file = (
        classifier_of_run(copy, one)(image)
        for one in ("VectorScaling", *(copy / name / "VectorScaling.pt" for name in ("calibrate", "calibrate-2")))
    )
    assert [torch.equal(given, other) for other in by_file] == [newest == "calibrate", newest == "calibrate-2"]
    assert classifier_of_run(copy, "VectorScaling").classes == CLASSES


def test_calib_calibrate_names_the_command(calib, run):
    done = calib("calibrate", run, "--no_intervals")
    assert f"`calib classify DIR --model {run} --calibrator NAME` labels images." in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibrator=Dirichlet",), "has no calibrator 'Dirichlet'; it has Temperature, VectorScaling. Fit one with"),
        (("--model=none/best.ckpt",), "none/best.ckpt is not the folder of a run"),
        (("--model=mine",), "mine is not the folder of a run: it has no run.json"),
        (("--model=loose.ckpt",), "loose.ckpt is in no folder of a run, whose run.json says how images are prepared"),
        (("--model=half",), "half has no chosen checkpoint, so there is no network. Finish the training"),
        (("--model=model.pt",), "There is no classifier model.pt. Save one with save_classifier(classifier, path), or"),
        (("--model=loose.pt", "--calibrator=Temperature"), "--calibrator is for a RUN only; loose.pt has its own"),
        (("--model=typo", "--calibrator=Temperature"), "--model is typo, which does not exist; it must be a run or a"),
    ],
)
def test_what_is_no_model(calib, run, folder, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    (folder / "loose.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    (folder / "loose.pt").touch()
    (folder / "half").mkdir(exist_ok=True)
    (folder / "half" / "run.json").write_text("{}")
    model = () if options[0].startswith("--model") else ("--model=run",)
    done = calib("classify", "mine/test", *model, *options)
    assert done.code in (1, 2)
    assert message in " ".join(done.err.split())
    assert done.out == ""
