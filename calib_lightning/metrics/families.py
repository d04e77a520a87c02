"""Evaluated sets that belong together: the corruptions and severities of one benchmark, the sets of other classes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

SEVERITIES_SHOWN = (1, 3, 5)
"""The severities that tables of a run have rows for."""
_MEMBER = re.compile(r"((?:.*[/ ])?shift/[^/]+)/(.+)_([1-5])")  # of several runs, their names precede
OTHERS = "ood"
"""Name of the family of sets of other classes."""


class Family(NamedTuple):
    """Sets that are averaged with equal weights.

    Attributes:
        name: What precedes the names of its sets, such as ``shift/cifar10_c``, or ``ood``.
        members: Name of each set with its corruption and severity; for ``ood`` its name and 0.
    """

    name: str
    members: dict[str, tuple[str, int]]

    @property
    def severities(self) -> list[int]:
        """The severities, ascending; empty for ``ood``."""
        return sorted({severity for _, severity in self.members.values()} - {0})

    def of_severity(self, severity: int) -> list[str]:
        """Names of the sets of one severity.

        Args:
            severity: 1 to 5.

        Returns:
            The names, in their order.
        """
        return [name for name, (_, found) in self.members.items() if found == severity]


def families(names: Iterable[str]) -> list[Family]:
    """Group names of sets.

    Args:
        names: Names such as ``test``, ``shift/cifar10_c/fog_3`` or ``ood/svhn``.

    Returns:
        The families, in the order of their first sets; ``shift/<name>/<corruption>_<severity>`` are one for each name,
        and two or more of ``ood/<name>`` are one. Other sets have none.

    Example:
        >>> [family.name for family in families(["test", "shift/c/fog_1", "shift/c/fog_5", "ood/a", "ood/b"])]
        ['shift/c', 'ood']
    """
    found: dict[str, dict[str, tuple[str, int]]] = {}
    for name in names:
        match = _MEMBER.fullmatch(name)
        if match is not None:
            found.setdefault(match[1], {})[name] = match[2], int(match[3])
        elif name.startswith(f"{OTHERS}/"):
            found.setdefault(OTHERS, {})[name] = name.removeprefix(f"{OTHERS}/"), 0
    return [Family(name, members) for name, members in found.items() if name != OTHERS or len(members) > 1]


def mean_values(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each value over sets, with equal weights.

    Args:
        values: The values of each set by key.

    Returns:
        The means of the keys that all sets have; nan where one of them is undefined.
    """
    keys = [key for key in values[0] if all(key in other for other in values)] if values else []
    return {key: math.fsum(found[key] for found in values) / len(values) for key in keys}


def means_of_families(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean of each value over the sets of each family, and the number of sets.

    Args:
        values: The values of each set, by its name.

    Returns:
        By the name of the family, the means and ``sets``.

    Example:
        >>> means_of_families({"shift/c/fog_1": {"ece": 0.1}, "shift/c/fog_2": {"ece": 0.3}})
        {'shift/c': {'ece': 0.2, 'sets': 2}}
    """
    return {
        family.name: mean_values([values[name] for name in family.members]) | {"sets": len(family.members)}
        for family in families(values)
    }


def values_by_severity(
    family: Family, values: Mapping[str, Mapping[str, float]]
) -> dict[int, list[Mapping[str, float]]]:
    """Values of the sets of each severity, and those of ``test`` as severity 0.

    Args:
        family: Corruptions of one benchmark.
        values: The values of each set, by its name.

    Returns:
        By severity, the values of each corruption.
    """
    found = {severity: [values[name] for name in family.of_severity(severity)] for severity in family.severities}
    return ({0: [values["test"]]} if "test" in values else {}) | found
