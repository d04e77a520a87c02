"""The commands of ``calib``: one table from which they are found, run and listed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """One command.

    Attributes:
        module: Has ``main(argv) -> int``, which gets the arguments behind the name of the command; that of the trainer
            also the name.
        line: What it does.
    """

    module: str
    line: str


TRAINER = "calib_lightning.commands.trainer"
"""The module of the commands that train and evaluate networks."""

COMMANDS = {
    "fit": Command(TRAINER, "train a network and test the checkpoint that validation chooses"),
    "validate": Command(TRAINER, "evaluate a trained network on the validation split"),
    "test": Command(TRAINER, "evaluate a trained network on every test set"),
    "predict": Command(TRAINER, "save the predictions of a trained network"),
    "benchmark": Command("calib_lightning.commands.benchmark", "train, test and calibrate every combination of a grid"),
    "compare": Command("calib_lightning.commands.compare", "compare methods over seeds: is the difference real?"),
    "score": Command("calib_lightning.commands.score", "report and compare metrics of saved predictions"),
    "calibrate": Command("calib_lightning.commands.calibrate", "fit calibrators to held-out predictions"),
    "apply": Command("calib_lightning.commands.apply", "write calibrated probabilities of rows without labels"),
    "classify": Command("calib_lightning.commands.classify", "label a folder of images with a calibrated classifier"),
    "data": Command("calib_lightning.commands.data", "list data sets, download or check one, show examples of it"),
    "list": Command("calib_lightning.commands.list", "list methods, data, networks, metrics, calibrators or configs"),
    "paper": Command("calib_lightning.commands.paper", "print or run the commands behind a published table"),
}
"""Every command, in the order of the help."""


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """Spell the names of options with underscores, as the commands know them.

    Values stay, and so does everything behind a bare ``--``.

    Args:
        arguments: A command line.

    Returns:
        The same command line.

    Example:
        >>> with_underscores(["fit", "--run-dir=runs/my-run", "--", "--not-ours"])
        ['fit', '--run_dir=runs/my-run', '--', '--not-ours']
    """
    stop = arguments.index("--") if "--" in arguments else len(arguments)
    return [_respelt(word) for word in arguments[:stop]] + list(arguments[stop:])


def _respelt(word: str) -> str:
    name, equals, value = word.partition("=")
    if not re.fullmatch(r"--[A-Za-z][\w.+-]*", name):
        return word
    return "--" + name[2:].replace("-", "_") + equals + value
