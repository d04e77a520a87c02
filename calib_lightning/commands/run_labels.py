"""Short names by which the runs of a project are told apart, grouped and filtered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import WandbLogger

from calib_lightning.commands.fit_folder import default_folder, spelled
from calib_lightning.utils.files import write_text

ID_FILE = "wandb-id.txt"
_BESIDE = ("logger", "callback", "data", "method")
_VARIABLES = {
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "id": "WANDB_RUN_ID",
}


def short_facts(config: Namespace) -> dict[str, Any]:
    """Say which pieces a run is made of, by the names that they have on the command line.

    Args:
        config: Configuration of the command.

    Returns:
        Data, method, network, recipe and callbacks.
    """
    encoder = config.model.get("init_args.encoder")
    network = encoder.get("name") if isinstance(encoder, Mapping | Namespace) else encoder
    callbacks = config.trainer.callbacks
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    files = [Path(str(path)) for path in config.get("config") or []]
    recipe = [path.stem for path in files if path.parent.name not in _BESIDE and path.stem != "default"]
    return {
        "data": spelled(config.data, "DataModule"),
        "method": spelled(config.model),
        "network": network,
        "recipe": "+".join(recipe) or None,
        "callbacks": [spelled(one) for one in callbacks if isinstance(one, Namespace)],
    }


def label(logger: WandbLogger, config: Namespace, command: str, folder: Path) -> None:
    """Give a run of Weights & Biases name, group, type and tags before it starts, and the id that it had before.

    The name is that of the run's default folder, ``DATA-METHOD-SEED``; the group is ``DATA-NETWORK-METHOD``, with the
    callbacks of the configuration after a ``+`` each. What the user has set, here or in the environment, stays.

    Args:
        logger: The logger, not yet started.
        config: Configuration of the command.
        command: The command, such as ``fit``.
        folder: The run's folder.
    """
    facts = short_facts(config)
    parts = [facts[name] for name in ("data", "network", "method") if facts[name]]
    known: dict[str, Any] = {
        "name": default_folder(config).name,
        "group": "+".join(["-".join(parts), *facts["callbacks"]])[:128],
        "job_type": command,
        "tags": [tag[:64] for tag in dict.fromkeys([*parts, *facts["callbacks"]])],
        "id": id_of(folder),
    }
    arguments = logger._wandb_init
    if arguments.get("anonymous") is None:
        arguments.pop("anonymous", None)  # Lightning passes it always, and Weights & Biases warns of it
    if config.quiet:
        os.environ.setdefault("WANDB_QUIET", "true")
    for name, value in known.items():
        if arguments.get(name) is None and _VARIABLES[name] not in os.environ:
            arguments[name] = value
    logger._name, logger._id = arguments.get("name"), arguments.get("id")


def id_of(folder: Path | None) -> str | None:
    """Read the id that Weights & Biases has for the run in a folder.

    Args:
        folder: The run's folder.

    Returns:
        The id; None if it has none.
    """
    path = None if folder is None else folder / ID_FILE
    return path.read_text("utf-8").strip() or None if path is not None and path.is_file() else None


def keep_id(logger: WandbLogger, folder: Path) -> None:
    """Write the id of a started run to its folder, so that a resumed run finds it.

    Args:
        logger: The logger.
        folder: The run's folder.
    """
    found = getattr(logger.experiment, "id", None)
    if isinstance(found, str) and found != id_of(folder):
        write_text(folder / ID_FILE, f"{found}\n")
