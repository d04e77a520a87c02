"""``calib classify``: one table from every kind of file, and what cannot be read is named."""

import csv
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.deploy import CalibratedClassifier, export_onnx, export_torch, save_classifier
from calib_lightning.methods import CrossEntropy
from calib_lightning.posthoc import FixedTemperature

from ..cli.conftest import calib
from .networks import CLASSES, PREPROCESSING

__all__ = ["calib"]

NAMES = ["a.png", "b.jpg", "c.JPEG", "deep/d.webp", "deep/e.bmp", "f.png", "g.png"]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    network = CrossEntropy(len(CLASSES), encoder="digits_cnn")
    network.head.linear.weight.data *= 30
    calibrator = FixedTemperature(1.5).fit(torch.randn(20, 5), torch.arange(20) % 5)
    return CalibratedClassifier(network, calibrator, preprocessing=PREPROCESSING, classes=CLASSES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    draw = np.random.default_rng(0)
    for place, name in enumerate(NAMES):
        mode = ("L", "RGB")[place % 2]
        pixels = draw.integers(0, 256, (10 + place, 12, len(mode)), dtype=np.uint8).squeeze()
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def confidences(made, pictures):
    """Confidences of the images, one after another through the module."""
    batch = torch.stack([PREPROCESSING(Image.open(pictures / name)) for name in NAMES])
    return made.predict(batch)


@pytest.fixture(scope="module")
def models(made, pictures, confidences, tmp_path_factory):
    """The classifier in all formats, with a threshold in the middle of the confidences."""
    folder = tmp_path_factory.mktemp("models")
    ordered = confidences.confidence.sort().values
    # the four most confident are right, the others wrong
    label = torch.where(confidences.confidence >= ordered[3], confidences.label, (confidences.label + 1) % 5)
    batch = torch.stack([PREPROCESSING(Image.open(pictures / name)) for name in NAMES])
    made.set_threshold([(batch, label)], risk=0.0)
    save_classifier(made, folder / "model.pt")
    export_torch(made, folder / "model.pt2")
    export_onnx(made, folder / "model.onnx")
    return folder


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", ["pt", "pt2", "onnx"])
@pytest.mark.parametrize("size", [2, 32])
def test_every_format_gives_the_same_table(suffix, size, calib, pictures, models, confidences, tmp_path):
    model = models / f"model.{suffix}"
    done = calib("classify", pictures, "--model", model, "--output=out.csv", f"--batch_size={size}")
    assert (done.code, done.out, done.err) == (0, "", "")
    rows = table(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == NAMES
    assert [row["label"] for row in rows] == [CLASSES[label] for label in confidences.label]
    found = [float(row["confidence"]) for row in rows]
    np.testing.assert_allclose(found, confidences.confidence.numpy(), atol=2e-6)
    accepted = confidences.confidence >= confidences.confidence.sort().values[3]
    assert [row["abstain"] for row in rows] == ["false" if kept else "true" for kept in accepted]
    assert accepted.sum() == 4


def test_no_cell_of_a_file_is_a_formula(calib, pictures, models, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(next(pictures.rglob("*.png")), tmp_path / "in" / "=1+1.png")
    assert calib("classify", "in", "--model", models / "model.pt", "--output=out.csv").code == 0
    assert [row["file"] for row in table(tmp_path / "out.csv")] == ["'=1+1.png"]


def test_json_and_the_table_say_the_same(calib, pictures, models, tmp_path):
    argv = ("classify", pictures, f"--model={models / 'model.pt'}")
    assert calib(*argv, "--output=out.json").code == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["file"] for row in rows] == NAMES
    assert {type(row["abstain"]) for row in rows} == {bool}
    done = calib(*argv)
    lines = [line for line in done.out.splitlines() if ".png" in line or "deep" in line or ".j" in line.lower()]
    assert len(lines) == len(NAMES)
    for line, row in zip(lines, rows, strict=True):
        assert row["file"] in line
        assert row["label"] in line
        assert f"{row['confidence']:.4f}" in line
        assert (" yes " in line) == row["abstain"]


def test_the_threshold_of_the_command_line_comes_first(calib, pictures, models, tmp_path):
    argv = ("classify", pictures, "--model", models / "model.onnx", "--output=out.csv")
    for threshold, abstain in ((0, "false"), (1, "true")):
        assert calib(*argv, "--threshold", threshold).code == 0
        assert {row["abstain"] for row in table(tmp_path / "out.csv")} == {abstain}


def test_bad_images_are_named_and_the_others_predicted(calib, pictures, models, tmp_path):
    folder = tmp_path / "some"
    shutil.copytree(pictures, folder)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.bmp").write_bytes(b"")
    Image.fromarray(np.zeros((9, 9), dtype=np.uint16)).save(folder / "deep" / "sixteen.png")
    Image.new("L", (9, 9)).save(folder / "gif.png", format="GIF")
    Image.new("L", (9, 9)).save(folder / "scan.tiff")
    (folder / "notes.txt").write_text("not meant")
    (folder / ".hidden.png").write_text("not meant")
    done = calib("classify", folder, "--model", models / "model.pt", "--output=out.csv")
    assert done.code == 1
    assert [row["file"] for row in table(tmp_path / "out.csv")] == NAMES
    for said in (
        "broken.png: ",
        "text.jpg: not an image in one of the formats",
        "empty.bmp: not an image",
        "deep/sixteen.png: the image has mode I;16",
        "gif.png: not an image in one of the formats JPEG, PNG, WEBP, BMP",
        "scan.tiff: not a supported format; convert it",
        "note: not images: notes.txt",
    ):
        assert said in done.err
    assert "hidden" not in done.err
    assert done.err.count("error:") == 6


def test_without_a_threshold_nothing_abstains_and_it_is_said(calib, pictures, made, tmp_path):
    plain = CalibratedClassifier(made.network, made.calibrator, preprocessing=PREPROCESSING)
    save_classifier(plain, tmp_path / "plain.pt")
    done = calib("classify", pictures, "--model", "plain.pt", "--output=out.csv")
    assert done.code == 0
    assert "has no threshold, so it never abstains" in done.err
    rows = table(tmp_path / "out.csv")
    assert {row["abstain"] for row in rows} == {"false"}
    assert {row["label"] for row in rows} <= set("01234")  # numbers where there are no names


def test_what_is_missing_is_named(calib, pictures, made, models, tmp_path):
    save_classifier(CalibratedClassifier(made.network, made.calibrator), tmp_path / "bare.pt")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.pt").write_bytes(b"broken")
    for images, model, said in (
        (pictures, "bare.pt", "bare.pt has no preprocessing"),
        (pictures, "none.pt", "There is no classifier none.pt"),
        (pictures, "broken.pt", "broken.pt is damaged"),
        ("nothing", models / "model.pt", "nothing has no images; it must have .jpg"),
        ("nowhere", models / "model.pt", "nowhere is not a folder"),
    ):
        done = calib("classify", images, "--model", model)
        assert (done.code, done.out) == (1, "")
        assert f"calib: error: {said}" in done.err or said in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize("suffix", ["pt", "pt2", "onnx"])
def test_a_device_that_is_not_there_is_named(suffix, calib, pictures, models):
    done = calib("classify", pictures, "--model", models / f"model.{suffix}", "--device", "nowhere")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("calib: error: ")
    assert "nowhere" in done.err


def test_a_folder_as_output_is_refused_before_the_work(calib, pictures, tmp_path):
    (tmp_path / "out.csv").mkdir()
    done = calib("classify", pictures, "--model", "none.pt", "--output=out.csv")
    assert done.code == 1
    assert done.err.startswith("calib: error: --output: out.csv is a folder; it must be a new or an ordinary file.")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("x",), "--model"),
        (("x", "--model", "y", "--output", "z.txt"), "must be .csv or .json"),
        (("x", "--model", "y", "--threshold", "80"), "--threshold is 80.0; it must be a fraction"),
        (("x", "--model", "y", "--batch_size", "0"), "--batch_size is 0; it must be >= 1"),
        (("--model", "y"), "DIR"),
    ],
)
def test_a_wrong_command_line_ends_with_2(calib, argv, said):
    done = calib("classify", *argv)
    assert done.code == 2
    assert said in done.err


