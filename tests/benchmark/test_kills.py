"""Benchmarks that are killed and started again until they are done."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest

from .grids import results_of, runs_of, stages_of, write_grid

OUT = "runs/grid"
MASKED = {"method": "mac_cal", "options": {"model.switch.at_epoch": -2, "model.switch.training.batch_size": 32}}


@pytest.fixture
def start(forked, monkeypatch):
    """Start the benchmark in a process of its own, whose runs draw no figures."""
    return lambda: forked("benchmark", "grid.yaml")


def _finished(out):
    """Folders of the finished runs, and when they were last written to."""
    if not (out / "benchmark.json").is_file():
        return {}
    done = [name for name, run in runs_of(out).items() if run["status"] == "finished"]
    files = [path for name in done for path in (out / name).rglob("*") if path.is_file()]
    return {str(path): path.stat().st_mtime_ns for path in files}


def _stop(process, signum, seconds=60.0):
    os.kill(process.pid, signum)
    process.ended(seconds)
    assert process.returncode == (143 if signum == signal.SIGTERM else -signum), process.printed()


def _check(tmp_path, done, kills):
    """No finished run is repeated, and all are equal to those of the benchmark that nobody has killed."""
    out, whole = tmp_path / OUT, tmp_path / "whole"
    assert {run["status"] for run in runs_of(out).values()} == {"finished"}
    for seen in done:
        assert seen.items() <= _finished(out).items()
    assert list(runs_of(out)) == list(runs_of(whole))
    fits = {name: stages_of(out / name).count("fit") for name in runs_of(out)}
    assert sum(fits.values()) <= len(fits) + kills
    for name in fits:
        one, two = results_of(out / name), results_of(whole / name)
        assert one.keys() == two.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, two[key], err_msg=f"{name} {key}")
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {*runs_of(out), "logs"}
    return fits


def test_killed_twice_it_goes_on_where_it_was(run_grid, start, tmp_path):
    write_grid(tmp_path, method=["cross_entropy", MASKED], options={"trainer.max_epochs": 20})
    assert run_grid("grid.yaml", "--output=whole").code == 0
    out = tmp_path / OUT
    first, second = (out / name for name in runs_of(tmp_path / "whole"))
    process = start()
    process.wait_for((first / "checkpoints/last.ckpt").exists)
    _stop(process, signal.SIGTERM)
    assert "goes on where it was" in process.printed()
    assert stages_of(first) == ["fit"]
    assert "stopped by" in json.loads((first / "run.json").read_text())["stages"][0]["status"]
    assert [run["status"] for run in runs_of(out).values()] == ["waiting", "waiting"]
    process = start()
    process.wait_for((second / "run.json").exists)
    done = [_finished(out)]
    assert done[0]
    _stop(process, signal.SIGKILL)
    done_run = run_grid("grid.yaml")  # while what is left of the killed one saves and ends
    assert done_run.code == 0, done_run.err
    assert _check(tmp_path, done, 2)[first.name] == 2


@pytest.mark.slow
def test_killed_twenty_times_at_random(run_grid, start, tmp_path):
    draw = random.Random(time.time_ns())
    methods = ["cross_entropy", "label_smoothing", "focal", "mixup", MASKED, "crl"]
    write_grid(tmp_path, method=methods, seeds=[0, 1], options={"trainer.max_epochs": 100})
    assert run_grid("grid.yaml", "--output=whole").code == 0
    out, done, kills = tmp_path / OUT, [], 0
    while kills < 20:
        process = start()
        if draw.random() < 0.8:  # else also while it starts
            process.wait_for(lambda process=process: " of 12: " in process.printed() or process.returncode == 0)
        time.sleep(draw.uniform(0, 12))
        if process.returncode is not None:
            break
        _stop(process, draw.choice([signal.SIGTERM, signal.SIGKILL]))
        kills += 1
        done.append(_finished(out))
    process = start()
    process.ended(600)
    assert process.returncode == 0, process.printed()
    assert kills == 20
    print("kills", kills, _check(tmp_path, done, kills))
