"""``calib data list | prepare | show``: which data there is, its files, and what a network sees of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_lightning.commands.help import data_help
from calib_lightning.commands.running import FAULTS, find_own_modules, wrong
from calib_lightning.utils.config_search import resolve_configs
from calib_lightning.utils.disk import disk_message
from calib_lightning.utils.names import did_you_mean

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from lightning.pytorch import LightningDataModule

    from calib_lightning.data import BenchmarkDataModule
    from calib_lightning.data.examples import Counts

_PARTS = ("list", "prepare", "show")
_SUFFIXES = (".png", ".svg")
_MOST_CLASSES = 20
_MOST_IMAGES = 20


def main(argv: Sequence[str]) -> int:
    """Run ``calib data``; exit code 1 if files cannot be had, 2 for a wrong command line."""
    part, *words = argv or ["--help"]
    if {"-h", "--help"} & {part, *words}:
        print(data_help())
        return 0
    if part not in _PARTS:
        wrong("data", f"{part!r} must be one of {', '.join(_PARTS)}.{did_you_mean(part, _PARTS)}")
    return _list(words) if part == "list" else _with_data(part, words)


def _list(words: Sequence[str]) -> int:
    from calib_lightning.commands.data_list import data_list, data_table

    if wrong_ones := [word for word in words if word != "--markdown"]:
        near = did_you_mean(wrong_ones[0], ["--markdown"])
        wrong(
            "data list",
            f"unrecognized arguments: {' '.join(wrong_ones)}.{near} calib data show NAME shows one of them.",
        )
    print(data_table() if words else data_list(), end="")
    return 0


def _with_data(part: str, words: Sequence[str]) -> int:
    """Parse, build the data, get its files and read its sets, then print and draw."""
    if not words or words[0].startswith("-"):
        wrong(f"data {part}", f"NAME is missing: calib data {part} NAME. `calib data list` prints all names.")
    from calib_lightning.commands.hints import plain_message  # here: the parser takes seconds to import

    find_own_modules()
    try:
        parser, asked = _parsed(part, words)
        output = _output(words[0], asked) if part == "show" else None
        data = parser.instantiate_classes(asked).data
        data.prepare_data()
        data.setup("fit")
        print("\n".join(_head(words[0], data)))
        if output is not None:
            _show(data, words[0], output, asked)
        elif hasattr(data, "set_names"):
            print("\n".join(_counted(data, by_class=False)))
    except FAULTS as error:
        print(f"calib: error: {disk_message(error, '--data.root') or plain_message(str(error))}", file=sys.stderr)
        return 1
    return 0


def _parsed(part: str, words: Sequence[str]) -> tuple[Any, Namespace]:
    """The parser and what was asked for; a name that is not there is a wrong command line."""
    try:
        argv = resolve_configs(["--data", *words])
    except FileNotFoundError as error:
        wrong(f"data {part}", str(error).replace("--data is", "NAME is", 1))
    from calib_lightning.commands.fit_parser import data_parser  # here: it takes seconds to import

    parser = data_parser(f"calib data {part}")
    if part == "show":
        parser.add_argument("--output", type=str | None, default=None)
        parser.add_argument("--images", type=int, default=5)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--corruptions", type=bool, nargs="?", const=True, default=False)
    asked = parser.parse_args(argv)
    if part == "show" and not 1 <= asked.images <= _MOST_IMAGES:
        wrong("data show", f"--images is {asked.images}; it must be in 1..{_MOST_IMAGES}. 5 is usual.")
    if part == "show" and asked.output is not None and Path(asked.output).suffix.lower() not in _SUFFIXES:
        wrong("data show", f"--output is {asked.output}; its suffix must be {' or '.join(_SUFFIXES)}. Rename it.")
    return parser, asked


def _output(name: str, asked: Namespace) -> Path:
    """Where the sheet goes: a file that was asked for, else a new one here."""
    from calib_lightning.utils.files import check_output_file

    stem = Path(name).stem if Path(name).is_file() else name.rpartition(".")[2]
    path = _new(Path(f"{stem}.png")) if asked.output is None else Path(asked.output)
    check_output_file(path, "--output", [Path(name)])
    return path


def _new(wanted: Path) -> Path:
    """The file or, if it exists, a numbered one: nobody has named it, and it may be an image of the user's."""
    path, number = wanted, 1
    while path.exists() or path.is_symlink():
        number += 1
        path = wanted.with_stem(f"{wanted.stem}-{number}")
    return path


# --- what is printed -------------------------------------------------------------------------------------------------


def _head(name: str, data: LightningDataModule) -> list[str]:
    where = getattr(data, "root", None) or getattr(data, "file", None)
    return [
        f"{name}: {type(data).__name__}" + ("" if where is None else f", {where}"),
        *getattr(data, "other_notes", []),
    ]