def test_help_needs_no_torch():
    code = (
        "import sys; from calib_lightning.__main__ import main\n"
        "try: main(['classify', '--help'])\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules, 'PIL' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--threshold X" in done.stdout
    assert done.stdout.endswith("0 False False\n")


@pytest.mark.parametrize("argv", [("--images", "x", "--model", "y"), ("--model=y", "--images=x")])
def test_the_old_spelling_says_the_new_one(calib, argv):
    done = calib("predict", *argv)
    assert (done.code, done.out) == (2, "")
    assert "calib classify DIR --model FILE" in done.err


def test_images_without_an_answer_are_named(calib, pictures, tmp_path):
    network = CrossEntropy(len(CLASSES), encoder="digits_cnn")
    network.head.linear.weight.data.fill_(torch.nan)
    calibrator = FixedTemperature(1.5).fit(torch.randn(20, 5), torch.arange(20) % 5)
    save_classifier(CalibratedClassifier(network, calibrator, preprocessing=PREPROCESSING), tmp_path / "nan.pt")
    done = calib("classify", pictures, "--model", tmp_path / "nan.pt", "--output=out.json")
    assert done.code == 1
    assert "a.png: the output of the network is nan" in done.err
    assert "NaN" not in (text := (tmp_path / "out.json").read_text())
    assert json.loads(text) == []


def test_where_nothing_can_be_written_nothing_is_predicted(calib, pictures, models, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = calib("classify", pictures, "--model", tmp_path / "missing.pt", "--output=file/out.csv")
    assert done.code == 1
    assert "is not a folder" in done.err
