"""Real signals to real processes of ``calib fit``."""

import csv
import os
import signal
import time

import pytest
import torch

from calib_lightning.core import load_module

from .conftest import QUICK

LONG = ("--trainer.max_epochs=100000", "--model.scheduler=null", "--test_after_fit=false")


def _loads(path):
    load_module(path)
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_leaves_a_checkpoint_and_says_so(forked, tmp_path, signum, code):
    # the whole process group, loader workers included, as Ctrl-C and schedulers do it
    process = forked(*QUICK, *LONG, "--data.num_workers=2")
    last = tmp_path / "runs/quickstart/checkpoints/last.ckpt"
    process.wait_for(last.exists)
    process.wait_for(lambda: _loads(last) > 15)
    last.unlink()  # the epochs that follow write it again, or the signal does
    os.killpg(process.pid, signum)
    output = process.ended()
    assert process.returncode == code, output
    assert _loads(last) > 15
    assert [path.name for path in last.parent.glob("last*")] == ["last.ckpt"]
    assert "Resume with" in output
    assert "Traceback" not in output


def test_killed_leaves_files_that_load(forked, tmp_path):
    process = forked(*QUICK, *LONG)
    folder = tmp_path / "runs/quickstart/checkpoints"
    process.wait_for((folder / "last.ckpt").exists)
    time.sleep(0.5)  # it writes several times a second
    os.killpg(process.pid, signal.SIGKILL)
    process.ended()
    assert process.returncode == -signal.SIGKILL
    for path in folder.glob("*.ckpt"):
        assert _loads(path) > 0
    with (folder.parent / "metrics.csv").open() as file:
        logged = max(int(row["step"]) for row in csv.DictReader(file))
    assert _loads(folder / "last.ckpt") >= logged - 15, "more than one epoch was lost"
