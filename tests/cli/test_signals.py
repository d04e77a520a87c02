"""Real signals to real processes of ``calib fit``."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from calib_lightning.commands.fit import CalibCLI
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
    assert output.count("Go on with: calib fit") == 1
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


SHORT = (*QUICK, "--trainer.max_epochs=2")
RUN = "runs/quickstart"
RESUME = f"calib fit -c {RUN}/config.yaml --ckpt_path {RUN}/checkpoints/last.ckpt"


def _signal_in(hook, signum="SIGTERM", again=None):
    options = ["--trainer.callbacks+=tests.cli.terminate.SignalIn", f"--trainer.callbacks.hook={hook}"]
    options.append(f"--trainer.callbacks.signum={signum}")
    return [*options, *([] if again is None else [f"--trainer.callbacks.again={again}"])]


def _last_stage(folder):
    stage = json.loads((folder / "run.json").read_text())["stages"][-1]
    return stage["stage"], stage["status"]


@pytest.mark.parametrize(
    ("hook", "signum", "code"),
    [("on_fit_end", "SIGTERM", 143), ("on_test_batch_start", "SIGTERM", 143), ("on_test_end", "SIGINT", 130)],
)
def test_a_signal_in_the_test_after_a_fit_stops_and_a_resume_tests(forked, tmp_path, hook, signum, code):
    process = forked(*SHORT, *_signal_in(hook, signum))
    output = process.ended()
    assert process.returncode == code, output
    assert f"stopped by {signum}" in output
    assert f"Go on with: {RESUME}\n" in output
    assert "Traceback" not in output
    run = tmp_path / RUN
    assert _last_stage(run) == ("fit" if hook == "on_fit_end" else "test", f"stopped by {signum}")
    best, config = (run / "checkpoints/best.ckpt").read_bytes(), run / "config.yaml"
    config.write_text(config.read_text().replace(f"hook: {hook}", "hook: nothing"))
    again = forked(*RESUME.split()[1:])
    assert again.ended() is not None
    assert again.returncode == 0, again.printed()
    assert _last_stage(run) == ("test", "finished")
    assert "test/accuracy" in json.loads((run / "run.json").read_text())["results"]
    assert (run / "checkpoints/best.ckpt").read_bytes() == best


@pytest.fixture
def trained(calib, tmp_path):
    assert calib(*QUICK, "--trainer.max_epochs=1", "--test_after_fit=false").code == 0
    return tmp_path / RUN


@pytest.mark.parametrize(
    ("command", "signum", "code"),
    [("validate", "SIGTERM", 143), ("test", "SIGTERM", 143), ("test", "SIGINT", 130), ("predict", "SIGTERM", 143)],
)
def test_a_signal_ends_an_evaluation(forked, trained, command, signum, code):
    hook = "on_validation_batch_start" if command == "validate" else f"on_{command}_batch_start"
    process = forked(command, "-c", f"{RUN}/config.yaml", "--quiet", *_signal_in(hook, signum))
    output = process.ended()
    assert process.returncode == code, output
    assert output == f"calib: stopped by {signum}\n"
    assert _last_stage(trained / command) == (command, f"stopped by {signum}")


def test_the_second_interrupt_of_a_fit_ends_it_with_the_code_of_the_first(forked, tmp_path):
    process = forked(*SHORT, *_signal_in("on_validation_batch_start", "SIGINT", again=1.1))
    output = process.ended()
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert _last_stage(tmp_path / RUN) == ("fit", "stopped by SIGINT")


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_command_without_a_trainer(calib, tmp_path, monkeypatch, signum, code):
    def told_to_stop(*args, **options):
        signal.raise_signal(signal.Signals[signum])

    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr("calib_lightning.predictions.reading.read_predictions", told_to_stop)
    done = calib("score", tmp_path / "test.npz")
    assert (done.code, done.err) == (code, f"calib: stopped by {signum}\n")
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def launched():
    """A process that stands for one that Lightning has launched."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("place", ["fit", "after_fit"])
def test_a_signal_outside_the_loops_ends_launched_processes(calib, monkeypatch, launched, place):
    def told_to_stop(cli, **_):
        cli.trainer.strategy._launcher = SimpleNamespace(procs=[launched])
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(CalibCLI, "fit", lambda cli, **_: None)
    monkeypatch.setattr(CalibCLI, place, told_to_stop)
    assert calib(*SHORT).code == 130
    assert launched.wait(timeout=10) == -signal.SIGKILL


def test_a_signal_before_a_run_has_begun_leaves_no_folder(calib, tmp_path, monkeypatch):
    monkeypatch.setattr(CalibCLI, "_ready_data", lambda cli: signal.raise_signal(signal.SIGTERM))
    done = calib(*SHORT)
    assert (done.code, done.err) == (143, "calib: stopped by SIGTERM\n")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_signal_in_set_up_ends_both_processes(tmp_path):
    two = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    options = (*SHORT, *two, *_signal_in("setup", "SIGINT"), "--trainer.callbacks.rank=0")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "calib_lightning", *options], cwd=tmp_path, env=environment, start_new_session=True
    )
    assert process.wait(timeout=180) == 130
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    left = [stat for pgid, stat in map(str.split, listed.splitlines()) if int(pgid) == process.pid and "Z" not in stat]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "code"), [("null", 143), ("0", 143), ("1", 1)])
def test_a_signal_in_the_test_ends_both_processes(tmp_path, rank, code):
    # to both or to the first, which tells the other; a process that ends alone is reported as a broken connection
    two = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
    options = (*SHORT, *two, *_signal_in("on_test_batch_start"), f"--trainer.callbacks.rank={rank}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "calib_lightning", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == code, done.stderr
    assert _last_stage(tmp_path / RUN)[1].startswith("stopped by")
    assert (RESUME in done.stderr) == (code == 143)  # a broken connection is an error, whose traceback is named
