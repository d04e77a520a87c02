"""Random numbers of corruptions: a stream of its own for each row, whatever the batch, the process and the thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Images: TypeAlias = NDArray[np.uint8]
Streams: TypeAlias = Sequence[Generator]


def streams(seed: int, code: int, severity: int, rows: Sequence[int]) -> list[Generator]:
    """Open the streams of some rows: row i's is seeded by (seed, code of the corruption, severity, row) alone."""
    return [np.random.default_rng((seed, code, severity, row)) for row in rows]


def normal(rngs: Streams, *shape: int) -> Floats:
    """Draw standard normal numbers (B, *shape)."""
    drawn = np.empty((len(rngs), *shape), dtype=np.float32)
    for rng, out in zip(rngs, drawn, strict=True):
        rng.standard_normal(dtype=np.float32, out=out)
    return drawn


def uniform(rngs: Streams, *shape: int) -> Floats:
    """Draw numbers (B, *shape) that are uniform in [0, 1)."""
    drawn = np.empty((len(rngs), *shape), dtype=np.float32)
    for rng, out in zip(rngs, drawn, strict=True):
        rng.random(dtype=np.float32, out=out)
    return drawn


def angles(rngs: Streams, low: float, high: float) -> NDArray[np.float64]:
    """Draw one angle (B,) in degrees for each row."""
    return np.array([rng.uniform(low, high) for rng in rngs])
