"""Warn of one object once."""

from __future__ import annotations

import warnings
import weakref

_told: set[int] = set()


def warn_once(about: object, message: str, stacklevel: int = 2) -> None:
    """Warn unless there has been a warning about this object.

    Args:
        about: The object, such as a logger.
        message: What to say of it.
        stacklevel: As in `warnings.warn`.
    """
    if id(about) in _told:
        return
    _told.add(id(about))
    weakref.finalize(about, _told.discard, id(about))
    warnings.warn(message, stacklevel=stacklevel + 1)
