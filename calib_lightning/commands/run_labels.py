"""Short names by which the runs of a project are told apart, grouped and filtered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import WandbLogger

from calib_lightning.benchmark.record import FILE as BENCHMARK_FILE
from calib_lightning.commands.fit_folder import spelled
from calib_lightning.utils.run_folder import read_json, write_json

FILE = "wandb.json"
"""In the folder of a run: its id in Weights & Biases, and its short names."""
_BESIDE = ("logger", "callback", "data", "method")
_VARIABLES = {
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "id": "WANDB_RUN_ID",
}


def short_facts(config: Namespace, folder: Path, trained_in: Path | None = None) -> dict[str, Any]:
    """Say which pieces a run is made of, by the names that they have on the command line or in its benchmark.

    A run's own ``config.yaml`` names classes alone; where it is read again, names come from what was kept beside it.

    Args:
        config: Configuration of the command.
        folder: The run's folder.
        trained_in: Folder of the run that trained the network.

    Returns:
        Data, method, network, recipe and callbacks.
    """
    encoder = config.model.get("init_args.encoder")
    network = encoder.get("name") if isinstance(encoder, Mapping | Namespace) else encoder
    files = [Path(str(path)) for path in config.get("config") or []]
    recipe = [path.stem for path in files if path.parent.name not in _BESIDE and path.stem != "default"]
    facts = {
        "data": spelled(config.data, "DataModule"),
        "method": spelled(config.model),
        "network": network,
        "recipe": "+".join(recipe) or None,
        "callbacks": _callbacks(config),
    }
    kept = _kept(folder) or (_kept(trained_in) if trained_in is not None else {})
    for name, part in (("data", config.data), ("method", config.model)):
        if part.get("__path__") is None and kept.get("classes", {}).get(name) == part.class_path:
            facts[name] = kept["facts"][name]
    if kept and files and all((path.parent / "run.json").is_file() for path in files if path.stem != "default"):
        facts["recipe"] = kept["facts"]["recipe"]
    return facts | _in_benchmark(folder)


def label(logger: WandbLogger, config: Namespace, command: str, folder: Path, facts: Mapping[str, Any]) -> None:
    """Give a run of Weights & Biases name, group, type and tags before it starts, and the id that it had before.

    The name is ``DATA-METHOD-SEED``; the group is ``DATA-NETWORK-METHOD``, with the callbacks of the configuration
    after a ``+`` each unless the run is one of a benchmark, whose names of methods tell them apart. What the user has
    set, here or in the environment, stays.

    Args:
        logger: The logger, not yet started.
        config: Configuration of the command.
        command: The command, such as ``fit``.
        folder: The run's folder.
        facts: What `short_facts` returns.
    """
    seed = config.seed_everything
    parts = [str(facts[name]) for name in ("data", "network", "method") if facts[name]]
    name = [str(facts["data"]), str(facts["method"]), *([] if isinstance(seed, bool | None) else [str(seed)])]
    apart = [] if _in_benchmark(folder) else facts["callbacks"]
    known: dict[str, Any] = {
        "name": "-".join(name),
        "group": "+".join(["-".join(parts), *apart])[:128],
        "job_type": command,
        "tags": [tag[:64] for tag in dict.fromkeys([*parts, *facts["callbacks"]])],
        "id": id_of(folder),
    }
    arguments = logger._wandb_init
    if arguments.get("anonymous") is None:
        arguments.pop("anonymous", None)  # Lightning passes it always, and Weights & Biases warns of it
    if config.quiet:
        os.environ.setdefault("WANDB_QUIET", "true")
    for key, value in known.items():
        if arguments.get(key) is None and _VARIABLES[key] not in os.environ:
            arguments[key] = value
    logger._name, logger._id = arguments.get("name"), arguments.get("id")


def id_of(folder: Path) -> str | None:
    """Read the id that Weights & Biases has for the run in a folder.

    Args:
        folder: The run's folder.

    Returns:
        The id; None if it has none.
    """
    return _kept(folder).get("id")


def keep(logger: WandbLogger, config: Namespace, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write id and names of a started run to its folder, so that a resumed run finds them.

    Args:
        logger: The logger.
        config: Configuration of the command.
        folder: The run's folder.
        facts: What `short_facts` returns.
    """
    found = getattr(logger.experiment, "id", None)
    if isinstance(found, str):  # only the first process has a run
        classes = {"data": config.data.class_path, "method": config.model.class_path}
        write_json(folder / FILE, {"id": found, "facts": dict(facts), "classes": classes})


def _callbacks(config: Namespace) -> list[str]:
    given = config.trainer.callbacks
    return [spelled(one) for one in (given if isinstance(given, list) else [given]) if isinstance(one, Namespace)]


def _kept(folder: Path) -> dict[str, Any]:
    return read_json(folder / FILE)


def _in_benchmark(folder: Path) -> dict[str, Any]:
    """What a benchmark calls the run in a folder, or the run that was trained in the folder above."""
    for run in (folder, folder.parent):
        runs = read_json(run.parent / BENCHMARK_FILE).get("runs")
        for entry in runs if isinstance(runs, list) else ():  # others may call a file so, too
            if isinstance(entry, dict) and entry.get("folder") == run.name:
                return {name: entry[name] for name in ("data", "network", "method") if entry.get(name)}
    return {}
