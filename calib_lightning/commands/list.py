"""``calib list``: what can be named on the command line, one line each."""

from __future__ import annotations

import argparse
import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from calib_lightning.utils.config_search import config_names
from calib_lightning.utils.names import did_you_mean

_FIELDS = ("Paper", "Mechanism", "Extra cost")
_METHODS = Path(__file__).resolve().parents[1] / "methods"
_BETTER = {"higher": "higher is better", "lower": "lower is better", "zero": "nearest 0 is best", "none": "describes"}


class Method(NamedTuple):
    """What the docstring of a method says.

    Attributes:
        cls: Name of its class.
        paper: Who published it.
        mechanism: What it does.
        cost: What it costs beyond cross-entropy.
    """

    cls: str
    paper: str
    mechanism: str
    cost: str


class Kind(NamedTuple):
    """Something that can be listed.

    Attributes:
        use: Where its names go.
        rows: Makes name and text of each; a heading has an empty text.
    """

    use: str
    rows: Callable[[], Iterator[tuple[str, str]]]


def main(argv: Sequence[str]) -> int:
    """Run ``calib list``.

    Args:
        argv: The arguments behind ``list``.

    Returns:
        Exit code 0; a wrong command line ends with 2.
    """
    parser = _parser()
    asked = parser.parse_args(argv)
    if asked.kind is None:
        print(_aligned([(name, kind.use) for name, kind in KINDS.items()]))
        print("\ncalib list KIND lists them.")
        return 0
    if asked.kind not in KINDS:
        near = did_you_mean(asked.kind, KINDS)
        parser.error(f"KIND is {asked.kind!r}; it must be one of {', '.join(KINDS)}.{near}")
    if asked.markdown and asked.kind != "methods":
        parser.error("only methods are written as --markdown; leave it out")
    print(
        method_table() if asked.markdown else _aligned(list(KINDS[asked.kind].rows())),
        end="" if asked.markdown else "\n",
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calib list", description="What can be named on the command line, one line each.", allow_abbrev=False
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"{', '.join(KINDS)}; without: what these are")
    parser.add_argument("--markdown", action="store_true", help="the methods as the table of docs/methods.md")
    return parser


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, text in rows if text)
    return "\n".join(f"{name:<{width}}  {text}" if text else name for name, text in rows)


def method_rows() -> dict[str, Method]:
    """Read what the docstrings of the methods say; nothing is imported, so that it is there at once.

    Each method's docstring has the lines ``Paper:``, ``Mechanism:`` and ``Extra cost:``; its name on the command line
    is that of its file.

    Returns:
        The methods by name, the baseline first.

    Raises:
        ValueError: If a docstring has one of the lines and lacks another.
    """
    found: dict[str, Method] = {}
    for path in sorted(_METHODS.glob("*.py"), key=lambda path: (path.stem != "cross_entropy", path.stem)):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                fields = _fields(node)
                if fields:
                    found[path.stem] = Method(node.name, *fields)
    return found


def _fields(node: ast.ClassDef) -> list[str]:
    lines = [line.strip() for line in (ast.get_docstring(node) or "").splitlines()]
    values = {field: [line for line in lines if line.startswith(f"{field}: ")] for field in _FIELDS}
    if not any(values.values()):
        return []
    for field, said in values.items():
        if len(said) != 1:
            raise ValueError(f"The docstring of {node.name} needs one line that begins with '{field}: '.")
    return [said[0].removeprefix(f"{field}: ").removesuffix(".") for field, said in values.items()]


def method_table() -> str:
    """Write the table of all methods as Markdown.

    Returns:
        Rows in the order of names, the baseline first.

    Example:
        >>> print(method_table().splitlines()[2])
        | `cross_entropy` | `CrossEntropy` | the baseline | none | none |
    """
    lines = ["| `--model` | class | mechanism | extra cost of a step | paper |", "|---|---|---|---|---|"]
    for name, row in method_rows().items():
        lines.append(f"| `{name}` | `{row.cls}` | {row.mechanism} | {row.cost} | {row.paper} |")
    return "\n".join(lines) + "\n"


def _methods() -> Iterator[tuple[str, str]]:
    for name, row in method_rows().items():
        yield name, row.mechanism if row.paper == "none" else f"{row.mechanism} ({row.paper})"


def _of_configs(axis: str) -> Callable[[], Iterator[tuple[str, str]]]:
    def rows() -> Iterator[tuple[str, str]]:
        for name, path in config_names(axis).items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            yield name, first.removeprefix("#").strip() if first.startswith("#") else str(path)

    return rows


def _networks() -> Iterator[tuple[str, str]]:
    import torch

    from calib_lightning.core import build_encoder, encoder_names

    with torch.device("meta"):  # counted without memory
        for name in encoder_names():
            encoder = build_encoder(name)
            millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
            yield name, f"{millions:.2f} million parameters, {encoder.num_features} features"
    yield "and every model of timm, such as resnet50.a1_in1k", ""


def _metrics() -> Iterator[tuple[str, str]]:
    from calib_lightning.metrics import METRICS, OOD, SOFT

    for name, metric in (METRICS | SOFT | OOD).items():
        yield name, f"{metric.title} ({_BETTER[metric.better]})"


def _calibrators() -> Iterator[tuple[str, str]]:
    from calib_lightning import posthoc
    from calib_lightning.posthoc import Calibrator
    from calib_lightning.posthoc.binary import BinaryCalibrator

    exported = {name: getattr(posthoc, name) for name in posthoc.__all__}
    classes = {name: item for name, item in exported.items() if isinstance(item, type) and not inspect.isabstract(item)}
    yield from _documented({name: item for name, item in classes.items() if issubclass(item, Calibrator)})
    yield "of one probability, for OneVsRest(...) and TopLabel(...):", ""
    yield from _documented({name: item for name, item in classes.items() if issubclass(item, BinaryCalibrator)})


def _documented(classes: Mapping[str, type]) -> Iterator[tuple[str, str]]:
    for name in sorted(classes):
        first = (inspect.getdoc(classes[name]) or "").partition("\n\n")[0]
        yield name, " ".join(first.replace("``", "").split())


KINDS = {
    "methods": Kind("training methods, for calib fit --model NAME", _methods),
    "data": Kind("data sets, for calib fit --data NAME", _of_configs("data")),
    "networks": Kind("networks, for calib fit --model.encoder=NAME", _networks),
    "metrics": Kind("metrics, as logs, reports and --select_on=val/NAME name them", _metrics),
    "calibrators": Kind("calibrators, for calib calibrate --calibrators NAME", _calibrators),
    "configs": Kind("recipes, callbacks, loggers and presets, for calib fit -c NAME", _of_configs("")),
}
"""What can be listed."""