def _facts(data: BenchmarkDataModule) -> list[str]:
    facts = data.image_facts
    numbers = {key: ", ".join(f"{value:.4g}" for value in facts[key]) for key in ("mean", "std")}
    shape = " x ".join(map(str, facts["shape"]))
    framed = ", ".join(f"{key} {facts[key]}" for key in ("crop_pct", "crop_mode", "interpolation") if key in facts)
    lines = [f"image: {shape} (channels, height, width)" + (f"; files with {framed}" if framed else "")]
    lines.append(f"normalised by mean {numbers['mean']} and std {numbers['std']}, as fractions of full brightness")
    default = type(data.split)()
    split = [f"{key}={value}" for key, value in asdict(data.split).items() if value != getattr(default, key)]
    lines.append(f"split: {', '.join(split) or 'the files as they are'}; seed {data.split.seed}")
    if "train" in data.set_names:
        area = data.crop_scale if data.frame is not None else None
        how = f"cut to {area[0]:.0%} to {area[1]:.0%} of the area" if area else "shifted by up to 4 pixels"
        lines.append(
            f"training images: {how} and mirrored, at random" if data.augment else "training images: as they are"
        )
    return lines


def _counted(data: BenchmarkDataModule, *, by_class: bool) -> list[str]:
    """A table with a column for each set; many classes are summed up."""
    from calib_lightning.data.examples import count_images

    counts = count_images(data)
    titles = [f"{name} ({len(found.names)} sets)" if len(found.names) > 1 else name for name, found in counts.items()]
    rows = [["", *titles], ["images", *(f"{found.images:,}" for found in counts.values())]]
    if by_class:
        rows += _class_rows(data, list(counts.values()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def _class_rows(data: BenchmarkDataModule, counts: Sequence[Counts]) -> Iterator[list[str]]:
    from calib_lightning.data.examples import class_name

    every = [found.by_class for found in counts]
    shown = range(data.num_classes)
    if data.num_classes > _MOST_CLASSES:
        for title, value in (("smallest class", "min"), ("median class", "median"), ("largest class", "max")):
            yield [title, *(_cell(getattr(column, value)()) for column in every)]
        shown = range(0, data.num_classes, data.num_classes - 1)
    for label in shown:
        name = class_name(data, label)
        title = name if name == str(label) else f"{label} {name}"
        yield [title, *(_cell(column[label]) for column in every)]


def _cell(count: Any) -> str:
    return f"{int(count):,}" if int(count) else "-"


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _show(data: Any, name: str, output: Path, asked: Namespace) -> None:
    """Print the facts, then draw the sheets."""
    from lightning.pytorch import seed_everything

    from calib_lightning.data import BenchmarkDataModule
    from calib_lightning.data.examples import class_examples, corruption_examples, generated_examples
    from calib_lightning.data.generated import GENERATED
    from calib_lightning.plots.saving import save_figure
    from calib_lightning.plots.sheet import image_sheet
    from calib_lightning.utils.files import check_output_file

    if not isinstance(data, BenchmarkDataModule):
        raise TypeError(
            f"{name} is {type(data).__name__}; it must be a BenchmarkDataModule to be shown. Its loaders know its sets."
        )
    print("\n".join([*_facts(data), "", *_counted(data, by_class=True), ""]))
    seed_everything(asked.seed, verbose=False)  # that of the augmentation
    sheets = {output: (class_examples(data, asked.images, asked.seed), f"{name}, {data.set_names[0]}")}
    corrupted = corruption_examples(data, asked.seed)
    if asked.corruptions and GENERATED not in corrupted:
        corrupted[GENERATED], table, missing = generated_examples(data, asked.seed)
        print(f"{GENERATED} corruptions: constants {table!r}; not the archive's images")
        for name, reason in missing.items():
            print(f"calib: note: {name} is left out: {reason}", file=sys.stderr)
    for shift, examples in corrupted.items():
        end = "corruptions" if len(corrupted) == 1 else shift
        second = output.with_stem(f"{output.stem}_{end}")
        sheets[_new(second) if asked.output is None else second] = examples, f"{shift}, by severity"
    for path in sheets:
        check_output_file(path, "--output", _files(data))
    for path, (examples, title) in sheets.items():
        save_figure(image_sheet(examples.rows, examples.columns, title=title), path)
        print(path)


def _files(data: BenchmarkDataModule) -> Iterator[Path]:
    """The files that the data reads."""
    from calib_lightning.data import FileSet

    for key in ("file", "root"):
        given = Path(getattr(data, key, ""))
        yield given
        yield from (given / name for name in getattr(data, "needed", {}))
    if folder := getattr(data, "folder", ""):
        yield from (Path(getattr(data, "root", "")) / folder).glob("*")
    for name in data.set_names:
        images = data.set_of(name)
        if isinstance(images, FileSet):
            yield from (images.image.path(place) for place in range(len(images)))
