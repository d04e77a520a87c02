"""What is to be done for a grid: its runs, checked, found again by content, and which share their first stage."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calib_lightning.benchmark.folders import Found, best_of, free_name, runs_in
from calib_lightning.benchmark.grid import Asked, Grid
from calib_lightning.benchmark.identity import content_of, digest, first_stage
from calib_lightning.utils.names import did_you_mean

State = Literal["finished", "to calibrate", "to resume", "to do"]


@dataclass(frozen=True)
class Checked:
    """What a command line of ``calib fit`` means.

    Args:
        config: The resolved configuration.
        splits: Hash of the splits of the data; None for data that has none.
        data: Name of the data.
        method: Name of the method.
        network: Name of the network.
        tested: Whether a test follows the training.
        held_out: Whether there is a calibration split.
        parameters: Number of the network's parameters.
    """

    config: dict[str, Any]
    splits: str | None
    data: str
    method: str
    network: str
    tested: bool
    held_out: bool
    parameters: int


Check = Callable[[list[str]], Checked]
"""Says what follows from the arguments of ``calib fit``; a ``ValueError`` says why they are impossible."""


class GridError(ValueError):
    """Some runs of a grid are impossible.

    Args:
        faults: One line for each fault.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


@dataclass
class Run:
    """A run of the grid, with the folder that it has or will have.

    Attributes:
        name: Name of its folder, before a number.
        data: Label of the data.
        network: Label of the network.
        method: Label of the method.
        seed: Seed.
        arguments: Command line of ``calib fit`` but for folder and checkpoint.
        checked: What the command line means.
        content: Hash of the configuration, see `content_of`.
        identity: Hash of configuration and splits.
        owner: The run that trains the same first stage.
        folder: Its folder.
        found: The folder as it is on disk; None if the run has not begun.
    """

    name: str
    data: str
    network: str
    method: str
    seed: int
    arguments: list[str]
    checked: Checked
    content: str
    identity: str
    owner: Run | None = field(default=None, repr=False)
    folder: Path = Path()
    found: Found | None = None

    def look(self, out: Path, every: Iterable[Found]) -> None:
        """Find the folder of the run among those on disk; without one a new name is chosen."""
        mine = [one for one in every if one.holds(self.content, self.checked.splits)]
        self.found = best_of(mine, self.checked.tested)
        self.folder = free_name(out, self.name) if self.found is None else self.found.path

    def begin_beside(self, out: Path) -> None:
        """Take a new folder, whatever is in the one that was found."""
        self.found, self.folder = None, free_name(out, self.name)

    def state(self, calibrators: Sequence[str]) -> State:
        """How far the run has come."""
        if self.found is None or not (self.found.is_trained(self.checked.tested) or self.found.last):
            return "to do"
        if not self.found.is_trained(self.checked.tested):
            return "to resume"
        return "to calibrate" if calibrators and self.found.calibration(calibrators) is None else "finished"

    @property
    def start(self) -> Path | None:
        """The checkpoint of another run at the end of the first stage, if it is there."""
        if self.owner is None or self.owner.found is None or not self.owner.found.is_trained(tested=False):
            return None
        return self.owner.found.last


@dataclass(frozen=True)
class Plan:
    """The runs of a grid.

    Args:
        grid: The grid.
        out: Folder of the benchmark.
        runs: The runs, in the order of the file.
        calibrators: Names of the calibrators.
    """

    grid: Grid
    out: Path
    runs: list[Run]
    calibrators: list[str]

    def look(self) -> None:
        """Look again at what is on disk."""
        every = runs_in(self.out)
        for run in self.runs:
            run.look(self.out, every)

    @property
    def order(self) -> list[Run]:
        """The runs as they are executed: those from which others start come first."""
        owners = {run.owner.identity for run in self.runs if run.owner is not None}
        return sorted(self.runs, key=lambda run: (run.identity not in owners, run.owner is not None))

    def done(self, run: Run) -> bool:
        """Whether nothing is left to do for a run."""
        return run.state(self.calibrators) == "finished"


