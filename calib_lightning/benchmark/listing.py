"""A benchmark without running it: what is left to do, for how long, on how much disk, and by which commands."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from calib_lightning.benchmark.execute import commands_of, duration
from calib_lightning.benchmark.folders import size_of
from calib_lightning.benchmark.plan import Plan, Run
from calib_lightning.benchmark.record import Record

_FILES = 2
"""Checkpoints of a run, the best and the last."""

_BYTES = 8
"""Of a parameter in a checkpoint: its value and the optimiser's momentum."""


def listed(plan: Plan, record: Record) -> str:
    """List the runs with their state and time; the last lines have the sums.

    Args:
        plan: The plan.
        record: Its record, which knows how long finished runs have taken.

    Returns:
        Lines in the order in which the runs would be executed.
    """
    rows, states = [], []
    for run in plan.order:
        state = run.state(plan.calibrators)
        states.append(state)
        seconds = record.seconds(run)
        known = "unknown" if seconds is None else duration(seconds)
        shared = state == "to do" and run.owner is not None
        note = f"shares the first stage of {run.owner.folder.name}" if shared and run.owner is not None else ""
        rows.append([run.folder.name, state, known if state in ("finished", "to do") else f"up to {known}", note])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return "\n".join([*lines, f"{len(rows)} runs: {counts}.", _time(plan, record), _disk(plan)])


def _time(plan: Plan, record: Record) -> str:
    rest = [record.seconds(run) for run in plan.runs if not plan.done(run)]
    known = [seconds for seconds in rest if seconds is not None]
    if not rest:
        return "Time: nothing is left to do."
    if not known:
        return "Time: unknown until a run is finished."
    unknown = len(rest) - len(known)
    more = f", and {unknown} runs of unknown length" if unknown else ""
    return f"Time: about {duration(sum(known))} one after another{more}."


def _disk(plan: Plan) -> str:
    """What the runs that have not begun will need, from finished ones or from the number of parameters."""
    finished = [run for run in plan.runs if plan.done(run)]
    sizes = {run.identity: size_of(run.folder) for run in finished}

    def of(run: Run) -> float:
        like = [sizes[one.identity] for one in finished if (one.data, one.network) == (run.data, run.network)]
        return sum(like) / len(like) if like else float(_FILES * _BYTES * run.checked.parameters)

    needed = sum(of(run) for run in plan.runs if run.found is None)
    place = plan.out.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    enough = "" if needed < free else " That is not enough."
    return f"Disk: about {_size(needed)} more in {plan.out}; {_size(free)} are free.{enough}"


def _size(size: float) -> str:
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1000:
            return f"{size:.0f} {unit}"
    return f"{size / 1024:.1f} GiB"


def printed(plan: Plan) -> tuple[list[str], int]:
    """One shell command for each run that is left.

    Args:
        plan: The plan.

    Returns:
        The commands, and the number of those at the beginning from which later ones start.
    """
    left = [run for run in plan.order if not plan.done(run)]
    for run in left:
        if run.state(plan.calibrators) == "to do" and run.found is not None:
            run.begin_beside(plan.out)
    lines = []
    for run in left:
        commands = commands_of(plan, run, _start(run))
        lines.append(" && ".join(shlex.join(["calib", *command]) for command in commands))
    waited_for = {run.owner.identity for run in left if run.owner is not None}
    return lines, sum(run.identity in waited_for for run in left)


def _start(run: Run) -> Path | None:
    """The checkpoint from which the run starts when its owner, whose command comes before, has ended."""
    return None if run.owner is None else run.owner.folder / "checkpoints" / "last.ckpt"
