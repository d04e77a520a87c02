"""Errors of the parser in plain words, and the name that a misspelt one is likely to mean.

Only the name at fault is looked up, and only in the list that it belongs to: options among options, settings among
those of their class, classes among those that the option takes.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Iterable

from jsonargparse import _typehints

from calib_lightning.utils.config_search import OPTION_FOLDERS, config_names
from calib_lightning.utils.names import nearest

# What the parser says about its own types, around the sentence that says what is wrong.
_PARSER_TALK = re.compile(
    r"\s*(- )?(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Expected a <class 'NoneType'>"
    r"|Given value type: .*|Given value: ((Namespace|NestedArg)\(|\{).*|Expected a path but .* accessible or invalid|)"
)
_CALLABLE = re.compile(r"Type \S.* expects a function or a callable class: |\. Got value: Namespace\(.*\)$")
_NO_CLASS = re.compile(r"(?m)^\s*(?:- )?Expected a dot import path string: (.*)$")
_MISSING = re.compile(r"the following arguments are required: (?:\w+\.)?(model|data)\b.*")


def plain_message(message: str) -> str:
    r"""Leave out of an error what the parser says about its own types.

    Args:
        message: An error of the parser, or of a class that it could not build.

    Returns:
        What is wrong.

    Example:
        >>> plain_message("Does not validate against any of the Union subtypes\nErrors:\n  - gamma is -1")
        'gamma is -1'
    """
    message = _NO_CLASS.sub(r"\1 is neither a known class nor a file", message)
    message = _MISSING.sub(
        r"--\1 is missing; name one, or give a configuration that has it, such as -c quickstart", message
    )
    lines = [_CALLABLE.sub("", line) for line in message.splitlines()]
    lines = [line for line in lines if not _PARSER_TALK.fullmatch(line)]
    lines = [re.sub(r"^\s+- ", "", line) for line in lines]
    # the same class is looked for as itself and as one of a list
    lines = [line for i, line in enumerate(lines) if i == 0 or line.strip() != lines[i - 1].strip()]
    return "\n".join(lines) or message


def hint(message: str, parser: ArgumentParser) -> str:
    """Ask for the name that a misspelt one is likely to mean.

    Args:
        message: A plain message of the parser.
        parser: The parser that found the fault; what a parser of one class has found is a part of another message.

    Returns:
        What to add to the message; nothing where no name is at fault or none is near.
    """
    setting = re.match(r"Option '([\w.]+)' is not accepted", message)
    if setting:
        return _asked(setting[1], {action.dest.rpartition(".")[2] for action in parser._actions} - {"help"})
    unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
    if unknown:
        words = [word.partition("=")[0] for word in unknown[1].split() if word.startswith("--")]
        return "".join(_of_option(word, parser) for word in words)
    of_class = re.match(r'Parser key "([\w.]+)":\n\s*(\S+) is neither a known class', message)
    if of_class:
        return _asked(of_class[2], _values(of_class[1], parser))
    return ""


def _asked(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return "" if near is None else f"\n{name}: did you mean {near}?"


def _of_option(word: str, parser: ArgumentParser) -> str:
    """Options of the same group come first, then those of any group that end like it: --max_epochs is the trainer's."""
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    options = {option for option in options if not option.endswith((".help", "+"))}
    group, _, name = word.rpartition(".")
    near = nearest(word, {option for option in options if option.rpartition(".")[0] == group})
    if near is None:
        near = _by_end(name.removeprefix("--"), options)
    return "" if near is None else f"\n{word}: did you mean {near}?"


def _by_end(name: str, options: Iterable[str]) -> str | None:
    ends = {option.rpartition(".")[2].removeprefix("--"): option for option in sorted(options)}
    near = nearest(name, ends)
    return None if near is None else ends[near]


def _values(key: str, parser: ArgumentParser) -> set[str]:
    """Names of the classes that an option takes, and of its configurations."""
    names = set(config_names(OPTION_FOLDERS[f"--{key}"])) if f"--{key}" in OPTION_FOLDERS else set()
    for action in parser._actions:
        if action.dest == key and isinstance(action, _typehints.ActionTypeHint):
            paths = _typehints.get_all_subclass_paths(action)  # type: ignore[arg-type]  # takes an action as well
            names |= {path.rpartition(".")[2] for path in paths}
    return names
