r"""Tables as LaTeX with ``booktabs``; all text is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calib_lightning.predictions.tables import Grid

_PIECES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "·": r"$\cdot$",
    "\N{MINUS SIGN}": "$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "²": "$^{2}$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "…": r"\dots{}",
    **{char: rf"\{char}" for char in "%&_#${}"},
}
_MARKS = {"*": "*", "†": r"\dagger", "‡": r"\ddagger", "§": r"\S"}
_PIECE = re.compile(r"(?P<marks>[*†‡§]+)|(?P<minus>(?<![\w.)\]-])-(?=\d|inf))|(?P<hyphens>--+)|(?P<other>.)", re.S)


def bold(text: str) -> str:
    """Mark a cell as bold, ``**text**``, if it is not yet."""
    return f"**{text}**" if unstarred(text) is None else text


def unstarred(text: str) -> str | None:
    """The text of a cell that is marked as bold, or ``None``."""
    return text[2:-2] if len(text) > 4 and text.startswith("**") and text.endswith("**") else None


def escape(text: str) -> str:
    r"""Return text for LaTeX: no character of it is a command.

    Arrows, ``±`` and the minus of a number become mathematics, runs of the marks ``* † ‡ §`` superscripts. Letters of
    other scripts stay as they are; beyond Latin ones, they need XeLaTeX or LuaLaTeX.

    Args:
        text: Any text; line breaks and tabs become spaces.

    Returns:
        One line of LaTeX.

    Example:
        >>> escape("ECE % ↓, -0.5†")
        'ECE \\% $\\downarrow$, $-$0.5$^{\\dagger}$'
    """
    return _PIECE.sub(_piece, " ".join(text.split()))


def latex_tables(grids: Iterable[Grid], remarks: Iterable[str] = ()) -> str:
    r"""Return tables for a document that loads ``booktabs``.

    The first column is aligned to the left, all others to the right. Titles become captions, with labels
    ``tab:<title>``; a cell ``**text**`` is bold, a row of one cell a heading over the whole width. The remarks stand in
    small print below the last table.

    Args:
        grids: The tables.
        remarks: Lines below them.

    Returns:
        One ``table`` environment for each table.

    Example:
        >>> from calib_lightning.predictions.tables import Grid
        >>> print(latex_tables([Grid("Digits", ["method", "ECE %"], [["mixup", "**1.25**"]])]))
        % needs \usepackage{booktabs}
        \begin{table}
          \centering
          \caption{Digits}
          \label{tab:digits}
          \begin{tabular}{lr}
            \toprule
            method & ECE \% \\
            \midrule
            mixup & \textbf{1.25} \\
            \bottomrule
          \end{tabular}
        \end{table}
        <BLANKLINE>
    """
    blocks: list[list[str]] = []
    labels: set[str] = set()
    for grid in grids:
        blocks.append([*_named(grid.title, labels), *_tabular(grid)])
    notes = [f"{{\\footnotesize\\raggedright {escape(line)}\\par}}" for line in remarks]
    if blocks and notes:
        blocks[-1] += ["\\par\\smallskip", *notes]
    tables = ["\n".join(["\\begin{table}", *(f"  {line}" for line in block), "\\end{table}"]) for block in blocks]
    return "\n".join(["% needs \\usepackage{booktabs}", *(tables or notes), ""])


def _named(title: str, labels: set[str]) -> list[str]:
    """The first lines of a table: caption, and a label that no other table has."""
    if not title:
        return ["\\centering"]
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "table"
    label = next(name for name in _numbered(slug) if name not in labels)
    labels.add(label)
    return ["\\centering", f"\\caption{{{escape(title)}}}", f"\\label{{tab:{label}}}"]


def _numbered(name: str) -> Iterable[str]:
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _tabular(grid: Grid) -> list[str]:
    width = len(grid.header)
    lines = ["\\toprule", _row(grid.header, width), "\\midrule"]
    for row in grid.rows:
        if len(row) > 1:
            lines.append(_row(row, width))
            continue
        if lines[-1] != "\\midrule":
            lines.append("\\midrule")
        lines.append(f"\\multicolumn{{{width}}}{{l}}{{{_cell(bold(row[0]))}}} \\\\")
    lines.append("\\bottomrule")
    return [
        f"\\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        *(f"  {line}" for line in lines),
        "\\end{tabular}",
    ]


def _row(cells: Sequence[str], width: int) -> str:
    line = " & ".join(_cell(text) for text in [*cells, *[""] * (width - len(cells))])
    # after the end of a row, "[" would begin the height of the next
    return f"{'{}' if line.startswith('[') else ''}{line} \\\\"


def _cell(text: str) -> str:
    inside = unstarred(text)
    if inside is not None:
        return f"\\textbf{{{escape(inside)}}}"
    return "--" if text == "-" else escape(text)


def _piece(found: re.Match[str]) -> str:
    text = found[0]
    if found["marks"]:
        return f"$^{{{''.join(_MARKS[mark] for mark in text)}}}$"
    if found["minus"]:
        return "$-$"
    if found["hyphens"]:
        return "{}".join(text)  # two hyphens would become a dash
    return _PIECES.get(text, text)
