"""The type of a named set."""

from __future__ import annotations

from typing import Any

OtherSet = str | dict[str, Any]
"""A name of ``calib data list``, a file of that kind, or a dict of such a ``name`` and settings."""
