"""The table of training-time methods, written from their docstrings: ``python -m calib_lightning.commands.list``."""

from __future__ import annotations

import inspect

from calib_lightning import methods
from calib_lightning.core import ClassificationModule

_FIELDS = ("Paper", "Mechanism", "Extra cost")


def method_table() -> str:
    """Write the table of all methods as Markdown.

    Each method's docstring has the lines ``Paper:``, ``Mechanism:`` and ``Extra cost:``; its name on the command line
    is that of its file.

    Returns:
        Rows in the order of names, the baseline first.

    Raises:
        ValueError: If a docstring lacks one of the lines.

    Example:
        >>> print(method_table().splitlines()[2])
        | `cross_entropy` | `CrossEntropy` | the baseline | none | none |
    """
    classes = [value for name in methods.__all__ if _is_method(value := getattr(methods, name))]
    rows = {cls.__module__.rpartition(".")[2]: _fields(cls) for cls in classes}
    lines = ["| `--model` | class | mechanism | extra cost of a step | paper |", "|---|---|---|---|---|"]
    for name in sorted(rows, key=lambda name: (name != "cross_entropy", name)):
        cls, paper, mechanism, cost = rows[name]
        lines.append(f"| `{name}` | `{cls}` | {mechanism} | {cost} | {paper} |")
    return "\n".join(lines) + "\n"


def _is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, ClassificationModule)


def _fields(cls: type) -> tuple[str, ...]:
    lines = [line.strip() for line in (inspect.getdoc(cls) or "").splitlines()]
    found = [cls.__name__]
    for field in _FIELDS:
        values = [line.removeprefix(f"{field}: ") for line in lines if line.startswith(f"{field}: ")]
        if len(values) != 1:
            raise ValueError(f"The docstring of {cls.__name__} needs one line that begins with '{field}: '.")
        found.append(values[0].removesuffix("."))
    return tuple(found)


if __name__ == "__main__":
    print(method_table(), end="")
