"""A signal at any moment leaves a checkpoint from which the run ends in the same bits as if it had never stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from calib_lightning.core.checkpoint_io import AtomicCheckpointIO
from calib_lightning.core.preemption import Preempted, Preemption
from calib_lightning.core.randomness import StepSeed
from calib_lightning.utils.stopping import Stopped
from tests.ddp.pool import PROCESSES

BATCHES = 6
EPOCHS = 3


@pytest.fixture(autouse=True)
def _no_run_of_the_command_line(monkeypatch):
    monkeypatch.delenv("CALIB_RUN_FOLDER", raising=False)


class Loader:
    """Batches that are a function of (epoch, batch, rank), with a position that can be saved."""

    def __init__(self, batches: int = BATCHES, rank: int = 0) -> None:
        self.batches, self.rank, self.epoch, self.position = batches, rank, 0, 0
        self.sampler, self.batch_sampler = self, None

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        start, self.position = self.position, 0
        for batch in range(start, self.batches):
            self.position = batch + 1
            generator = torch.Generator().manual_seed(1000 * self.epoch + 10 * batch + self.rank)
            yield torch.randn(4, 3, generator=generator)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Net(LightningModule):
    """Dropout, momentum, a step-wise schedule and a sum over the epoch that is used at its end."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 1))
        self.register_buffer("in_epoch", torch.zeros(()))
        self.register_buffer("over_epochs", torch.zeros(()))
        self.pause = pause
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        self.seen.append((self.current_epoch, batch_idx))
        loss = (self.layers(batch).squeeze(1) - batch.sum(1)).square().mean()
        self.in_epoch += loss.detach()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(self.pause)

    def on_train_epoch_end(self) -> None:
        self.over_epochs.mul_(2).add_(self.in_epoch)
        self.in_epoch.zero_()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class BatchCounter(Callback):
    """Stands after `Preemption` in the user's list and changes state at the end of a batch and around an epoch."""

    def __init__(self) -> None:
        self.ends, self.starts, self.logged = 0, 0, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends += 1

    def on_train_epoch_start(self, *_: Any) -> None:
        self.starts += 1

    def state_dict(self) -> dict[str, int]:
        return {"ends": self.ends, "starts": self.starts}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.ends, self.starts = state["ends"], state["starts"]


