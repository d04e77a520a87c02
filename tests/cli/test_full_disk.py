"""A disk that takes no more: the file, the cause and the remedy are told, and nothing older is lost."""

import errno
import json
import os
import shlex
from contextlib import contextmanager

import pytest

from calib_lightning.callbacks import RunRecord

from .conftest import QUICK

resource = pytest.importorskip("resource", reason="limits of file sizes are those of Unix")
RUN = "runs/quickstart"
RESUME = f"calib fit -c {RUN}/config.yaml --ckpt_path {RUN}/checkpoints/last.ckpt"


@pytest.fixture
def begun(calib, tmp_path):
    """The checkpoints of a run that has two epochs left, and what each holds."""
    assert calib(*QUICK, "--trainer.max_epochs=1", "--test_after_fit=false").code == 0
    return {path: path.read_bytes() for path in (tmp_path / RUN / "checkpoints").iterdir()}


@contextmanager
def _file_size(limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _status(tmp_path):
    return json.loads((tmp_path / RUN / "run.json").read_text())["stages"][-1]["status"]


def _again(tmp_path):
    """The command with the configuration of the resumed run, in its folder's whole name."""
    return RESUME.replace("config", "config-2").replace(RUN, str((tmp_path / RUN).resolve()))


LONGER = ("--trainer.max_epochs=3", "--test_after_fit=false")


def test_a_checkpoint_that_is_too_large(calib, tmp_path, begun):
    command = (*shlex.split(RESUME)[1:], *LONGER)
    with _file_size(100_000):
        done = calib(*command)
    assert done.code == 1
    assert "checkpoints/" in done.err
    assert ".ckpt cannot be written: it would be larger than files may be here (ulimit -f: 0.1 MiB)" in done.err
    assert "choose another folder with --run_dir" in done.err
    assert _again(tmp_path) in done.err
    assert "Traceback" not in done.err
    assert "File too large" in _status(tmp_path)
    assert {path: path.read_bytes() for path in begun} == begun
    assert sorted(path.name for path in (tmp_path / RUN / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert calib(*command).code == 0
    assert _status(tmp_path) == "finished"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more(calib, tmp_path, monkeypatch, begun, number):
    begin, sync, full = RunRecord.on_train_epoch_start, os.fsync, []

    def fill(self, *args):
        full.append(True)
        begin(self, *args)

    def refuse(descriptor):
        if full:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(RunRecord, "on_train_epoch_start", fill)
    (tmp_path / RUN / "error.log").mkdir()  # it cannot be written either
    done = calib(*shlex.split(RESUME)[1:], *LONGER)
    assert done.code == 1
    cause = {errno.ENOSPC: "no space is left on its disk (", errno.EROFS: "its file system is read-only"}[number]
    assert f"run.json cannot be written: {cause}" in done.err
    assert _again(tmp_path) in done.err
    assert "traceback could not be written" in done.err
    assert "Traceback" not in done.err
    assert _status(tmp_path) == "stopped"  # in place, where nothing new can be written
    assert {path: path.read_bytes() for path in begun} == begun
    full.clear()
    monkeypatch.setattr(RunRecord, "on_train_epoch_start", begin)
    done = calib(*shlex.split(RESUME)[1:], *LONGER, "--run_dir=elsewhere")
    assert done.code == 0, done.err
    assert (tmp_path / "elsewhere/checkpoints/last.ckpt").is_file()


def test_a_full_disk_while_metrics_are_appended(calib, tmp_path, begun):
    size = (tmp_path / RUN / "metrics.csv").stat().st_size
    with _file_size(size + 10):
        done = calib(*shlex.split(RESUME)[1:], *LONGER)
    assert done.code == 1
    assert "cannot be written" in done.err
    assert "Traceback" not in done.err
    assert {path: path.read_bytes() for path in begun} == begun


def test_a_report_that_is_too_large(calib, tmp_path, begun):
    assert calib("predict", "-c", f"{RUN}/config.yaml", "--quiet", "--run_dir=predicted").code == 0
    (file,) = (tmp_path / "predicted/predictions").glob("*.npz")
    with _file_size(50):
        done = calib("score", str(file), "--output=report.json")
    assert done.code == 1
    assert "report.json cannot be written" in done.err
    assert "choose another folder with --output" in done.err
    assert not (tmp_path / "report.json").exists()
