"""Warn of one object once for each kind of fault."""

from __future__ import annotations

import warnings
import weakref

_told: set[tuple[int, str]] = set()


def warn_once(about: object, message: str, stacklevel: int = 2, kind: str = "") -> None:
    """Warn unless there has been a warning of this kind about this object.

    Args:
        about: The object, such as a logger.
        message: What to say of it.
        stacklevel: As in `warnings.warn`.
        kind: What the warning is of; an object may have one of each kind.
    """
    key = id(about), kind
    if key in _told:
        return
    _told.add(key)
    weakref.finalize(about, _told.discard, key)
    warnings.warn(message, stacklevel=stacklevel + 1)
