"""An output replaces nothing but an ordinary file, and never what the command reads."""

import json
import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from calib_lightning.__main__ import main
from calib_lightning.core import AtomicCheckpointIO
from calib_lightning.data import ToyDataModule
from calib_lightning.deploy import export_onnx, export_torch, save_classifier
from calib_lightning.plots import save_figure
from calib_lightning.posthoc import FixedTemperature, save_calibrator
from calib_lightning.utils.files import write_whole
from tests.deploy.networks import classifier, images


def ready_data():
    data = ToyDataModule()
    data.setup()
    return data


def calibrator():
    return FixedTemperature(2.0).fit(torch.randn(4, 3), torch.arange(4) % 3)


WRITERS = {
    "write_whole": lambda path: write_whole(path, lambda file: file.write(b"new")),
    "checkpoint": lambda path: AtomicCheckpointIO().save_checkpoint({"a": 1}, path),
    "calibrator": lambda path: save_calibrator(calibrator(), path),
    "classifier": lambda path: save_classifier(classifier(), path),
    "torch export": lambda path: export_torch(classifier(), path, images(2)),
    "ONNX export": lambda path: export_onnx(classifier(), path, images(2)),
    "figure": lambda path: save_figure(Figure(), path),
    "splits": lambda path: ready_data().save_splits(path),
}
SUFFIXES = {"torch export": ".pt2", "ONNX export": ".onnx", "figure": ".png"}


@pytest.fixture
def sets(tmp_path):
    """Predictions, counts and a calibrator."""
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "good.npz", logits=draw.normal(size=(60, 3)), labels=np.arange(60) % 3)
    np.save(tmp_path / "labels.npy", np.arange(60) % 3)
    (tmp_path / "tc.json").write_text("[5, 50, 500]")
    save_calibrator(calibrator(), tmp_path / "cal.pt")
    return tmp_path


def fifo(path):
    os.mkfifo(path)


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def folder(path):
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "make"),
    [*((name, fifo) for name in WRITERS), *(("write_whole", make) for make in (bound_socket, folder))],
)
def test_what_is_no_ordinary_file_stays(name, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / f"x{SUFFIXES.get(name, '.bin')}"
    make(os.path.relpath(path) if make is bound_socket else path)
    before = path.lstat()
    with pytest.raises(OSError, match=f"x{path.suffix} is a (pipe|socket|folder).* must be a new or an ordinary file"):
        WRITERS[name](path)
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("output", ["/dev/null", "/dev/full", "link"])
def test_a_device_stays_a_device(output, sets, monkeypatch, capsys):
    if output == "link":
        output = sets / "link.txt"
        output.symlink_to("/dev/null")
    # a failure of this test must not break the machine
    monkeypatch.setattr(os, "replace", None)
    monkeypatch.setattr("pathlib.Path.replace", None)
    assert main(["score", str(sets / "good.npz"), "--format", "text", "--output", str(output)]) == 1
    assert "is a device, which is not replaced" in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat(output).st_mode)  # noqa: PTH116
    with pytest.raises(OSError, match="is a device"):
        AtomicCheckpointIO().save_checkpoint({}, output)


INPUTS = {
    "the file": (["score", "good.npz", "--format", "json"], "good.npz"),
    "counts": (["score", "good.npz", "--groups", "frequency", "--train_counts", "tc.json"], "tc.json"),
    "labels": (["score", "good.npz", "--labels", "labels.npy", "--format", "json"], "labels.npy"),
    "compared": (["score", "good.npz", "--compare", "good.npz", "--format", "json"], "good.npz"),
    "calibrator": (["score", "good.npz", "--calibrator", "cal.pt", "--format", "json"], "cal.pt"),
}


@pytest.mark.parametrize("way", ["itself", "hard link", "link", "other spelling"])
@pytest.mark.parametrize("name", INPUTS)
def test_an_input_is_never_an_output(name, way, sets, monkeypatch, capsys):
    monkeypatch.chdir(sets)
    command, target = INPUTS[name]
    before, output = (sets / target).read_bytes(), target
    if way in ("hard link", "link"):
        output = "other.json"
        (os.link if way == "hard link" else os.symlink)(target, output)
    elif way == "other spelling":
        output = f"../{sets.name}/{target}"
    assert main([*command, "--output", output]) == 1
    assert "which this command reads" in capsys.readouterr().err
    assert (sets / target).read_bytes() == before


