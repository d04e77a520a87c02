"""Where a run of the trainer writes, and what it finds there."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from calib_lightning.benchmark.identity import OWN_FILES
from calib_lightning.utils.files import write_text
from calib_lightning.utils.run_folder import job_id, newest_config, run_of


def default_folder(config: Namespace) -> Path:
    """Name the folder of a run after its data, its method and its seed.

    Args:
        config: Configuration of the command.

    Returns:
        Such as ``runs/digits-cross_entropy-0``; of the user's own files with their name in place of that of the data.
    """
    parts = list(names_of(config))
    place = _own_place(config.data)
    if place is not None:
        name = Path(config.data.init_args[place]).resolve().name.removesuffix(".npz")
        parts[0] = re.sub(r"[^\w.+@=-]+", "_", name) or parts[0]
    seed = config.seed_everything
    if not isinstance(seed, bool | None):
        parts.append(str(seed))
    return Path("runs") / "-".join(parts)


def names_of(config: Namespace) -> tuple[str, str]:
    """Name the data and the method of a run.

    Args:
        config: Configuration of the command.

    Returns:
        Such as ``("digits", "cross_entropy")``.
    """
    return spelled(config.data, "DataModule"), spelled(config.model)


def spelled(part: Namespace, suffix: str = "") -> str:
    """Name the configuration that a part was read from, else its class in the same spelling.

    Args:
        part: Such as the configuration of the data.
        suffix: What the class's name ends in.

    Returns:
        Such as ``label_smoothing``.
    """
    path = part.get("__path__")
    if path is not None:
        return Path(str(path)).stem
    name = part.class_path.rpartition(".")[2].removesuffix(suffix)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def with_whole_paths(config: Namespace) -> Namespace:
    """Write down where the user's own files are, so that the configuration of a run works from any folder.

    Args:
        config: Configuration of the command, which is changed.

    Returns:
        It.
    """
    place = _own_place(config.data)
    if place is not None:
        config.data.init_args[place] = str(Path(config.data.init_args[place]).expanduser().resolve())
    return config


def _own_place(data: Namespace) -> str | None:
    """The setting that says where the user's own files are, if the data is theirs."""
    package, _, name = data.class_path.rpartition(".")
    place = OWN_FILES.get(name)
    return place if package == "calib_lightning.data" and data.get(f"init_args.{place}") else None


def is_numbered(folder: Path, wanted: Path) -> bool:
    """Tell whether a folder is the wanted one or one that was numbered because it existed.

    Args:
        folder: A folder.
        wanted: The folder that a run asks for.

    Returns:
        Whether it is.
    """
    return re.fullmatch(re.escape(str(wanted.resolve())) + r"(-\d+)?", str(folder.resolve())) is not None


def folder_of_restarted_job(wanted: Path, config: str) -> Path | None:
    """Find the folder that this job used before its scheduler started it again.

    An agent of torchrun that is started anew counts its restarts from 0, while the others count on. All must come to
    the same answer, so under ``--max-restarts`` a run of the same ``--rdzv-id`` that has not come to its end goes on.

    Args:
        wanted: The folder that the run asks for.
        config: Its configuration, as YAML: a job may train several runs.

    Returns:
        The newest folder of that name, perhaps numbered, that was begun by this job with this configuration; None if
        the job was not started again.
    """
    slurm, torchrun = (int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"))
    job = job_id()
    if job is None or not (slurm or torchrun):
        return None
    for path in sorted(wanted.parent.glob("*/run.json"), key=lambda path: -path.stat().st_mtime):
        record, first = json.loads(path.read_text()), path.with_name("config.yaml")
        if record.get("job") == job and is_numbered(path.parent, wanted) and first.read_text("utf-8") == config:
            return path.parent if slurm or not _is_over(record) else None
    return None


def _is_over(record: dict[str, Any]) -> bool:
    """Whether a run has been tested; a fit that has finished may have its test before it."""
    last = record["stages"][-1] if record.get("stages") else {}
    return last.get("status") == "finished" and last.get("stage") != "fit"


def checkpoint_of_run(configs: Sequence[object], command: str) -> str:
    """Find the chosen checkpoint of the run whose ``config.yaml`` was given.

    Args:
        configs: What ``-c`` was given, the last one first to be looked at.
        command: Name of the command, for the message.

    Returns:
        Path of the checkpoint.

    Raises:
        ValueError: If none of them belongs to a finished run.
    """
    for path in reversed(configs):
        run = run_of(str(path))
        if run is not None:
            chosen = json.loads((run / "run.json").read_text()).get("checkpoint", {}).get("path")
            if chosen and (run / chosen).is_file():
                return str(run / chosen)
    raise ValueError(
        f"calib {command} needs a trained network: give --ckpt_path FILE, or -c RUN/config.yaml of a finished run, "
        "whose chosen checkpoint is then used."
    )


def resume_command(folder: Path) -> str | None:
    """Name the command with which a run goes on.

    Args:
        folder: The run's folder.

    Returns:
        The command; None if the run has no checkpoint to go on from.
    """
    newest, last = newest_config(folder), folder / "checkpoints" / "last.ckpt"
    if newest is None or not last.is_file():
        return None
    return shlex.join(["calib", "fit", "-c", str(newest), "--ckpt_path", str(last)])


def save_config(text: str, folder: Path) -> None:
    """Write the configuration of a run; a resumed run keeps those that it had before.

    Args:
        text: The configuration, as YAML.
        folder: The run's folder, which gets ``config.yaml``, or ``config-2.yaml``, ... where that exists.
    """
    path, number = folder / "config.yaml", 2
    while path.exists():
        path, number = folder / f"config-{number}.yaml", number + 1
    write_text(path, text)
