"""Worker processes joined in one gloo group, started once and shared by the tests of a session.

Importing torch and Lightning takes some ten seconds. One server process does it once; every worker is forked from it,
before it has threads, and lives until the end of the session, so that tests only hand functions over.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["lightning.pytorch", "numpy", "torch.distributed"])

GRACE = 2.0  # seconds that the other ranks get after one has failed: they may be waiting for it in a collective


class PoolError(RuntimeError):
    """A rank raised, died or took too long."""


class ProcessPool:
    """``world`` processes in one gloo group; ``run`` calls a function on all of them.

    A worker looks to Lightning like a process made by somebody else, so ``Trainer(accelerator="cpu", devices=world,
    strategy="ddp")`` inside it joins the group that is there, any number of times.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Return ``function(rank, world, *args)`` of every rank, in the order of ranks.

        ``function`` must be importable (top level of a module), arguments and results must pickle. After an error, a
        death or ``timeout`` seconds the workers are killed, and the next call starts new ones.
        """
        job = pickle.dumps((function, args))
        if not self._workers:
            self._start()
        try:
            for _, connection in self._workers:
                connection.send_bytes(job)
            answers = self._collect(time.monotonic() + timeout, timeout)
        except BaseException:
            self.close()
            raise
        failed = [f"rank {rank}:\n{answer}" for rank, (ok, answer) in sorted(answers.items()) if not ok]
        if failed:
            self.close()
            raise PoolError("\n".join(failed))
        return [answers[rank][1] for rank in range(self.world)]

    def close(self) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def pids(self) -> list[int]:
        return [process.pid for process, _ in self._workers]

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            ours, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(target=_work, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, deadline: float, timeout: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        rank_of = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        while len(answers) < self.world:
            pending = [connection for connection, rank in rank_of.items() if rank not in answers]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            for connection in ready:
                rank = rank_of[connection]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = self._workers[rank][0]
                    process.join(GRACE)
                    answers[rank] = (False, f"the process died, exit code {process.exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            if not ready:
                failed = any(not ok for ok, _ in answers.values())
                late = (
                    f"no answer within {GRACE} s after another rank failed" if failed else f"no answer in {timeout} s"
                )
                answers.update({rank: (False, late) for rank in rank_of.values() if rank not in answers})
        return answers


def _work(rank: int, world: int, port: int, connection: Connection) -> None:
    here = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": world, "NODE_RANK": 0, "GROUP_RANK": 0}
    here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in here.items()})
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    joined = False
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            if not joined:
                torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
                joined = True
            function, args = pickle.loads(job)
            answer = pickle.dumps((True, function(rank, world, *args)))
        except BaseException:  # SystemExit too: a worker must outlive whatever a test does
            answer = pickle.dumps((False, traceback.format_exc()))
        os.environ["WORLD_SIZE"] = str(world)  # Lightning's teardown removes it
        connection.send_bytes(answer)
