"""Settings of scores and of reading files; plain data, so that commands can show their help without torch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

DEFAULT_RESAMPLES = 1000
MOST_RESAMPLES = 100_000
"""Then the ends of a 95 % interval are exact to 0.2 % of its width, and time and memory grow with their number."""
MOST_BINS = 10_000
DEFAULT_CALIBRATOR = "Temperature"
CALIBRATION_METRICS = "accuracy,nll,brier,ece,aece_split,classwise_ece,correctness_auroc,entropy"
"""The metrics that `calibrate` reports unless it is asked for others."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Metrics, bins and intervals.

    Args:
        metrics: ``core``, ``all``, or comma-separated keys; by default `score` reports all cheap ones.
        bins: Number of bins, or several numbers, for each of which binned metrics are reported, as ``ece@10``.
        intervals: Number of bootstrap resamples for intervals.
        level: Coverage of the intervals, a fraction.
        seed: Seed of resamples and permutations.

    Raises:
        ValueError: A value is not allowed.

    Example:
        >>> Settings(bins=10).bins
        (10,)
    """

    metrics: str | None = None
    bins: tuple[int, ...] = (15,)
    intervals: int | None = field(default=None, metadata={"const": DEFAULT_RESAMPLES})
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metrics is not None and not isinstance(self.metrics, str):
            object.__setattr__(self, "metrics", ",".join(self.metrics))
        bins = (self.bins,) if isinstance(self.bins, str) or not isinstance(self.bins, Iterable) else self.bins
        bins = tuple(_whole(number) for number in dict.fromkeys(bins))
        for name, value in {"bins": bins, "intervals": _whole(self.intervals), "seed": _whole(self.seed)}.items():
            object.__setattr__(self, name, value)
        if not bins or not all(_is_whole(number) and number >= 1 for number in bins):
            raise ValueError(
                f"bins is {_listed(bins)}; it must be whole numbers >= 1. Write 15, or 10,15,20 for several."
            )
        if max(bins) > MOST_BINS:
            raise ValueError(f"bins is {_listed(bins)}; it must be at most {MOST_BINS}. 15 is usual.")
        if self.intervals is not None and not (_is_whole(self.intervals) and 2 <= self.intervals <= MOST_RESAMPLES):
            raise ValueError(
                f"intervals is {self.intervals!r}; it must be a whole number >= 2 and <= {MOST_RESAMPLES}, the number "
                f"of resamples. {DEFAULT_RESAMPLES} is usual, None for no intervals."
            )
        if not 0.0 < self.level < 1.0:
            raise ValueError(f"level is {self.level!r}; it must be a fraction between 0 and 1. Write 0.95 for 95 %.")
        if not (_is_whole(self.seed) and -(2**63) <= self.seed < 2**63):
            raise ValueError(
                f"seed is {self.seed!r}; it must be a whole number from -2**63 to 2**63 - 1. Choose another."
            )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Input files.

    Args:
        input: Kind of the scores; it is never guessed. Default: logits, but scores that are probabilities by all signs
            are refused.
        scores_key: Name of the scores in .npz and .pt files. Default: ``logits`` or ``probs``.
        labels_key: Name or column of the labels. Default: ``labels``, or ``label`` in a CSV file.
        features_key: Name of the features ``(N, d)``, for calibrators that need them.
        max_gb: Limit in GB on the arrays of a compressed .npz file. Others cannot be larger than their file.
    """

    input: Literal["logits", "probs"] | None = None
    scores_key: str | None = None
    labels_key: str | None = None
    features_key: str = "features"
    max_gb: float = 1.0

    def __post_init__(self) -> None:
        if not self.max_gb > 0.0:
            raise ValueError(f"max_gb is {self.max_gb!r}; it must be a number above 0. Write 10 for 10 GB.")
        if self.input not in (None, "logits", "probs"):
            raise ValueError(f"input is {self.input!r}; it must be 'logits' or 'probs'. It says what the scores are.")

    @property
    def kind(self) -> Literal["logits", "probs"]:
        """Kind of the scores."""
        return self.input or "logits"


def keywords_of(options: Any) -> dict[str, Any]:
    """The fields of both in an object that has others too, as keyword arguments of `score` and `calibrate`."""
    return {entry.name: getattr(options, entry.name) for kind in (Settings, Reading) for entry in fields(kind)}


def parted(options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> tuple[Settings, Reading | None]:
    """Settings and, if a field of it is among them, the reading from keyword arguments of both."""
    names = {entry.name for entry in fields(Reading)}
    known = names | {entry.name for entry in fields(Settings)}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}; it must be one of {', '.join(sorted(known))}")
    reading = {name: value for name, value in options.items() if name in names}
    settings = {name: value for name, value in options.items() if name not in names}
    return Settings(**{**(defaults or {}), **settings}), Reading(**reading) if reading else None


def _whole(value: Any) -> Any:
    """A whole number of numpy as one of Python; anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(values: Sequence[Any]) -> str:
    return ",".join(map(repr, values)) or "empty"
