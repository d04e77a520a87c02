"""Whether a name is one of a few, and what comes nearest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

_CUTOFF = 0.6


def check_choice(name: str, value: object, allowed: Any) -> None:
    """Raise if an argument is none of the values of a ``Literal``.

    Args:
        name: Name of the argument.
        value: Its value.
        allowed: The ``Literal``.

    Raises:
        ValueError: If the value is not allowed.

    Example:
        >>> from typing import Literal
        >>> check_choice("unit", "day", Literal["step", "epoch"])
        Traceback (most recent call last):
        ValueError: unit is 'day'; it must be one of 'step', 'epoch'.
    """
    if value not in get_args(allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, get_args(allowed)))}.")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that a misspelt one is likely to mean.

    Args:
        name: What was written.
        known: The names of the list that it belongs to.

    Returns:
        The nearest of them, whatever its capitals, or one that begins so; ``None`` if none is near.

    Example:
        >>> nearest("cifar1O", ["cifar10", "cifar100", "digits"])
        'cifar10'
    """
    scored = [(_ratio(name.lower(), other.lower()), _ratio(name, other), other) for other in sorted(set(known))]
    near = max((entry for entry in scored if entry[0] >= _CUTOFF), default=None)
    if near is not None:
        return near[-1]
    begun = [other for *_, other in scored if len(name) > 2 and other.lower().startswith(name.lower())]
    return min(begun, key=len, default=None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask for the nearest name, for the end of an error message.

    Args:
        name: What was written.
        known: The names of the list that it belongs to.

    Returns:
        A sentence with a space before it, or nothing.

    Example:
        >>> did_you_mean("fti", ["fit", "test"])
        ' Did you mean fit?'
    """
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near}?"


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
