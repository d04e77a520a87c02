"""A checkpoint file is whole or absent, whatever happens while it is written, and cannot run code when it is read."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from calib_lightning.core import checkpoint_io
from calib_lightning.core.checkpoint_io import AtomicCheckpointIO
from tests.ddp.pool import PROCESSES

SMALL = {"state_dict": {"w": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "name": "x"}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".tmp")


def save_old(path: Path) -> bytes:
    AtomicCheckpointIO().save_checkpoint(SMALL, path)
    return path.read_bytes()


@pytest.mark.parametrize("form", [str, Path, lambda path: f"file://{path}"], ids=["str", "Path", "URL"])
def test_round_trip_leaves_one_file(form: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(SMALL, form(path))
    AtomicCheckpointIO().save_checkpoint({**SMALL, "epoch": 4}, form(path))
    loaded = AtomicCheckpointIO().load_checkpoint(form(path))
    assert (loaded["epoch"], loaded["name"]) == (4, "x")
    assert torch.equal(loaded["state_dict"]["w"], SMALL["state_dict"]["w"])
    assert [entry.name for entry in path.parent.iterdir()] == ["a.ckpt"]


def test_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    old = save_old(tmp_path / "epoch=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    AtomicCheckpointIO().save_checkpoint({**SMALL, "epoch": 9}, tmp_path / "last.ckpt")
    assert (tmp_path / "epoch=1.ckpt").read_bytes() == old
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 9


def test_the_order_is_write_sync_rename_sync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    save_old(path)
    calls: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"  # noqa: PTH112
        if kind == "file":  # everything has reached the kernel before the sync
            (temporary,) = leftovers(tmp_path)
            torch.load(tmp_path / temporary, weights_only=True)
        calls.append(f"sync {kind}")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        assert (self.parent, target, self.suffix, self.name[0]) == (tmp_path, path, ".tmp", ".")
        calls.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    AtomicCheckpointIO().save_checkpoint(SMALL, path)
    assert calls == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("room", [0, 100, 3000, 40_000])
def test_a_full_disk_says_so_and_leaves_the_older_file(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    old = save_old(path)

    class FullDisk(checkpoint_io._Sink):
        written = 0

        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.file, disk = self, self.file  # type: ignore[assignment]
            self.disk = disk

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            self.disk.close()

        def fileno(self) -> int:
            return self.disk.fileno()

        def write(self, data: Any) -> int:
            self.written += len(data)
            if self.written > room:
                self.error = self.error or OSError(errno.ENOSPC, "No space left on device")
                raise self.error
            return self.disk.write(data)

        def flush(self) -> None:
            self.disk.flush()

    monkeypatch.setattr(checkpoint_io, "_Sink", FullDisk)
    with pytest.raises(OSError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(20_000)}, path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_cannot_be_stored_and_an_interrupt_leave_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    old = save_old(path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: 0}, path)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(SMALL, path)
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "file" / "a.ckpt")


def test_leftovers_of_the_dead_go_and_those_of_others_stay(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = socket.gethostname()
    dead = tmp_path / f".epoch=1.ckpt.{here}-{child.pid}.tmp"
    alive = tmp_path / f".epoch=2.ckpt.{here}-{os.getppid()}.tmp"
    elsewhere = tmp_path / f".epoch=3.ckpt.{here}x-{child.pid}.tmp"
    users = tmp_path / "notes.tmp"
    for path in (dead, alive, elsewhere, users):
        path.write_text("half")
    assert not list(tmp_path.glob("*.ckpt"))
    AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "a.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", alive.name, elsewhere.name, users.name}


def test_other_protocols_go_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    AtomicCheckpointIO().save_checkpoint(SMALL, "memory://somewhere/a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://somewhere/a.ckpt")["epoch"] == 3


def _write_forever(folder: Path) -> None:
    write = checkpoint_io._Sink.write

    def slowly(self: checkpoint_io._Sink, data: Any) -> int:
        time.sleep(0.002)
        return write(self, data)

    checkpoint_io._Sink.write = slowly  # type: ignore[method-assign]
    for step in itertools.count():
        weights = [torch.full((1000,), float(step)) for _ in range(20)]
        AtomicCheckpointIO().save_checkpoint({"step": step, "w": weights}, folder / "last.ckpt")


def kill_in_a_write(folder: Path, wait: float) -> None:
    process = PROCESSES.Process(target=_write_forever, args=(folder,), daemon=True)
    process.start()
    end = time.monotonic() + 120
    while not ((folder / "last.ckpt").exists() and leftovers(folder)):
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(wait)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def check_newest(folder: Path) -> None:
    assert [path.name for path in folder.glob("*.ckpt")] == ["last.ckpt"]
    loaded = AtomicCheckpointIO().load_checkpoint(folder / "last.ckpt")
    assert all(torch.equal(w, torch.full((1000,), float(loaded["step"]))) for w in loaded["w"])
    AtomicCheckpointIO().save_checkpoint(SMALL, folder / "last.ckpt")
    assert leftovers(folder) == []


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    kill_in_a_write(tmp_path, 0.0)
    check_newest(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(30))
def test_kills_at_random_moments_leave_a_whole_file(trial: int, tmp_path: Path) -> None:
    kill_in_a_write(tmp_path, float(np.random.default_rng(trial).uniform(0, 1)))
    check_newest(tmp_path)


class Gadget:
    """Pickles as a call; ``what`` leaves a file when it is made."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def gadgets(trace: Path) -> dict[str, Any]:
    touch = f"import pathlib; pathlib.Path({str(trace)!r}).touch()"
    return {
        "os.system": Gadget(os.system, f"touch '{trace}'"),
        "eval": Gadget(eval, f"exec({touch!r})"),
        "subprocess": Gadget(subprocess.call, ["touch", str(trace)]),
        "numpy": Gadget(np.fromfile, str(trace.parent / "a.ckpt")),
        "path": Gadget(Path.touch, trace),
    }


class Empty(LightningModule):
    def configure_optimizers(self) -> None: ...

    def training_step(self, batch: Any) -> None: ...


@pytest.mark.parametrize("name", ["os.system", "eval", "subprocess", "numpy", "path"])
def test_payloads_never_run(name: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "a.ckpt", tmp_path / "trace"
    torch.save({"state_dict": {}, "hyper_parameters": gadgets(trace)[name]}, path)
    with pytest.raises(
        pickle.UnpicklingError, match=r"(?s)a\.ckpt is not a checkpoint of .*holds the Python object"
    ) as refused:
        AtomicCheckpointIO().load_checkpoint(path)
    trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1, plugins=[AtomicCheckpointIO()])
    with pytest.raises(pickle.UnpicklingError, match="It was not loaded"):
        trainer.fit(Empty(), [0], ckpt_path=path)
    assert not trace.exists()
    refusal = "".join(traceback.format_exception(refused.value))
    assert "weights_only" not in refusal, "torch's advice to execute the file"
    if name == "os.system":  # the payload is a real one
        torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("part", [0, 0.5, 0.999])
def test_a_truncated_file_is_named(part: float, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    whole = save_old(path)
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(RuntimeError, match=r"(?s)a\.ckpt is damaged or incomplete.*older checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_file_of_another_kind_and_a_missing_one_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("<html>404</html>")
    with pytest.raises(pickle.UnpicklingError, match=r"a\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"b\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "b.ckpt")
