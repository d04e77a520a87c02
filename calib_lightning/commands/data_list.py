"""``calib data list``: which data there is, with sizes, licences and sources; nothing heavy is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from calib_lightning.utils.config_search import check_aliases, config_names

GENERATED = "generated"
FIELDS = ("classes", "images", "shape", "download", "licence", "home")
"""Those of a `Card`, in order."""
_MODULES = Path(__file__).resolve().parents[1] / "data"
_HEADER = ("name", "classes", "train / val / test", "image", "download", "licence", "from")
_UNKNOWN = "not stated"
_TRAINING = "to train on; their test images are images of other classes for --data.ood=[NAME]"
_SHIFTED = "the same classes in other images, for evaluation and for --data.shift=[NAME]"
_OWN = "your own files"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class Line(NamedTuple):
    """One line of the list, all text.

    Attributes:
        group: What it is for.
        name: Its name.
        classes: K.
        images: Numbers of training, validation and test images in the official files.
        image: A network's input.
        download: Size of the files.
        licence: Their licence.
        source: Home page, or where the files are.
    """

    group: str
    name: str
    classes: str
    images: str
    image: str
    download: str
    licence: str
    source: str


def data_lines() -> list[Line]:
    """Read what is known of every name that ``--data`` takes, and of generated corruptions.

    The facts are those of the class that the configuration names (its `Card`); those of MedMNIST are of its package.

    Returns:
        The lines, in the order of groups, then names.
    """
    lines = [_line(name, path) for name, path in config_names("data").items()]
    corrupted = "19 corruptions x 5 severities"
    own = "the data's"
    lines.append(Line(_SHIFTED, GENERATED, own, f"{corrupted} of test", own, "nothing", own, "computed"))
    order = (_TRAINING, _SHIFTED, _OWN)
    return sorted(lines, key=lambda line: order.index(line.group))


def data_list() -> str:
    """Write the list as aligned text.

    Returns:
        A heading and the lines of each group.
    """
    lines = data_lines()
    widths = [max(len(text) for text in column) for column in zip(_HEADER, *(line[1:] for line in lines), strict=True)]
    parts = [_aligned(_HEADER, widths)]
    for group, members in groupby(lines, key=lambda line: line.group):
        parts += ["", f"{group}:", *(_aligned(line[1:], widths) for line in members)]
    return "\n".join(parts) + "\n"


def data_table() -> str:
    """Write the list as the Markdown table of docs/data.md; names with the same facts share a row.

    Returns:
        The table.

    Example:
        >>> data_table().splitlines()[0]
        '| names | classes | train / val / test | image | download | licence | from |'
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for line in data_lines():
        rows.setdefault(line[2:], []).append(f"`{line.name}`")
    lines = [f"| {' | '.join(('names', *_HEADER[1:]))} |", "|" + "---|" * len(_HEADER)]
    lines += [f"| {' | '.join((', '.join(names), *facts))} |" for facts, names in rows.items()]
    return "\n".join(lines) + "\n"


def _aligned(words: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{word:<{width}}" for word, width in zip(words, widths, strict=True)).rstrip()


def _line(name: str, path: Path) -> Line:
    text = path.read_text(encoding="utf-8")
    check_aliases(text)
    config = yaml.safe_load(text)
    config = config if isinstance(config, dict) else {}
    card = _card(str(config.get("class_path", "")).rpartition(".")[2], config.get("init_args") or {})
    if card is None:  # a class of one's own
        return Line(_OWN, name, *(_UNKNOWN,) * 5, str(path))
    images, shape, size = card["images"], card["shape"], card["download"]
    group = _OWN if images is None else _TRAINING if images[0] else _SHIFTED
    own = "your files'"
    return Line(
        group,
        name,
        own if card["classes"] is None else f"{card['classes']:,}",
        own if images is None else " / ".join(f"{number:,}" if number else "-" for number in images),
        own if shape is None else " x ".join(map(str, shape)),
        _UNKNOWN if size is None else in_units(size),
        card["licence"],
        card["home"],
    )


def in_units(size: int) -> str:
    """Write a number of bytes with three digits.

    Args:
        size: The number.

    Returns:
        It in kB, MB or GB (powers of 1000); "nothing" for 0.

    Example:
        >>> in_units(170_498_071), in_units(4_170_000), in_units(0)
        ('170 MB', '4.17 MB', 'nothing')
    """
    for unit, name in _UNITS:
        if size >= unit:
            digits = 2 if size < 10 * unit else 1 if size < 100 * unit else 0
            return f"{size / unit:.{digits}f} {name}"
    return f"{size} bytes" if size else "nothing"


def _card(class_name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a class's card; those of MedMNIST depend on its settings."""
    if class_name == "MedMNISTDataModule":
        return _medmnist_card(str(settings.get("name", "bloodmnist")), int(settings.get("size", 28)))
    return _cards().get(class_name)


@cache
def _cards() -> dict[str, dict[str, Any]]:
    """The fields of all cards, by class: importing the classes would take seconds."""
    found = {}
    for path in sorted(_MODULES.glob("*.py")):
        for name, node in _class_values(path, "card"):
            if isinstance(node, ast.Call):
                found[name] = dict(zip(FIELDS, map(ast.literal_eval, node.args), strict=True))
    return found


@cache
def _downloads() -> dict[str, int]:
    ((_, node),) = _class_values(_MODULES / "medmnist.py", "downloads")
    sizes: dict[str, int] = ast.literal_eval(node)
    return sizes


def _class_values(path: Path, attribute: str) -> Iterator[tuple[str, ast.expr]]:
    """Class and value of every class attribute of a name in a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
            value = getattr(part, "value", None)
            if value is not None and any(getattr(target, "id", None) == attribute for target in targets):
                yield getattr(node, "name", ""), value


def _medmnist_card(name: str, size: int) -> dict[str, Any] | None:
    info = _medmnist_info().get(name)
    if info is None:
        return None
    return {
        "classes": len(info["label"]),
        "images": tuple(info["n_samples"][part] for part in ("train", "val", "test")),
        "shape": (info["n_channels"], size, size),
        "download": _downloads().get(name) if size == 28 else None,
        "licence": info["license"],
        "home": info["url"].partition("/files/")[0],
    }


@cache
def _medmnist_info() -> dict[str, Any]:
    """``medmnist.INFO``, read from its source: the package imports torch."""
    spec = find_spec("medmnist")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    source = Path(folders[0]) / "info.py" if folders else Path()
    for node in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "INFO" for target in node.targets):
            info: dict[str, Any] = ast.literal_eval(node.value)
            return info
    return {}
