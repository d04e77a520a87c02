"""Find configuration files by name: in the working directory, the clone, the package."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from calib_lightning.utils.names import nearest

_PACKAGE = Path(__file__).resolve().parents[1]

OPTION_FOLDERS = {"--data": "data", "--model": "method"}
"""Options that take the name of a configuration, and the sub-folder of ``configs`` that they are looked up in."""

_FOLDER_OF_OPTION = {"-c": "", "--config": "", **OPTION_FOLDERS}
_MOST_VALUES = 100_000
_LISTS = {"": "configs", "data": "data", "method": "methods"}


def config_folders() -> list[Path]:
    """Return the folders that are searched, in order; those that do not exist are left out."""
    # beside the package only in a clone: in an installation that folder belongs to nobody
    clone = [_PACKAGE.parent / "configs"] if (_PACKAGE.parent / "pyproject.toml").is_file() else []
    candidates = [Path.cwd() / "configs", *clone, _PACKAGE / "configs"]
    return [folder for folder in candidates if folder.is_dir()]


def find_config(name: str, axis: str = "") -> Path | None:
    """Find a configuration file by path or name.

    Args:
        name: A path, or a name such as ``quickstart`` or ``recipe/digits``, with or without ``.yaml``.
        axis: Sub-folder of ``configs`` in which a bare name is looked up first (``data``, ``method``).

    Returns:
        The file, or None if there is none.
    """
    if Path(name).is_file():
        return Path(name)
    for folder in config_folders():
        for place in (folder / axis / name, folder / name):
            for path in (place, place.with_name(f"{place.name}.yaml")):
                if path.is_file():
                    return path
    return None


def config_names(axis: str = "") -> dict[str, Path]:
    """Return the configurations that an option takes.

    Args:
        axis: Sub-folder of ``configs`` for ``--data`` or ``--model``; empty for ``-c``, which takes all others.

    Returns:
        The file of each name, in the order of names; a name in two folders is that of the first.
    """
    found: dict[str, Path] = {}
    for folder in config_folders():
        for path in (folder / axis).rglob("*.yaml"):
            found.setdefault(path.relative_to(folder / axis).with_suffix("").as_posix(), path)
    others = () if axis else (*(f"{folder}/" for folder in OPTION_FOLDERS.values()), "benchmark/", "papers")
    return {name: found[name] for name in sorted(found) if not name.startswith(others)}


def check_aliases(text: str) -> None:
    """Reject YAML whose aliases repeat each other: some lines may stand for billions of values.

    Raises:
        yaml.YAMLError: If it has more than 100,000 values.
    """
    if "*" not in text or "&" not in text:
        return
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # of a node within itself
            pairs = node.value if isinstance(node.value, list) else []
            parts = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and size(root) > _MOST_VALUES:
        raise yaml.YAMLError(
            f"with its aliases (*name) it has more than {_MOST_VALUES:,} values; it must have fewer. Write them out."
        )


def resolve_configs(argv: Sequence[str]) -> list[str]:
    """Replace names of configuration files in a command line by their paths.

    ``-c``/``--config`` must name a file; ``--data`` and ``--model`` may also be class names, which stay, and
    ``--data.help`` and ``--model.help`` get the class that a file is about.

    Args:
        argv: Arguments of the command line.

    Returns:
        The arguments with paths.

    Raises:
        FileNotFoundError: If ``-c`` names no file, or ``--data`` or ``--model`` neither a file nor what may be a class;
            the nearest name is in the message.
    """
    resolved = _data_before_its_settings(argv)
    for i, argument in enumerate(list(resolved)):
        option, equals, value = argument.partition("=")
        name = option.removesuffix(".help")
        if name not in _FOLDER_OF_OPTION or (not equals and i + 1 == len(resolved)):
            continue  # of an option without a value the parser will say so
        value = value if equals else resolved[i + 1]
        meant = _resolved(value, name)
        if option != name:
            meant = _class_in(meant)
        resolved[i if equals else i + 1] = f"{option}={meant}" if equals else meant
    return resolved


def _resolved(value: str, option: str) -> str:
    axis = _FOLDER_OF_OPTION[option]
    path = find_config(value, axis)
    if path is not None:
        return str(path)
    needs_file = not axis and not value.lstrip().startswith(("{", "["))
    if needs_file or re.fullmatch(r"[a-z0-9][\w-]*", value):  # classes begin with a capital letter
        allowed = "a file" if needs_file else "a file, a class"
        raise FileNotFoundError(
            f"{option} is {value!r}; it must be {allowed} or a name that `calib list {_LISTS[axis]}` prints."
            + _did_you_mean(value.removesuffix(".yaml"), axis)
        )
    return value


def _did_you_mean(value: str, axis: str) -> str:
    """The nearest name; people remember those of sub-folders by their last part."""
    known = {name: name for name in config_names(axis)}
    known |= {name.rpartition("/")[2]: name for name in known}
    near = nearest(value, known)
    return "" if near is None else f" Did you mean {known[near]}?"


def _class_in(value: str) -> str:
    """The class that a file is about; what is no file is the name of a class."""
    text = Path(value).read_text(encoding="utf-8") if Path(value).is_file() else ""
    found = re.search(r"(?m)^class_path: *(\S+)", text)
    return found[1] if found else value


def _data_before_its_settings(argv: Sequence[str]) -> list[str]:
    """Move every ``--data.<setting>`` behind the last ``--data NAME``, which begins the data anew."""
    names = [i for i, argument in enumerate(argv) if argument == "--data" or argument.startswith("--data=")]
    if not names:
        return list(argv)
    stop = names[-1] + (2 if argv[names[-1]] == "--data" else 1)
    kept: list[str] = []
    moved: list[str] = []
    for i, argument in enumerate(argv[:stop]):
        value = i > 0 and argv[i - 1].startswith("--data.") and "=" not in argv[i - 1] and not argument.startswith("--")
        (moved if argument.startswith("--data.") or value else kept).append(argument)
    return kept + moved + list(argv[stop:])
