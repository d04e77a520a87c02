"""Compare methods over seeds, data sets and networks: which is better, and is the difference real?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib_lightning.comparison.comparing import compare
    from calib_lightning.comparison.report import Comparison

__all__ = ["Comparison", "compare"]

_HOMES = {"comparing": ("compare",), "report": ("Comparison",)}


def __getattr__(name: str) -> Any:
    # On first use: the command imports its options from here, and torch takes seconds.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
