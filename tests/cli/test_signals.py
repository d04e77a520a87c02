"""Real signals to real processes of ``calib fit``."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from calib_lightning.core import load_module

from .conftest import QUICK

LONG = ("--trainer.max_epochs=100000", "--model.scheduler=null", "--test_after_fit=false")


def _start(folder, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    return subprocess.Popen(
        [sys.executable, "-m", "calib_lightning", *QUICK, *LONG, *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for(condition, process, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def _loads(path):
    load_module(path)
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_leaves_a_checkpoint_and_says_so(tmp_path, signum, code):
    # the whole process group, loader workers included, as Ctrl-C and schedulers do it
    process = _start(tmp_path, "--data.num_workers=2")
    last = tmp_path / "runs/quickstart/checkpoints/last.ckpt"
    _wait_for(last.exists, process)
    _wait_for(lambda: _loads(last) > 15, process)
    last.unlink()  # the epochs that follow write it again, or the signal does
    os.killpg(process.pid, signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert _loads(last) > 15
    assert [path.name for path in last.parent.glob("last*")] == ["last.ckpt"]
    assert "Resume with" in output
    assert "Traceback" not in output


def test_killed_leaves_files_that_load(tmp_path):
    process = _start(tmp_path)
    folder = tmp_path / "runs/quickstart/checkpoints"
    _wait_for((folder / "last.ckpt").exists, process)
    time.sleep(0.5)  # it writes several times a second
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    for path in folder.glob("*.ckpt"):
        assert _loads(path) > 0
    with (folder.parent / "metrics.csv").open() as file:
        logged = max(int(row["step"]) for row in csv.DictReader(file))
    assert _loads(folder / "last.ckpt") >= logged - 15, "more than one epoch was lost"


def test_two_processes_of_the_command_line(calib, tmp_path):
    """Lightning starts the second rank itself: one folder, one table, every row once."""
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    short = [*QUICK, *two, "--trainer.max_epochs=2"]
    done = subprocess.run(
        [sys.executable, "-m", "calib_lightning", *short], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart"]
    assert done.stdout.count("correctness AUROC") == 1
    run = tmp_path / "runs" / "quickstart"
    together = json.loads((run / "run.json").read_text())["results"]
    assert together["test/n"] == 400
    assert calib("test", "-c", run / "config.yaml", "--trainer.devices=1", "--trainer.strategy=auto").code == 0
    alone = json.loads((run / "test" / "run.json").read_text())["results"]
    assert alone["test/accuracy"] == together["test/accuracy"]
    assert alone == pytest.approx({key: together[key] for key in alone}, abs=1e-5)
