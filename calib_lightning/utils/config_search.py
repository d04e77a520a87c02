"""Find configuration files by name: in the working directory, the clone, the package."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDER_OF_OPTION = {"-c": "", "--config": "", "--data": "data", "--model": "method"}


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


def resolve_configs(argv: list[str]) -> list[str]:
    """Replace names of configuration files in a command line by their paths.

    ``-c``/``--config`` must name a file; ``--data`` and ``--model`` may also be class names, which stay.

    Args:
        argv: Arguments of the command line.

    Returns:
        The arguments with paths.

    Raises:
        FileNotFoundError: If ``-c`` names no file, or ``--data`` or ``--model`` neither a file nor what may be a class;
            the nearest names are in the message.
    """
    argv = _data_before_its_settings(argv)
    resolved = list(argv)
    for i, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option not in _FOLDER_OF_OPTION:
            continue
        if not equals and i + 1 == len(argv):
            continue  # the parser will say that the value is missing
        value = value if equals else argv[i + 1]
        path = find_config(value, _FOLDER_OF_OPTION[option])
        if path is not None:
            resolved[i if equals else i + 1] = f"{option}={path}" if equals else str(path)
        elif option in ("-c", "--config") and not value.lstrip().startswith(("{", "[")):
            raise FileNotFoundError(_not_found(value))
        elif re.fullmatch(r"[a-z0-9_]+", value):  # a name of a file; classes begin with a capital letter
            raise FileNotFoundError(_not_among(value, option))
    return resolved


def _data_before_its_settings(argv: list[str]) -> list[str]:
    """Move every ``--data.<setting>`` behind the last ``--data NAME``, which begins the data anew."""
    names = [i for i, argument in enumerate(argv) if argument == "--data" or argument.startswith("--data=")]
    if not names:
        return argv
    stop = names[-1] + (2 if argv[names[-1]] == "--data" else 1)
    kept: list[str] = []
    moved: list[str] = []
    for i, argument in enumerate(argv[:stop]):
        value = i > 0 and argv[i - 1].startswith("--data.") and "=" not in argv[i - 1] and not argument.startswith("--")
        (moved if argument.startswith("--data.") or value else kept).append(argument)
    return kept + moved + argv[stop:]


def _not_among(name: str, option: str) -> str:
    axis = _FOLDER_OF_OPTION[option]
    known = sorted({path.stem for folder in config_folders() for path in (folder / axis).glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{option} is {name!r}; it must be one of {', '.join(known)}, a file or a class.{hint}"


def _not_found(name: str) -> str:
    known = sorted(
        {
            path.relative_to(folder).with_suffix("").as_posix()
            for folder in config_folders()
            for path in folder.rglob("*.yaml")
        }
    )
    wanted = name.removesuffix(".yaml")
    short = {entry.rpartition("/")[2]: entry for entry in known}
    near = difflib.get_close_matches(wanted, known, n=3) or [
        short[entry] for entry in difflib.get_close_matches(wanted, list(short), n=3)
    ]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"There is no configuration file {name!r}, as a path or among the shipped ones ({', '.join(known)}).{hint}"
