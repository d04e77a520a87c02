"""Averages over networks and over sets, as in Tables 2 and 3 of "MaC-Cal", of what all methods have."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from calib_lightning.metrics.families import OTHERS, families

_FIELDS = ("data", "network", "method", "calibrator", "set")


class LeftOut(NamedTuple):
    """What is left out of an average for all methods, because one of them has no value there.

    Attributes:
        table: What the methods share: data, any network, and set or family of sets.
        where: What is left out: a network, a set, or both.
        metrics: The metrics without a value.
        lacking: Methods, with their calibrators, that have no value.
    """

    table: tuple[str, ...]
    where: tuple[str, ...]
    metrics: tuple[str, ...]
    lacking: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        """One sentence."""
        names = ", ".join(_words(method) for method in self.lacking)
        return (
            f"{_words(self.table)}: {_words(self.where)} is left out of the averages of {', '.join(self.metrics)} for "
            f"all methods; no value of {names}."
        )


class Averages(NamedTuple):
    """Means of values.

    Attributes:
        fields: What a row's key names: data, network (unless averaged), method, calibrator, set or family.
        rows: The means of each row by metric; nan where nothing is left to average.
        counts: The number of values of each mean.
        left_out: What is left out of the means.
    """

    fields: tuple[str, ...]
    rows: dict[tuple[str, ...], dict[str, float]]
    counts: dict[tuple[str, ...], dict[str, int]]
    left_out: list[LeftOut]


def averages(cells: Mapping[tuple[str, ...], Mapping[str, float]], over: Collection[str]) -> Averages:
    """Average each metric over networks, over sets, or over both, with equal weights.

    Methods are compared by their means, so these are of the same networks and sets for all of them: where a method has
    no value, all do without it. Sets are averaged within their family, ``ood`` or ``shift/<name>``; its name then takes
    the place of the set's. The only set of other classes keeps its name; others without one, such as ``test``, have no
    mean.

    Args:
        cells: Values by metric for each (data, network, method, calibrator, set); a metric that is nan or not there is
            no value.
        over: ``"network"``, ``"set"`` or both.

    Returns:
        The means, the rows of a table together.

    Raises:
        ValueError: ``over`` is anything else, or a key has not five parts.

    Example:
        >>> cells = {
        ...     ("cifar10", "resnet", "mixup", "", "test"): {"ece": 0.1},
        ...     ("cifar10", "vgg", "mixup", "", "test"): {"ece": 0.3},
        ...     ("cifar10", "vgg", "focal", "", "test"): {"ece": 0.2},
        ... }
        >>> found = averages(cells, ["network"])
        >>> found.rows
        {('cifar10', 'mixup', '', 'test'): {'ece': 0.3}, ('cifar10', 'focal', '', 'test'): {'ece': 0.2}}
        >>> print(found.left_out[0])
        cifar10 test: resnet is left out of the averages of ece for all methods; no value of focal.
    """
    if not over or isinstance(over, str) or not set(over) <= {"network", "set"}:
        raise ValueError(f"over is {over!r}; it must be ['network'], ['set'] or ['network', 'set'].")
    result = Averages(_key(_FIELDS, over, "set"), {}, {}, [])
    for (data, network, name), (methods, places) in _tables(cells, over).items():
        metrics = list(dict.fromkeys(key for found in places.values() for values in found.values() for key in values))
        complete = {key: [p for p, found in places.items() if _lacking(found, methods, key) == ()] for key in metrics}
        for method in methods:
            row = _key((data, network, *method, name), over, name)
            result.counts[row] = {key: len(complete[key]) for key in metrics}
            result.rows[row] = {key: _mean([places[p][method][key] for p in complete[key]]) for key in metrics}
        table = tuple(part for part in (data, network, name) if part)
        result.left_out.extend(_left_out(table, methods, places, metrics))
    return result


_Places = dict[tuple[str, ...], dict[tuple[str, str], Mapping[str, float]]]


def _tables(
    cells: Mapping[tuple[str, ...], Mapping[str, float]], over: Collection[str]
) -> dict[tuple[str, str, str], tuple[list[tuple[str, str]], _Places]]:
    """By data, network (empty if averaged) and set or family: the methods, and their values by what is averaged."""
    for key in cells:
        if len(key) != len(_FIELDS):
            raise ValueError(f"a key is {key!r}; it must be ({', '.join(_FIELDS)}).")
    names = dict.fromkeys(key[-1] for key in cells)
    of_set = {name: name for name in names if name.startswith(f"{OTHERS}/")}  # with others of them, a family
    of_set |= {member: family.name for family in families(names) for member in family.members}
    tables: dict[tuple[str, str, str], tuple[list[tuple[str, str]], _Places]] = {}
    for (data, network, method, calibrator, name), values in cells.items():
        if "set" in over and name not in of_set:
            continue
        table = data, "" if "network" in over else network, of_set[name] if "set" in over else name
        place = *((network,) if "network" in over else ()), *((name,) if "set" in over else ())
        methods, places = tables.setdefault(table, ([], {}))
        if (method, calibrator) not in methods:
            methods.append((method, calibrator))
        places.setdefault(place, {})[method, calibrator] = values
    return tables


def _key(parts: tuple[str, ...], over: Collection[str], name: str) -> tuple[str, ...]:
    """A key of a row: without the network if it is averaged."""
    data, network, method, calibrator, _ = parts
    return data, *(() if "network" in over else (network,)), method, calibrator, name


def _lacking(
    found: Mapping[tuple[str, str], Mapping[str, float]], methods: Iterable[tuple[str, str]], key: str
) -> tuple[tuple[str, str], ...]:
    """The methods without a value of a metric."""
    return tuple(method for method in methods if math.isnan(found.get(method, {}).get(key, math.nan)))


def _left_out(
    table: tuple[str, ...], methods: list[tuple[str, str]], places: _Places, metrics: Iterable[str]
) -> Iterator[LeftOut]:
    """What is left out, the metrics that the same methods lack together."""
    for place, found in places.items():
        together: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for key in metrics:
            if lacking := _lacking(found, methods, key):
                together.setdefault(lacking, []).append(key)
        yield from (LeftOut(table, place, tuple(keys), lacking) for lacking, keys in together.items())


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _words(parts: Iterable[str]) -> str:
    return " ".join(part for part in parts if part)
