"""``calib benchmark``: train, test and calibrate every combination of a grid, one after another."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_lightning.commands.options import parse
from calib_lightning.commands.running import one_line, reported
from calib_lightning.utils.config_search import find_config
from calib_lightning.utils.files import check_writable
from calib_lightning.utils.stopping import Stopped

if TYPE_CHECKING:
    from calib_lightning.benchmark.plan import Plan
    from calib_lightning.benchmark.record import Record

_TAKE_SECONDS = ["calib_lightning.commands.fit", "calib_lightning.commands.calibrate", "calib_lightning.predictions"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train, test and calibrate every combination of a grid, one after another, and compare them.

    All runs are checked before the first one starts. Finished runs are skipped, also those whose command was run
    elsewhere; one that was interrupted goes on where it was; one that fails is written down, and the others go on.
    A run is known by its configuration and its data: after a change in the file only what it concerns runs again.

    Args:
        file: The grid: a YAML file, or a name such as quickstart, looked up in configs/benchmark.
        output: Folder of the runs. Default: that of the file, else runs/NAME.
        dry_run: List the runs with their state, time and disk; start nothing.
        print: Print one command for each run that is left, those from which others start first; start nothing.
    """

    file: str = field(metadata={"metavar": "FILE"})
    output: Path | None = field(default=None, metadata={"metavar": "DIR"})
    dry_run: bool = False
    print: bool = False

    def __post_init__(self) -> None:
        if self.dry_run and self.print:
            raise ValueError("--dry_run and --print are both given; choose one of them")


def main(argv: Sequence[str]) -> int:
    """Run ``calib benchmark``; exit code 1 if the grid is wrong or a run failed, 2 for a wrong command line."""
    options = parse(Options, "benchmark", argv)
    return reported(lambda: _run(options))


def _run(options: Options) -> int:
    from calib_lightning.benchmark.execute import warm_up
    from calib_lightning.benchmark.grid import read_grid
    from calib_lightning.benchmark.listing import listed
    from calib_lightning.benchmark.plan import GridError, make_plan
    from calib_lightning.benchmark.record import Record

    file = find_config(options.file, "benchmark")
    if file is None:
        raise ValueError(f"FILE is {options.file!r}, which does not exist. Give a YAML file, such as quickstart.")
    grid = read_grid(file)
    out = options.output or grid.folder
    check_writable(out, "--output")
    if not (options.dry_run or options.print):
        warm_up(_TAKE_SECONDS)
    from calib_lightning.commands.fit_checked import FitChecker

    try:
        plan = make_plan(grid, FitChecker(), out)
    except GridError as error:
        for fault in error.faults:
            print(f"calib: error: {file}: {fault}", file=sys.stderr)
        print("Nothing was started.", file=sys.stderr)
        return 1
    _say_first(plan)
    if options.dry_run:
        print(listed(plan, Record(plan)))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        record = Record(plan)
        if options.print:
            return _print(plan)
        return _execute(plan, record)


def _say_first(plan: Plan) -> None:
    """Say before hours of training what nobody would see in time otherwise."""
    from calib_lightning.benchmark.folders import runs_in
    from calib_lightning.metrics.spread import FEWEST_SEEDS

    seeds, methods = {run.seed for run in plan.runs}, {run.method for run in plan.runs}
    if len(methods) > 1 and len(seeds) < FEWEST_SEEDS:
        had = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        _note(
            f"the grid has {had}, so that no difference between methods will be marked; marks need {FEWEST_SEEDS} seeds"
        )
    asked = {run.folder for run in plan.runs}
    for found in runs_in(plan.out):
        if found.path not in asked and not found.is_trained(tested=False):
            _note(f"{found.path} is unfinished and no run of this grid; remove it, unless you change the grid back")


def _note(text: str) -> None:
    print(f"calib: note: {text}", file=sys.stderr)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder of the benchmark; a second benchmark there is refused."""
    from calib_lightning.utils.run_lock import RunLock

    try:
        lock = RunLock(out)
    except RuntimeError as error:
        holder = one_line(error).partition(" is in use by ")[2].partition(";")[0]
        raise RuntimeError(
            f"The benchmark {out} is run by {holder}; it must be run by one process at a time. Wait until that one "
            "ends, or give this one another folder with --output."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _print(plan: Plan) -> int:
    from calib_lightning.benchmark.listing import printed
    from calib_lightning.benchmark.record import Record

    commands, first = printed(plan)
    record = Record(plan)
    record.write()  # with the folders that the commands name
    for command in commands:
        print(command)
    if first:
        others = f"the first {first} of {len(commands)} commands train first stages from which later commands start"
        _note(f"{others}: let them end before the rest begins")
    _note("when all have ended, run this benchmark without --print")
    return 0


def _execute(plan: Plan, record: Record) -> int:
    from calib_lightning.benchmark.execute import LOGS, execute

    record.write()
    try:
        failed = execute(plan, record, run_command, _say)
    except Stopped:
        print(f"\ncalib: {plan.out} goes on where it was when this command is given again", file=sys.stderr)
        raise
    done = len(plan.runs) - len(failed)
    if done:
        from calib_lightning.comparison import compare

        print(compare(plan.out).table())
    print(f"{done} of {len(plan.runs)} runs are finished; calib compare {plan.out} compares them again.")
    for folder, reason in failed:
        print(f"calib: error: {plan.out / folder}: {reason} (see {plan.out / LOGS / folder}.txt)", file=sys.stderr)
    return 1 if failed else 0


def _say(text: str) -> None:
    print(text, end="", flush=True)


def run_command(command: list[str], log: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run a command in a process that was started for it, which ends with its exit code.

    Args:
        command: The command as words, without ``calib``.
        log: What it prints is added to this file.
        folder: The working directory.
        environment: The environment.
    """
    if sys.platform != "win32":
        os.setsid()  # Ctrl-C goes to the benchmark, which passes it on
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    sys.argv = ["calib", *command]
    print("$", shlex.join(sys.argv), flush=True)
    sys.modules.pop("calib_lightning.__main__", None)  # runpy would warn of it
    # as `python -m calib_lightning`, which Lightning's launcher of several devices starts once more
    runpy.run_module("calib_lightning", run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    """A benchmark that was killed leaves no training behind: this process is told to stop, and saves a checkpoint."""
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
