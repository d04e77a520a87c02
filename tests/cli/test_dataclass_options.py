"""Command lines from dataclasses: a field is an option, its docstring the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from calib_lightning.commands.options import parse


@dataclass(frozen=True, kw_only=True)
class Base:
    """How it is done.

    Args:
        size: Size of it, 50 % of the
            whole.
        kind: Kind of it.
        draws: Number of draws.

    Raises:
        ValueError: A size below 1.
    """

    size: int = 3
    kind: Literal["one", "two"] | None = None
    draws: int | None = field(default=None, metadata={"const": 100})

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be >= 1.")


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    """Does something.

    More text about it:
      kept as it stands

    Args:
        files: The files.
        more: More of them.
        once: One each time.
        bins: Some numbers.
        loud: Whether it is loud.
        where: The folder.
    """

    files: list[Path]
    more: list[Path] = field(default_factory=list)
    once: list[str] = field(default_factory=list, metadata={"once": True})
    bins: tuple[int, ...] = (15,)
    loud: bool = False
    where: Path | None = field(default=None, metadata={"metavar": "DIR"})
    draws: int | None = field(default=50, metadata={"off": True})


def read(*argv: str) -> Options:
    return parse(Options, "something", argv)


def test_types_and_defaults():
    found = read("a", "b")
    assert found == Options(files=[Path("a"), Path("b")])
    assert (found.draws, found.bins, found.size) == (50, (15,), 3)
    found = read("a", "--more", "c", "d", "--more", "e", "--bins", "10,15", "--loud", "--where", "x", "--kind", "two")
    assert found.more == [Path("c"), Path("d"), Path("e")]
    assert (found.bins, found.loud, found.where, found.kind) == ((10, 15), True, Path("x"), "two")
    assert read("--once", "1", "a", "--once", "2").once == ["1", "2"]
    assert read("a").once == []  # the list of one call is not that of the next


@pytest.mark.parametrize(
    ("argv", "draws"),
    [(("--draws", "a"), 100), (("--draws", "7", "a"), 7), (("a", "--draws"), 100), (("a", "--no_draws"), None)],
)
def test_an_option_may_stand_alone_before_a_file(argv, draws):
    found = read(*argv)
    assert (found.files, found.draws) == ([Path("a")], draws)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "required: file"),
        (("a", "--size", "0"), "size is 0; it must be >= 1."),
        (("a", "--size", "x"), "'x' is not a whole number"),
        (("a", "--bins", "1,x"), "'1,x' is not a list of whole numbers"),
        (("a", "--kind", "three"), "invalid choice: 'three'"),
        (("a", "--lod"), "unrecognized arguments: --lod; did you mean --loud?"),
        (("a", "--siz", "4"), "--siz"),
    ],
)
def test_faults_end_with_two_and_name_the_value(argv, said, capsys):
    with pytest.raises(SystemExit) as leaving:
        read(*argv)
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err.replace("FILE", "file")


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as leaving:
        read("--help")
    assert leaving.value.code == 0
    lines = capsys.readouterr().out
    text = " ".join(lines.split())
    assert "Does something. positional arguments:" in text
    assert "How it is done:" in text
    assert "Size of it, 50 % of the whole. Default: 3." in text
    assert "More text about it:\n  kept as it stands" in lines
    assert "--draws [N] Number of draws. Default: 50." in text
    assert "Raises" not in text