def test_the_model_and_images_of_classify_are_inputs_too(sets, monkeypatch, capsys):
    monkeypatch.chdir(sets)
    os.link("cal.pt", "cal.json")
    (sets / "images").mkdir()
    assert main(["classify", "images", "--model", "cal.pt", "--output", "cal.json"]) == 1
    assert "which this command reads (cal.pt)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_what_says_which_runs_belong_together_is_an_input(name, sets, monkeypatch, capsys):
    monkeypatch.chdir(sets)
    files = [Path(f"r{seed}/predictions/test.npz") for seed in range(2)]
    for seed, file in enumerate(files):
        file.parent.mkdir(parents=True)
        np.savez(file, logits=np.random.default_rng(seed).normal(size=(60, 3)), labels=np.arange(60) % 3)
        for record in ("run.json", "config.yaml"):
            (file.parents[1] / record).write_text("{}")
    command = ["score", *map(str, files), "--seeds", "--metrics", "accuracy", "--format", "json"]
    assert main([*command, "--output", f"r0/{name}"]) == 1
    assert "which this command reads" in capsys.readouterr().err
    assert Path("r0", name).read_text() == "{}"


@pytest.mark.parametrize("make", [os.link, os.symlink])
def test_an_image_is_never_an_output(make, sets, monkeypatch, capsys):
    monkeypatch.chdir(sets)
    Path("images").mkdir()
    Image.new("L", (8, 8)).save("images/0.png")
    before = Path("images/0.png").read_bytes()
    make("images/0.png", "answers.csv")
    assert main(["classify", "images", "--model", "cal.pt", "--output", "answers.csv"]) == 1
    assert "which this command reads (images/0.png)" in capsys.readouterr().err
    assert Path("images/0.png").read_bytes() == before


def test_a_figure_never_replaces_an_input(sets, monkeypatch, capsys):
    monkeypatch.chdir(sets)
    Path("figures/good").mkdir(parents=True)
    Path("figures/good/reliability_diagram.png").symlink_to("../../good.npz")
    before = Path("good.npz").read_bytes()
    assert main(["score", "good.npz", "--metrics", "accuracy", "--figures", "figures"]) == 1
    assert "which this command reads (good.npz)" in capsys.readouterr().err
    assert Path("good.npz").read_bytes() == before


def test_a_link_stays_and_its_file_is_replaced(sets, monkeypatch):
    monkeypatch.chdir(sets)
    (sets / "deep").mkdir()
    (sets / "deep" / "report.json").write_text("old")
    Path("latest.json").symlink_to("deep/report.json")
    Path("dangling.json").symlink_to("deep/new.json")
    for link, file in (("latest.json", "deep/report.json"), ("dangling.json", "deep/new.json")):
        assert main(["score", "good.npz", "--output", link]) == 0
        assert (sets / link).is_symlink()
        assert json.loads((sets / file).read_text())
    assert sorted(path.name for path in (sets / "deep").iterdir()) == ["new.json", "report.json"]


def test_links_in_a_circle_are_named(sets, monkeypatch, capsys):
    monkeypatch.chdir(sets)
    Path("a.json").symlink_to("b.json")
    Path("b.json").symlink_to("a.json")
    assert main(["score", "good.npz", "--output", "a.json"]) == 1
    assert "a.json" in capsys.readouterr().err


@pytest.mark.parametrize("stream", [1, 2])
def test_the_file_that_is_printed_to_is_no_output(stream, sets, monkeypatch, capsys):
    log, fstat = sets / "log.txt", os.fstat
    log.write_text("before")
    monkeypatch.setattr(os, "fstat", lambda number: log.stat() if number == stream else fstat(number))
    assert main(["score", str(sets / "good.npz"), "--output", str(log)]) == 1
    assert "to which this command prints" in capsys.readouterr().err
    assert log.read_text() == "before"
