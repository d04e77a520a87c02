"""One process at a time writes to a run; what killed writers leave is removed by the next one."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from calib_lightning.utils import run_folder, run_lock
from calib_lightning.utils.files import remove_leftovers, temporary_name
from calib_lightning.utils.run_lock import RunLock

from .conftest import QUICK

LONG = ("--trainer.max_epochs=100000", "--model.scheduler=null", "--test_after_fit=false")
HOLD = """
import os, sys, time
from pathlib import Path
from calib_lightning.utils.run_lock import RunLock
held = RunLock(Path(sys.argv[1]))
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds the lock of ``tmp_path``, and the number of the worker that it has forked."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(worker, signal.SIGKILL)


def test_a_second_run_in_the_folder_is_refused_and_may_begin_when_the_first_has_died(calib, forked, tmp_path):
    first = forked(*QUICK, *LONG)
    run = tmp_path / "runs/quickstart"
    last = run / "checkpoints/last.ckpt"
    first.wait_for(last.exists)
    again = ("fit", "-c", run / "config.yaml", "--ckpt_path", last, "--quiet=true")
    begun = {path.name for path in run.iterdir()}
    refused = calib(*again)
    assert refused.code == 1
    said = f"is in use by process {first.pid} on {socket.gethostname()} (since "
    assert said in refused.err
    assert "--run_dir" in refused.err
    assert {path.name for path in run.iterdir()} == begun  # no second configuration, no error.log
    # whoever only reads the run has a folder of his own
    tested = calib("test", "-c", run / "config.yaml", "--ckpt_path", last, "--quiet=true")
    assert tested.code == 0, tested.err
    assert (run / "test/run.json").is_file()
    assert not (run / "test" / run_lock.NAME).exists()

    os.killpg(first.pid, signal.SIGKILL)
    first.ended()
    half = run / "checkpoints" / temporary_name(last).name.replace(str(os.getpid()), str(first.pid))
    half.write_text("half")
    more = calib(*again, "--test_after_fit=false", "--trainer.limit_train_batches=1", "--trainer.max_time=00:00:00:01")
    assert more.code == 0, more.err
    assert not half.exists()
    assert not (run / run_lock.NAME).exists()


def test_a_run_that_fails_leaves_no_lock(calib, tmp_path):
    failed = calib(*QUICK, "--select_on=val/nothing")
    assert failed.code == 1
    assert calib(*QUICK, "--trainer.max_epochs=1", "--model.optimizer.lr=-1").code == 1
    assert not list(tmp_path.rglob(run_lock.NAME))


def test_the_kernel_releases_it_though_a_forked_worker_lives_on(tmp_path, held):
    with pytest.raises(RuntimeError, match=rf"is in use by process {held.pid} on "):
        RunLock(tmp_path)
    held.kill()
    held.wait()
    RunLock(tmp_path).release()


def test_a_restarted_job_waits_for_what_is_left_of_it(tmp_path, held):
    threading.Timer(0.3, held.kill).start()
    RunLock(tmp_path, patience=30.0).release()
    assert held.wait() == -signal.SIGKILL


def test_a_released_lock_is_for_the_next_and_a_forked_process_does_not_release_it(tmp_path, held):
    path = tmp_path / run_lock.NAME
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(RuntimeError, match="is in use by"):
        RunLock(tmp_path)
    held.kill()
    held.wait()
    lock = RunLock(tmp_path)
    assert path.read_text().startswith(f"process {os.getpid()} on ")
    lock._process += 1  # as in a forked process
    lock.release()
    assert path.exists()
    lock._process -= 1
    lock.release()
    lock.release()
    assert not path.exists()


def test_a_lock_that_was_removed_while_it_was_opened_is_tried_again(tmp_path, monkeypatch):
    lockf, tried = run_lock.fcntl.lockf, []

    def late(descriptor, how):
        if not tried:
            (tmp_path / run_lock.NAME).unlink()  # the holder before has just released it
        tried.append(descriptor)
        lockf(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "lockf", late)
    lock = RunLock(tmp_path)
    assert len(tried) == 2
    assert (tmp_path / run_lock.NAME).read_text().startswith(f"process {os.getpid()} on ")
    lock.release()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def lockf(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match=r"without locks \(No locks available\): make sure that no other process"):
        RunLock(tmp_path).release()


def test_windows_goes_without(tmp_path):
    code = (
        "import sys\nsys.platform = 'win32'\nsys.modules['fcntl'] = None\nfrom pathlib import Path\n"
        "from calib_lightning.utils.run_lock import RunLock\nRunLock(Path(sys.argv[1])).release()"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert not list(tmp_path.iterdir())


def test_only_rank_zero_holds_it(tmp_path, held, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    assert run_folder.use_run_folder(tmp_path) == tmp_path
    monkeypatch.setenv("NODE_RANK", "0")
    with pytest.raises(RuntimeError, match="is in use by"):
        run_folder.use_run_folder(tmp_path)


def test_what_the_dead_have_left_is_removed_and_what_the_living_write_stays(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here, day = socket.gethostname(), 24 * 60 * 60
    left = {f".run.json.{here}-{child.pid}.tmp": 0, ".run.json.other-7.tmp": 2, ".run.json.7.tmp": 2}
    left |= {"stage-1-last.tmp": 2, "stage-2-best.tmp": 2}
    stay = {f".run.json.{here}-{os.getppid()}.tmp": 2, ".run.json.other-8.tmp": 0, ".run.json.8.tmp": 0}
    stay |= {"stage-3-last.tmp": 0, "notes.tmp": 2, ".notes.tmp": 2, "run.json": 2}
    for name, days in (left | stay).items():
        path = tmp_path / name
        path.write_text("half")
        os.utime(path, (time.time() - days * day,) * 2)
    remove_leftovers(tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == set(stay)