def make_plan(grid: Grid, check: Check, out: Path) -> Plan:
    """Check every run of a grid and find out what is left to do.

    Args:
        grid: The grid.
        check: Checks the command line of a run; called once for all seeds.
        out: Folder of the benchmark, which need not exist.

    Returns:
        The plan.

    Raises:
        GridError: If something is wrong; all faults of all runs are in it.
    """
    faults: dict[str, list[str]] = {}
    calibrators = _calibrators(grid, faults)
    checked: dict[tuple[str, ...], Checked | None] = {}
    runs: list[Run] = []
    for asked in grid.runs:
        if asked.arguments not in checked:
            try:
                checked[asked.arguments] = check([*asked.arguments, f"--seed_everything={asked.seed}"])
            except ValueError as error:
                checked[asked.arguments] = None
                faults.setdefault(" ".join(str(error).split()), []).append(_known_name(asked))
        found = checked[asked.arguments]
        if found is not None:
            runs.append(_run(asked, found))
    _check_names(grid, runs, faults)
    untested = sorted({run.name for run in runs if not run.checked.tested})
    if untested:
        faults["nothing is tested, so there is nothing to compare; the data needs a test set."] = untested
    without = sorted({run.data for run in runs if not run.checked.held_out})
    if calibrators and without:
        faults["calibrators need a calibration split; set data.split.calibration to a size above 0."] = without
    if faults:
        raise GridError([f"{', '.join(dict.fromkeys(names))}: {fault}" for fault, names in faults.items()])
    _share_first_stages(runs)
    plan = Plan(grid, out, runs, calibrators)
    plan.look()
    return plan


def _calibrators(grid: Grid, faults: dict[str, list[str]]) -> list[str]:
    """Names of the calibrators, as reports have them."""
    from calib_lightning.predictions.calibrating import named_calibrators  # it takes seconds

    if not grid.calibrators:
        return []
    try:
        return [calibrator.name for calibrator in named_calibrators(list(grid.calibrators))]
    except (ValueError, TypeError) as error:
        faults.setdefault(" ".join(str(error).split()), []).append("calibrators")
        return []


def _known_name(asked: Asked) -> str:
    """The name of a run of which only the file is known."""
    return "-".join(part for part in (asked.data, asked.network, asked.method, asked.recipe) if part) or "every run"


def _run(asked: Asked, checked: Checked) -> Run:
    config = copy.deepcopy(checked.config) | {"seed_everything": asked.seed}
    content = content_of(config)
    method = asked.method or checked.method
    if asked.recipe is not None:
        method = f"{method}@{asked.recipe}"
    parts = (asked.data or checked.data, asked.network or checked.network, method)
    name = "-".join(re.sub(r"[^\w.+@=-]+", "_", part) for part in parts)
    return Run(
        name=f"{name}-{asked.seed}",
        data=parts[0],
        network=parts[1],
        method=method,
        seed=asked.seed,
        arguments=[*asked.arguments, f"--seed_everything={asked.seed}"],
        checked=checked,
        content=digest(content),
        identity=digest(content, checked.splits),
    )


def _check_names(grid: Grid, runs: list[Run], faults: dict[str, list[str]]) -> None:
    seen: dict[str, Run] = {}
    for run in runs:
        if seen.setdefault(run.name, run) is not run:
            faults.setdefault("two runs have this name; give one of them another with as: NAME.", []).append(run.name)
    same: dict[str, Run] = {}
    for run in runs:
        first = same.setdefault(run.identity, run)
        if first is not run and first.name != run.name:
            what = f"it is the same run as {first.name}; each must be there once. Leave one entry out."
            faults.setdefault(what, []).append(run.name)
    methods = list(dict.fromkeys(run.method for run in runs))
    if grid.baseline is not None and grid.baseline not in methods and not faults:
        near = did_you_mean(grid.baseline, methods)
        faults[f"it is {grid.baseline!r}; it must be one of {', '.join(methods)}.{near}"] = ["baseline"]


def _share_first_stages(runs: list[Run]) -> None:
    """Let every run with a later stage start from the run whose whole training is its first stage."""
    owners: dict[str, Run] = {}
    staged: list[tuple[str, Run]] = []
    for run in runs:
        found = first_stage(content_of(run.checked.config | {"seed_everything": run.seed}))
        if found is None:
            continue
        key = digest(found[0], run.checked.splits)
        if found[1]:
            staged.append((key, run))
        else:
            owners.setdefault(key, run)
    for key, run in staged:
        run.owner = owners.get(key)
