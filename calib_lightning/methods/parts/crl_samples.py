"""The samples of a training loader, of which CRL keeps a history."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
from torch import Tensor


def check_positions(data: Any, size: int) -> None:
    """Check the index that the first and last sample of a data set return."""
    for position in {0, size - 1}:
        sample = data[position]
        said = sample[2] if isinstance(sample, list | tuple) and len(sample) == 3 else None
        said = sample.get("index") if isinstance(sample, Mapping) else said
        said = said.item() if isinstance(said, Tensor) and said.ndim == 0 else said
        if isinstance(said, int | np.integer) and said != position:
            raise ValueError(
                f"Sample {position} of the training set has the index {said!r}, but CRL keeps a history of each "
                "sample. Let the data set return each sample's position in it, or no index at all."
            )


def train_size(loader: Any) -> int:
    """Number of samples that a training loader reads from."""
    source = getattr(loader, "data", None) or getattr(loader, "dataset", None)
    if not isinstance(source, Sized):
        raise TypeError(
            f"CRL keeps a history of every training sample, but the training loader, a {type(loader).__name__}, has no "
            "data set with a length. Use a single loader over a data set that has one."
        )
    return len(source)
