"""Command lines from dataclasses: fields are options, and the docstring of the class is the help.

The parser is argparse, not jsonargparse, which `calib fit` needs: jsonargparse does not accept several files
(``--test a.npz b.npz``), and its help and errors show Python types.
"""

from __future__ import annotations

import argparse
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from calib_lightning.utils.names import nearest

T = TypeVar("T")

_METAVARS = {Path: "FILE", int: "N", float: "X"}


def parse(options: type[T], name: str, argv: Sequence[str]) -> T:
    """Parse the arguments of a command into a dataclass; errors, also a ``ValueError`` of it, exit with code 2.

    Fields without a default are positional; ``metadata={"const": value}`` makes the value optional; bases are groups of
    options, titled by the first line of their docstring. Docstring sections after ``Args:`` are not shown.
    """
    found: T = Parser(options, name).options(argv)
    return found


class Parser(argparse.ArgumentParser):
    """The parser of a dataclass; see `parse`."""

    def __init__(self, options: type[Any], name: str) -> None:
        text, _ = _parted(options)
        description, _, epilog = text.partition("\n\n")
        super().__init__(
            f"calib {name}",
            description=" ".join(description.split()),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.made: type[Any] = options
        self.bare: dict[str, Any] = {}
        kinds = get_type_hints(options)
        lines: list[Any] = [base for base in options.__mro__ if "__dataclass_fields__" in vars(base)]
        for owner in lines:
            text, helps = _parted(owner)
            group = self if owner is options else self.add_argument_group(text.partition("\n")[0].rstrip("."))
            for entry in fields(options):
                declared = [base for base in lines if entry.name in base.__annotations__]
                if declared[-1] is owner:  # a class that only changes the default leaves the option in its group
                    metadata = [base.__dataclass_fields__[entry.name].metadata for base in reversed(declared)]
                    known = {key: value for found in metadata for key, value in found.items()}
                    self._add(group, entry, kinds[entry.name], helps.get(entry.name, ""), known)

    def options(self, argv: Sequence[str]) -> Any:
        """Parse arguments; errors exit with code 2."""
        found = vars(self.parse_args(self._spelled(argv)))
        try:
            return self.made(**found)
        except ValueError as error:
            self.error(" ".join(str(error).split()))

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and the message, with the option nearest to a misspelt one."""
        known = [word for action in self._actions for word in action.option_strings]
        unknown = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        near = [found for word in unknown if (found := nearest(word, known)) is not None]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n(all options: {self.prog} --help)\n")

    def _add(self, group: Any, entry: Field[Any], kind: Any, text: str, known: Mapping[str, Any]) -> None:
        required = entry.default is MISSING and entry.default_factory is MISSING
        default = None if required else entry.default if entry.default_factory is MISSING else entry.default_factory()
        if get_origin(kind) in (types.UnionType, Union):
            kind = next(part for part in get_args(kind) if part is not type(None))
        words = _words(kind) | {"help": text.replace("%", "%%") + _shown_default(default, text)}
        if "metavar" in known:
            words["metavar"] = known["metavar"]
        if "const" in known:
            words |= {"nargs": "?", "const": known["const"]}
            self.bare[f"--{entry.name}"] = known["const"]
        if known.get("once"):  # one value per occurrence, so that files may follow
            words = {**words, "action": "append", "nargs": None}
        if known.get("required"):  # an option although it has no default
            group.add_argument(f"--{entry.name}", required=True, **words)
        elif required:
            group.add_argument(entry.name, **words | {"action": "store"})
        elif known.get("positional"):
            group.add_argument(entry.name, nargs="?", **words)
        else:
            group.add_argument(f"--{entry.name}", default=default, **words)
        if known.get("off"):
            off = f"--no_{entry.name}"
            group.add_argument(off, dest=entry.name, action="store_const", const=None, help=f"no {entry.name}")

    def _spelled(self, argv: Sequence[str]) -> list[str]:
        """Add the value of an option without one: argparse would take a following file for it."""
        words = list(argv)
        for place, word in enumerate(argv):
            follower = argv[place + 1] if place + 1 < len(argv) else ""
            if word in self.bare and not re.fullmatch(r"-?\d+", follower):
                words[place] = f"{word}={self.bare[word]}"
        return words


def _parted(owner: type[Any]) -> tuple[str, dict[str, str]]:
    """The text before the sections of a docstring, and the help of each argument."""
    text, _, sections = (inspect.getdoc(owner) or "").partition("\n\nArgs:\n")
    listed = re.split(r"\n\n?\w+:\n", sections)[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    return text, {name: " ".join(words.replace("``", "").split()) for name, words in found}


def _words(kind: Any) -> dict[str, Any]:
    """Arguments of ``add_argument`` for a type."""
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"type": _whole_numbers, "metavar": "M[,M...]"}
    if get_origin(kind) is list:
        return _words(get_args(kind)[0]) | {"nargs": "+", "action": "extend"}
    return {"type": {int: _whole, float: _number}.get(kind, kind), "metavar": _METAVARS.get(kind, "TEXT")}


def _shown_default(default: Any, text: str) -> str:
    if default is None or default is False or default == [] or "Default:" in text:
        return ""
    return f" Default: {','.join(map(str, default)) if isinstance(default, tuple) else default}."


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 15 or 10,15,20") from None
