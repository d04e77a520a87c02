"""``benchmark.json``: the runs of a benchmark and how far each has come."""

from __future__ import annotations

from typing import Any

import calib_lightning
from calib_lightning.benchmark.plan import Plan, Run
from calib_lightning.utils.run_folder import read_json, write_json

FILE = "benchmark.json"
"""Name of the file in the folder of a benchmark."""


class Record:
    """Writes ``benchmark.json`` whenever something changes.

    Args:
        plan: The runs.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._path = plan, plan.out / FILE
        known = read_json(self._path).get("runs")
        entries = [entry for entry in known if isinstance(entry, dict)] if isinstance(known, list) else []
        before = {entry.get("identity"): entry for entry in entries}
        self._entries = {run.identity: self._entry(run, before.get(run.identity) or {}) for run in plan.runs}

    def _entry(self, run: Run, before: dict[str, Any]) -> dict[str, Any]:
        done = self._plan.done(run)
        error = None if done else before.get("error")
        seconds = before.get("seconds")
        if done and seconds is None and run.found is not None:
            seconds = round(run.found.seconds, 1)
        return {
            "folder": run.folder.relative_to(self._plan.out).as_posix(),
            "data": run.data,
            "network": run.network,
            "method": run.method,
            "seed": run.seed,
            "calibrators": self._plan.calibrators,
            "status": "finished" if done else "failed" if error else "waiting",
            "error": error,
            "identity": run.identity,
            "seconds": seconds,
            "calibration": None if run.found is None else run.found.calibration(self._plan.calibrators),
            "first_stage": None if run.owner is None else run.owner.folder.relative_to(self._plan.out).as_posix(),
        }

    def set(self, run: Run, status: str, error: str | None = None, seconds: float = 0.0) -> None:
        """Record the state of a run and write the file.

        Args:
            run: The run.
            status: ``waiting``, ``running``, ``finished`` or ``failed``.
            error: Why it failed.
            seconds: How long it has run since the last call.
        """
        known = self._entries[run.identity]
        total = (known["seconds"] or 0.0) + seconds
        self._entries[run.identity] = {
            **self._entry(run, known),
            "status": status,
            "error": error,
            "seconds": round(total, 1) if total else None,
        }
        self.write()

    def write(self) -> None:
        """Write the file."""
        content = {
            "calib_lightning": calib_lightning.__version__,
            "file": self._plan.grid.file.name,
            "baseline": self._plan.grid.baseline,
            "runs": [self._entries[run.identity] for run in self._plan.runs],
        }
        write_json(self._path, content)

    def failed(self) -> list[tuple[str, str]]:
        """Folders of the runs that have failed, and why."""
        return [(entry["folder"], entry["error"]) for entry in self._entries.values() if entry["status"] == "failed"]

    def seconds(self, run: Run) -> float | None:
        """About how long a run takes: as others of its method did, else as others on its data with its network."""
        finished = [entry for entry in self._entries.values() if entry["status"] == "finished" and entry["seconds"]]
        same = [entry for entry in finished if (entry["data"], entry["network"]) == (run.data, run.network)]
        for alike in ([entry for entry in same if entry["method"] == run.method], same):
            if alike:
                return sum(float(entry["seconds"]) for entry in alike) / len(alike)
        return None

    def mean_seconds(self) -> float:
        """How long the finished runs have taken, on average; 0 before there is one."""
        known = [float(entry["seconds"]) for entry in self._entries.values() if entry["seconds"]]
        return sum(known) / len(known) if known else 0.0
