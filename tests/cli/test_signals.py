"""Real signals to real processes of ``calib fit``."""

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
    process = _start(tmp_path)
    last = tmp_path / "runs/quickstart/checkpoints/last.ckpt"
    _wait_for(last.exists, process)
    before = _loads(last)
    process.send_signal(signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert _loads(last) >= before
    assert "Resume with" in output
    assert "Traceback" not in output


def test_killed_while_writing_leaves_files_that_load(tmp_path):
    process = _start(tmp_path)
    folder = tmp_path / "runs/quickstart/checkpoints"
    _wait_for((folder / "last.ckpt").exists, process)
    _wait_for(lambda: any(folder.glob(".*.tmp")), process)  # a write is going on
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    for path in folder.glob("*.ckpt"):
        assert _loads(path) > 0


def test_two_processes_of_the_command_line(tmp_path):
    """Lightning starts the second rank itself; one folder, one table, SIGTERM to the first rank only."""
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    short = [*QUICK, *two, "--trainer.max_epochs=2"]
    done = subprocess.run(
        [sys.executable, "-m", "calib_lightning", *short], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart"]
    assert done.stdout.count("correctness AUROC") == 1
    assert "400" in done.stdout

    process = _start(tmp_path, *two, "--run_dir=runs/long")
    last = tmp_path / "runs/long/checkpoints/last.ckpt"
    _wait_for(last.exists, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert _loads(last) > 0
