"""Run what is left of a grid, one run after another, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib_lightning.benchmark.folders import remove_remains, remove_unbegun, wait_for
from calib_lightning.benchmark.plan import Plan, Run
from calib_lightning.benchmark.record import Record
from calib_lightning.utils.stopping import Stopped

LOGS = "logs"
"""Folder in that of a benchmark; what each run has printed is there."""

PATIENCE = 60.0
"""Seconds that a process of an earlier benchmark gets to save and to end."""

Work = Callable[[list[str], Path, Path, dict[str, str]], None]
"""Runs a command in a new process, given the file for what it prints, the working directory and the environment."""

_LONGEST = 500
"""Characters of the reason why a run has failed; the file of what it has printed has all."""

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def warm_up(modules: list[str]) -> None:
    """Start the process from which runs are forked: it imports what takes seconds, while this one goes on.

    Args:
        modules: Names of the modules.
    """
    if _METHOD == "forkserver":
        multiprocessing.get_context(_METHOD).set_forkserver_preload(modules)
        from multiprocessing.forkserver import ensure_running

        ensure_running()


def commands_of(plan: Plan, run: Run, start: Path | None) -> list[list[str]]:
    """The commands that are left to do for a run.

    Args:
        plan: The plan.
        run: One of its runs.
        start: The checkpoint of another run from which it begins, unless it goes on from its own.

    Returns:
        ``calib fit`` and ``calib calibrate`` as words, without ``calib``.
    """
    commands = []
    state = run.state(plan.calibrators)
    if state in ("to do", "to resume"):
        own = run.found.last if run.found is not None else None
        begin = own or start
        fit = ["fit", *run.arguments, f"--run_dir={run.folder}", "--trainer.enable_progress_bar=false"]
        commands.append(fit if begin is None else [*fit, f"--ckpt_path={begin}"])
    if plan.calibrators and state != "finished":
        names = ",".join(plan.grid.calibrators)
        commands.append(["calibrate", str(run.folder), f"--calibrators={names}", "--no_intervals"])
    return commands


def execute(plan: Plan, record: Record, work: Work, say: Callable[[str], None]) -> list[tuple[str, str]]:
    """Run everything that is not finished.

    Args:
        plan: The plan.
        record: Where it is written down.
        work: Runs one command.
        say: Prints a part of a line.

    Returns:
        Folders of the runs that failed, and why.

    Raises:
        Stopped: If this process is told to stop; the run has ended then, and goes on when the benchmark does.
    """
    remove_unbegun(plan.out)
    order = plan.order
    for number, run in enumerate(order, 1):
        try:
            _settle(plan, run)
        except RuntimeError as held:
            record.set(run, "failed", " ".join(str(held).split()))
            say(f"{number} of {len(order)}: {run.folder.name}: failed: {held}\n")
            continue
        if plan.done(run):
            record.set(run, "finished")
            continue
        say(f"{number} of {len(order)}: {run.folder.name}: log in {_log_of(plan, run)}; ")
        error, seconds = _run(plan, run, record, work)
        record.set(run, "failed" if error else "finished", error, seconds)
        say(f"failed after {duration(seconds)}: {error}" if error else duration(seconds))
        left = _left(plan, record, order[number:])
        say(f", about {duration(left)} left\n" if left else "\n")
    return record.failed()


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(12.3), duration(100), duration(7300)
        ('12 s', '1 min 40 s', '2 h 1 min')
    """
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _settle(plan: Plan, run: Run) -> None:
    """Wait for what still writes to the run, look at its folder again, and clear away what nothing goes on from."""
    plan.look()
    wait_for(run.folder, PATIENCE)
    plan.look()
    if run.found is not None and run.state(plan.calibrators) == "to do":
        remove_remains(run.folder)
        plan.look()
        if run.found is not None:  # it has files that may be wanted: the run begins anew beside it
            run.begin_beside(plan.out)


def _run(plan: Plan, run: Run, record: Record, work: Work) -> tuple[str | None, float]:
    """Run the commands of a run to their end: why they failed, and how long it took."""
    record.set(run, "running")
    log = _log_of(plan, run)
    log.parent.mkdir(exist_ok=True)
    printed = log.stat().st_size if log.is_file() else 0
    began = time.monotonic()
    try:
        code = next((code for command in commands_of(plan, run, run.start) if (code := _call(work, command, log))), 0)
    except Stopped:
        plan.look()
        record.set(run, "waiting", None, time.monotonic() - began)
        raise
    plan.look()
    error = None if code == 0 and plan.done(run) else _reason(code, log, printed)
    return error, time.monotonic() - began


def _log_of(plan: Plan, run: Run) -> Path:
    """The file of what a run prints."""
    return plan.out / LOGS / f"{run.folder.name}.txt"


def _call(work: Work, command: list[str], log: Path) -> int:
    """Run a command in a process of its own; a request to stop is passed on to it, and it saves a checkpoint."""
    context: Any = multiprocessing.get_context(_METHOD)
    process = context.Process(target=work, args=(command, log, Path.cwd(), dict(os.environ)))
    try:
        process.start()
        process.join()
    except Stopped as request:
        if process.pid is not None:
            if process.is_alive():
                os.kill(process.pid, request.code - 128)
            process.join()
        raise
    return int(process.exitcode)


def _reason(code: int, log: Path, printed: int) -> str:
    """Why a run has failed, in one line: the last error that it has printed, or how it ended."""
    if code == 0:
        return (
            "it has ended, but its folder does not hold the run that was asked for; was the package changed meanwhile?"
        )
    if code < 0 or code in (130, 143):
        name = signal.Signals(-code if code < 0 else code - 128).name
        return f"ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    with log.open("rb") as file:
        file.seek(printed)
        text = file.read().decode(errors="replace")
    said = re.split(r"(?m)^calib(?: \w+)?: error: ", text)[1:] or text.splitlines()[-1:] or [f"exit code {code}"]
    return " ".join(re.split(r"\n\(.*full traceback", said[-1])[0].split())[:_LONGEST]


def _left(plan: Plan, record: Record, rest: list[Run]) -> float:
    return sum(record.seconds(run) or record.mean_seconds() for run in rest if not plan.done(run))
