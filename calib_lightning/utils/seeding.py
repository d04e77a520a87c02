"""Counter-based randomness: every random number of a run is a function of (seed, stage, epoch or step, rank or row).

Nothing here has state, so there is no generator to save: a resumed run draws the same numbers as an uninterrupted one,
for any number of loader workers. The mixing function is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def run_seed() -> int:
    """Return the seed given to ``seed_everything``, which Lightning stores in the environment; 0 by default."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive_seed(*keys: int) -> int:
    """Mix integers such as ``(run_seed, stage, epoch)`` into a seed in ``[0, 2**63)``; order and number matter."""
    state = len(keys)
    for key in keys:
        state = (state + key + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX[0]) & _MASK
        state = ((state ^ (state >> 27)) * _MIX[1]) & _MASK
        state ^= state >> 31
    return state >> 1


def row_uniform(index: Tensor, draws: int, *, seed: int) -> Tensor:
    """Draw uniform numbers ``(N, draws)`` float64 in ``[0, 1)`` as a function of seed and row index ``(N,)`` int64.

    A row gets the same numbers in any batch, on any rank, in any worker and on any device.
    """
    offset = torch.arange(1, draws + 1, device=index.device, dtype=torch.int64)
    start = torch.tensor(_signed(derive_seed(seed)), dtype=torch.int64, device=index.device)
    # int64 arithmetic wraps around: it is modulo 2**64
    state = _mix(index.to(torch.int64) * _signed(_GOLDEN) + start).unsqueeze(1) + offset * _signed(_GOLDEN)
    bits = _shift_right(_mix(state), 11)
    return bits.to(torch.float64) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX[1])
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's ``>>`` on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