class SignalAt(Callback):
    """Signals its own process in ``hook`` at the given global step."""

    def __init__(self, hook: str, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum, self.sent = step, signum, False
        setattr(self, hook, self._send)

    def _send(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.signum)


def fit(
    folder: Path, *extra: Callback, ckpt_path: str | Path | None = None, batches: int = BATCHES, **options: Any
) -> Any:
    seed_everything(1)
    rank = int(os.environ.get("LOCAL_RANK", 0)) if options.get("devices", 1) > 1 else 0
    module, counter = Net(options.pop("pause", 0.0)), BatchCounter()
    keeper = ModelCheckpoint(folder, save_last=True, save_top_k=1)
    options = {"max_epochs": EPOCHS, "devices": 1, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[StepSeed(), *extra, Preemption(), counter, keeper],
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    LAST.clear()
    LAST.append(module)
    trainer.fit(module, Loader(batches, rank), Loader(2, rank), ckpt_path=ckpt_path)
    counter.logged = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step that loggers see
    return module, counter


LAST: list[Net] = []  # the module of a fit that left by an exception


def state(result: tuple[Net, BatchCounter]) -> dict[str, Any]:
    module, counter = result
    return {name: value.tolist() for name, value in module.state_dict().items()} | counter.state_dict()


def all_batches(batches: int = BATCHES) -> list[tuple[int, int]]:
    return [(epoch, batch) for epoch in range(EPOCHS) for batch in range(batches)]


HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# name: (hook, global step at which the hook sends the signal, global step of the file, options)
MOMENTS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "set-up": ("on_fit_start", 0, 0, {}),
    "sanity check": ("on_validation_batch_start", 0, 0, {}),
    "first step": ("on_train_batch_start", 0, 1, {}),
    "middle": ("on_train_batch_start", 8, 9, {}),
    "last step of an epoch": ("on_train_batch_end", 6, 6, {}),
    "validation": ("on_validation_batch_start", 12, 12, {}),
    "end of an epoch": ("on_train_epoch_end", 6, 6, {}),
    "last step of all": ("on_train_batch_end", 18, 18, {}),
    "accumulation": ("on_train_batch_start", 4, 5, {"accumulate_grad_batches": 2}),
    "uneven accumulation": ("on_train_batch_start", 3, 4, {"accumulate_grad_batches": 4}),
    "before a validation in mid-epoch": ("on_train_batch_start", 7, 9, {"val_check_interval": 2}),
    "middle, limited by steps": ("on_train_batch_start", 8, 9, {"max_steps": 16, "max_epochs": -1}),
    "end of an epoch, limited by steps": ("on_train_batch_end", 12, 12, {"max_steps": 16, "max_epochs": -1}),
    "epochs of one batch": ("on_train_batch_start", 1, 2, {"batches": 1}),
    "no validation": ("on_train_batch_end", 12, 12, {"limit_val_batches": 0}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_ends_in_the_same_bits(moment: str, tmp_path: Path) -> None:
    hook, step, saved_at, options = MOMENTS[moment]
    whole = fit(tmp_path / "whole", **options)
    before = [signal.getsignal(signum) for signum in HANDLED]
    with pytest.raises(Preempted) as caught:
        fit(tmp_path / "cut", SignalAt(hook, step), **options)
    assert caught.value.code == 143
    assert caught.value.path == tmp_path / "cut" / "last.ckpt"
    assert [signal.getsignal(signum) for signum in HANDLED] == before
    first = list(LAST[0].seen)
    assert torch.load(caught.value.path, weights_only=True)["global_step"] == saved_at

    resumed = fit(tmp_path / "cut", ckpt_path="last", **options)
    assert state(resumed) == state(whole)
    if moment != "end of an epoch, limited by steps":  # there Lightning counts one logged step more after a resume
        assert resumed[1].logged == whole[1].logged
    assert first + resumed[0].seen == whole[0].seen  # each batch once: none repeated, none left out
    assert not list((tmp_path / "cut").glob("last-*"))


def test_sigusr1_saves_and_changes_nothing(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    for step in (8, 12):  # in mid-epoch, at the end of an epoch
        folder = tmp_path / str(step)
        hook = "on_train_batch_start" if step == 8 else "on_train_batch_end"
        kept: list[dict[str, Any]] = []

        class Keep(Callback):
            def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
                kept.append({"step": trainer.global_step, "epoch": checkpoint["epoch"]})  # noqa: B023

        through = fit(folder, SignalAt(hook, step, signal.SIGUSR1), Keep())
        assert state(through) == state(whole)
        assert {"step": 9, "epoch": 1} in kept if step == 8 else {"step": 12, "epoch": 2} in kept


def test_the_handlers_are_ours_in_every_hook_and_the_old_ones_afterwards(tmp_path: Path) -> None:
    seen: dict[str, bool] = {}

    class Spy(Callback):
        def _look(self, hook: str) -> None:
            handlers = [signal.getsignal(signum) for signum in HANDLED]
            seen[hook] = all(getattr(handler, "__func__", None) is Preemption._on_signal for handler in handlers)

        def on_fit_start(self, *_: Any) -> None:
            self._look("on_fit_start")

        def on_sanity_check_start(self, *_: Any) -> None:
            self._look("on_sanity_check_start")

        def on_train_start(self, *_: Any) -> None:
            self._look("on_train_start")

        def on_train_batch_start(self, *_: Any) -> None:
            self._look("on_train_batch_start")

    def mine(signum: int, frame: object) -> None:
        raise AssertionError("called although it was replaced")

    old = {signum: signal.signal(signum, mine) for signum in HANDLED}
    try:
        fit(tmp_path, Spy(), SignalAt("on_train_batch_start", 3, signal.SIGUSR1), max_epochs=1)
        assert [signal.getsignal(signum) for signum in HANDLED] == [mine] * 3
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path, Failing(), max_epochs=1)
        assert [signal.getsignal(signum) for signum in HANDLED] == [mine] * 3
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
    assert seen == dict.fromkeys(
        ("on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_batch_start"), True
    )


class Failing(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise ZeroDivisionError


def test_a_signal_after_training_reaches_the_old_handler(tmp_path: Path) -> None:
    got: list[int] = []
    old = signal.signal(signal.SIGTERM, lambda signum, frame: got.append(signum))
    try:
        fit(tmp_path, SignalAt("on_fit_end", EPOCHS * BATCHES))
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_the_second_interrupt_does_not_wait_but_an_echo_of_the_first_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("calib_lightning.utils.stopping.time.monotonic", lambda: clock[0])
    preemption = Preemption()
    preemption._on_signal(signal.SIGINT, None)
    clock[0] += 0.5
    preemption._on_signal(signal.SIGINT, None)
    clock[0] += 0.6
    with pytest.raises(Stopped) as stopped:
        preemption._on_signal(signal.SIGINT, None)
    assert stopped.value.code == 130


def test_a_late_signal_is_not_lost_where_nobody_handles_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the module's hook comes after those of all callbacks, which had agreed that there was no signal
    monkeypatch.setattr(Net, "on_train_end", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    old = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped) as stopped:
            fit(tmp_path)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, old)
    assert stopped.value.code == 143


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_an_evaluation(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    old = signal.getsignal(signum)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[SignalAt("on_validation_batch_start", 0, signum), Preemption()],
    )
    with pytest.raises(Stopped) as stopped:
        trainer.validate(Net(), Loader(2), verbose=False)
    assert stopped.value.code == code
    assert signal.getsignal(signum) == old


def test_the_file_name_is_checked() -> None:
    for name in ("a/b.ckpt", "last.pt", "../last.ckpt"):
        with pytest.raises(ValueError, match="filename is"):
            Preemption(filename=name)


# ------------------------------------------------------------------------------------- real processes, real exit codes


class Ready(Callback):
    """Tells the test, by a file that holds the process id, that training is under way."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            (self.folder / f"ready-{trainer.global_rank}").write_text(str(os.getpid()))


def _main() -> None:
    """What the launched processes run."""
    torch.set_num_threads(1)
    plan = json.loads(os.environ["PLAN"])

    folder = Path(plan["folder"])
    fit(folder, Ready(folder, 3), **plan["options"])


def start(folder: Path, **options: Any) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PLAN": json.dumps({"folder": str(folder), "options": options}), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = root
    return subprocess.Popen(
        [sys.executable, "-m", "tests.core.test_preemption"],
        env=environment,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, which can be signalled like a terminal does
    )


def wait_for_ranks(is_alive: Callable[[], bool], folder: Path, world: int) -> list[int]:
    files = [folder / f"ready-{rank}" for rank in range(world)]
    end = time.monotonic() + 120
    while not all(file.exists() and file.read_text() for file in files):
        assert is_alive(), "the process ended before its third step"
        assert time.monotonic() < end, "no rank got ready"
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def _child(folder: Path, log: Path) -> None:
    folder.mkdir()
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    fit(folder, Ready(folder, 3), pause=0.02, max_epochs=100000)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_saves_on_sigusr1_and_leaves_with_the_code_of_the_signal(
    signum: signal.Signals, code: int, tmp_path: Path
) -> None:
    folder, log, file = tmp_path / "run", tmp_path / "log", tmp_path / "run" / "last.ckpt"
    process = PROCESSES.Process(target=_child, args=(folder, log), daemon=True)
    process.start()
    try:
        (pid,) = wait_for_ranks(process.is_alive, folder, 1)
        marked = file.stat().st_mtime_ns if file.exists() else 0
        os.kill(pid, signal.SIGUSR1)
        end = time.monotonic() + 60
        while "training continues" not in log.read_text():
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        assert file.stat().st_mtime_ns > marked
        os.kill(pid, signum)
        process.join(60)
        assert process.exitcode == code, log.read_text()
    finally:
        process.kill()
    told = log.read_text()
    assert f"Resume with ckpt_path={file}" in told
    assert "Traceback" not in told

    epochs = torch.load(file, weights_only=True)["global_step"] // BATCHES + 2
    assert state(fit(folder, ckpt_path="last", max_epochs=epochs)) == state(fit(tmp_path / "w", max_epochs=epochs))


DDP_CASES = [
    pytest.param("rank 1", signal.SIGTERM, 143),
    pytest.param("group", signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param("rank 0", signal.SIGTERM, 143, marks=pytest.mark.slow),
    pytest.param("group", signal.SIGTERM, 143, marks=pytest.mark.slow),
    pytest.param("rank 0", signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param("rank 1", signal.SIGINT, 130, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("whom", "signum", "code"), DDP_CASES)
def test_two_launched_processes_leave_together(whom: str, signum: signal.Signals, code: int, tmp_path: Path) -> None:
    process = start(tmp_path, pause=0.05, max_epochs=1000, devices=2, strategy="ddp")
    pids = wait_for_ranks(lambda: process.poll() is None, tmp_path, 2)
    if whom == "group":
        os.killpg(process.pid, signum)
    else:
        os.kill(pids[int(whom[-1])], signum)
    told = process.communicate(timeout=60)[0]
    assert all(gone(pid) for pid in pids)
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert told.count("Resume with ckpt_path=") == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_random_moments(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    world, signum = draw.choice([1, 2]), draw.choice([signal.SIGTERM, signal.SIGINT])
    options = {"devices": 2, "strategy": "ddp"} if world == 2 else {}
    process = start(tmp_path, pause=0.01, max_epochs=100000, **options)
    pids = wait_for_ranks(lambda: process.poll() is None, tmp_path, world)
    time.sleep(draw.uniform(0, 2))
    for pid in draw.sample(pids, draw.randint(1, world)):
        os.kill(pid, signum)
    told = finish(process)
    assert process.returncode == 128 + signum, told
    step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert step >= 3
    if world == 1:
        epochs = step // BATCHES + 2
        resumed = fit(tmp_path, ckpt_path="last", max_epochs=epochs)
        assert state(resumed) == state(fit(tmp_path / "whole", max_epochs=epochs))


if __name__ == "__main__":
    _main()
