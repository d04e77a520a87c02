"""The index of the papers' tables, and how its commands are taken apart."""

import shlex

from calib_lightning.utils.papers import cells, read_index

from .test_configs import CONFIGS

INDEX = read_index()
CELLS = cells(INDEX)
RECIPES = sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))


def options_of(command):
    """``{"--model": [...], ...}`` of a command; what is not an option is under ""."""
    words, options = shlex.split(command), {}
    assert words.pop(0) == "calib"
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=") if word.startswith("-") else ("", "=", word)
        options.setdefault(name, []).append(value if equals else words.pop(0))
    return options


def fits():
    """Every training of the index once: command, a cell that has it."""
    return {command: found for found in CELLS for command in found.commands if command.startswith("calib fit ")}


FLSD = (
    "calib fit -c recipe/mukhoti --data cifar100_mac_cal --model flsd --model.encoder=resnet110_bottleneck "
    "--seed_everything=1 --select_on=last --run_dir=runs/mac_cal/cifar100/resnet110/flsd"
)
