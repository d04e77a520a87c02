"""What docs/benchmarks.md promises of files, arrays of jobs and sweeps."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from calib_lightning.benchmark.grid import AXES, read_grid
from calib_lightning.utils.config_search import find_config

from ..conftest import REPOSITORY
from .grids import results_of, runs_of, write_grid

TEXT = (REPOSITORY / "docs/benchmarks.md").read_text()
GRID, SWEEP = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
JOB, ARRAYS = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
QUICKSTART = REPOSITORY / "configs/benchmark/quickstart.yaml"


def test_the_grid_is_one(tmp_path, run_grid):
    (tmp_path / "grid.yaml").write_text(GRID)
    grid = read_grid(tmp_path / "grid.yaml")
    assert len(grid.runs) == 2 * 4 * 3
    done = run_grid("grid.yaml", "--dry-run")
    assert done.code == 0, done.err
    assert "24 runs: 24 to do." in done.out
    assert "digits_lt-digits_cnn-focal+mac_cal-2" in done.out
    assert "balanced-digits_cnn-focal-2-0" in done.out


def test_every_key_is_explained():
    table = TEXT.partition("| key | value |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:])))
    assert named == {*AXES, "seeds", "calibrators", "baseline", "config", "options", "folder"}


def test_quickstart_is_what_it_says():
    grid = read_grid(QUICKSTART)
    methods = ["cross_entropy", "label_smoothing", "focal", "mixup", "mac_cal", "crl"]
    assert [run.method for run in grid.runs] == [name for name in methods for _ in range(3)]
    assert {run.data for run in grid.runs} == {"digits_lt"}
    assert {run.seed for run in grid.runs} == {0, 1, 2}
    assert (grid.baseline, grid.calibrators, grid.folder.as_posix()) == (
        "cross_entropy",
        ("Temperature",),
        "runs/quickstart",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")
def test_a_task_of_an_array_takes_its_line(tmp_path, run_grid):
    write_grid(tmp_path, method=["cross_entropy", {"method": "mac_cal", "options": {"model.switch.at_epoch": -1}}])
    lines = run_grid("grid.yaml", "--print").out
    assert "calib benchmark grid.yaml --print > commands.txt" in TEXT
    (tmp_path / "commands.txt").write_text(lines)
    (tmp_path / "job.sh").write_text(JOB)
    shim = tmp_path / "bin" / "calib"
    shim.parent.mkdir()
    shim.write_text('#!/bin/bash\nprintf "%s\\n" calib "$@" >> said.txt\n')
    srun = shim.with_name("srun")
    srun.write_text('#!/bin/bash\nexec "$@"\n')
    shim.chmod(0o755)
    srun.chmod(0o755)
    environment = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, check=True)
    fit, calibrate = (shlex.split(command) for command in lines.splitlines()[1].split(" && "))
    assert (tmp_path / "said.txt").read_text().splitlines() == [*fit, *calibrate]
    assert "--model=mac_cal" in fit
    ranges = re.findall(r"--array=(\d+)-(\d+)", ARRAYS)
    assert ranges == [("1", "3"), ("4", "18")]  # of quickstart
    assert subprocess.run(["bash", "-n", "-c", ARRAYS]).returncode == 0


def test_a_sweep_runs_and_its_runs_are_those_of_the_benchmark(tmp_path, run_grid, calib, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep = yaml.safe_load(SWEEP)
    assert sweep["method"] == "grid"
    values = {name: given.get("values", [given.get("value")]) for name, given in sweep["parameters"].items()}
    every = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    assert len(every) == 15
    commands = [_with_arguments(sweep["command"], chosen) for chosen in every]
    # two of them, which get numbered folders; the others parse
    chosen = [command for command in commands if "--model=mixup" in command][:2]
    for command in chosen:
        assert command[0] == "calib"
        done = calib(*command[1:])
        assert done.code == 0, done.err
    each = {word: command for command in commands for word in command if word.startswith("--model=")}
    assert len(each) == 5
    for command in each.values():
        done = calib(*command[1:], "--print_config")
        assert done.code == 0, done.err
    lines = run_grid(QUICKSTART, "--print").out.splitlines()
    assert len(lines) == 18
    left = [line for line in lines if "calib fit" not in line]
    assert [shlex.split(line)[2] for line in left] == ["runs/quickstart/sweep", "runs/quickstart/sweep-2"]
    found = {run["folder"]: (run["method"], run["seed"]) for run in runs_of(tmp_path / "runs/quickstart").values()}
    assert found["sweep"] == ("mixup", 0)
    assert found["sweep-2"] == ("mixup", 1)


def _with_arguments(command, chosen):
    """The command of a sweep as its agent starts it."""
    words = [f"--{name}={value}" for name, value in chosen.items()]
    return [word for part in command for word in (words if part == "${args}" else [part])]


@pytest.mark.slow
def test_quickstart_takes_less_than_two_minutes(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "calib_lightning", "benchmark", "quickstart"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    runs = runs_of(tmp_path / "runs/quickstart")
    assert [run["status"] for run in runs.values()] == ["finished"] * 18
    for name in runs:
        found = results_of(tmp_path / "runs/quickstart" / name)
        accuracy = np.mean(found["test/logits"].argmax(1) == found["test/labels"])
        assert accuracy > 0.9, name
    assert seconds < 120, f"it took {seconds:.0f} s"
    assert find_config("quickstart", "benchmark") == QUICKSTART
