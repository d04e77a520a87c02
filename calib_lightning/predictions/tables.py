"""Reports as tables, for a terminal, in Markdown or LaTeX, and as JSON."""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calib_lightning.metrics import METRICS, OOD, SOFT, MetricRow
from calib_lightning.predictions.latex import bold, latex_tables, unstarred
from calib_lightning.predictions.settings import Settings
from calib_lightning.predictions.values import Values

MOST_COLUMNS = 8
"""With more metrics, rows are metrics."""

_SIDE_BY_SIDE = 4
_WIDE = 1000
_ARROWS = {"higher": " ↑", "lower": " ↓", "zero": " →0", "none": ""}


class Grid(NamedTuple):
    """A table of text: title, column titles and cells; the first column has names, a row of one cell is a heading.

    A cell ``**text**`` is bold: Markdown has it as it is, a terminal and LaTeX show bold text without the stars, plain
    text keeps one star on each side.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


class Entry(NamedTuple):
    """A name, the cells before the values, and the values."""

    name: str
    cells: list[str]
    values: Values


class Report(ABC):
    """A result as tables, Markdown, LaTeX and JSON; ``notes`` are remarks on the values."""

    notes: list[str]

    def __repr__(self) -> str:
        return self.table()

    @abstractmethod
    def grids(self) -> Iterator[Grid]:
        """The tables."""

    @abstractmethod
    def remarks(self) -> Iterator[str]:
        """Lines below the tables."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """The report as plain data."""

    def table(self, console: Console | None = None) -> str:
        """Draw the tables and the remarks below them.

        Args:
            console: Terminal to print to; without one, the text is as wide as needed.

        Returns:
            The text, or an empty string if it was printed.
        """
        buffer, plain = io.StringIO(), console is None
        console = console or Console(file=buffer, width=_WIDE)
        for grid in self.grids():
            drawn = Table(title=Text(grid.title, style="italic"), title_justify="left")
            for place, title in enumerate(grid.header):
                drawn.add_column(Text(title), justify="right" if place else "left", overflow="fold")
            for row in grid.rows:
                if len(row) == 1:
                    drawn.add_section()
                    drawn.add_row(_drawn(bold(row[0])))
                else:
                    drawn.add_row(*(_drawn(text, plain) for text in row))
            console.print(drawn)
        for line in self.remarks():
            console.print(Text(line), soft_wrap=True)
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """Return tables and remarks in Markdown."""
        blocks = []
        for grid in self.grids():
            width = len(grid.header)
            lines = [_line(grid.header), _line(["---", *["---:"] * (width - 1)])]
            for row in grid.rows:
                cells = [bold(row[0])] if len(row) == 1 else row
                lines.append(_line(cells + [""] * (width - len(row))))
            blocks.append("\n".join([f"{grid.title}\n", *lines]))
        blocks += list(self.remarks())
        return "\n\n".join(blocks) + "\n"

    def to_latex(self) -> str:
        """Return tables and remarks in LaTeX, for a document that loads ``booktabs``."""
        return latex_tables(self.grids(), self.remarks())

    def to_json(self) -> str:
        """Return JSON: fractions at full precision; undefined values are null, infinite ones "inf" or "-inf"."""
        return json.dumps(_json_values(self.content()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def value_grids(title: str, header: Sequence[str], entries: Sequence[Entry], *, best: bool = False) -> Iterator[Grid]:
    """Tables of values: one row per entry or, with many metrics, per metric; ``header`` titles name and cells.

    With ``best``, the best value of each metric is bold, unless all are equal.
    """
    keys = list(dict.fromkeys(key for entry in entries for key in entry.values.values))
    lowest = {key: _lowest_cost(key, entries) if best else math.nan for key in keys}

    def shown(values: Values, key: str) -> str:
        text = _value(values, key)
        return bold(text) if _cost(key, values) == lowest[key] else text

    if len(keys) <= MOST_COLUMNS:
        rows = [[entry.name, *entry.cells, *(shown(entry.values, key) for key in keys)] for entry in entries]
        yield Grid(title, [*header, *map(heading, keys)], rows)
        return
    for start in range(0, len(entries), _SIDE_BY_SIDE):
        some = entries[start : start + _SIDE_BY_SIDE]
        before = [[name, *(entry.cells[place] for entry in some)] for place, name in enumerate(header[1:])]
        cells = {key: [shown(entry.values, key) for entry in some] for key in keys}
        yield Grid(title, ["metric", *(entry.name for entry in some)], [*before, *sectioned(cells)])


def sectioned(cells: Mapping[str, list[str]]) -> list[list[str]]:
    """Rows of a table, in a long one with a heading for each section of metrics."""
    rows: list[list[str]] = []
    last = None
    for key, row in cells.items():
        section = _row(key).section
        if section != last and len(cells) > MOST_COLUMNS:
            rows.append([section])
        last = section
        rows.append([heading(key), *row])
    return rows


def heading(key: str) -> str:
    """Title of a metric, with an arrow in its better direction and any number of bins in its key."""
    row, bins = _row(key), key.partition("@")[2]
    return row.title + _ARROWS[row.better] + (f" ({bins} bins)" if bins else "")


def cell(key: str, value: float) -> str:
    """The value of a metric as text; see `show`."""
    return show(value, _row(key).percent)


def show(value: float, percent: bool) -> str:
    """A value as text: in percent with two decimals, otherwise with four; a dash if undefined."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if percent else f"{value:.4f}"


def bins_title(settings: Settings) -> str:
    """The numbers of bins as text."""
    return f"{', '.join(map(str, settings.bins))} bins (lo, hi]"


def intervals_remark(settings: Settings) -> Iterator[str]:
    """A remark on the method of any intervals."""
    if settings.intervals is not None:
        yield (
            f"In brackets: {100 * settings.level:g} % bootstrap intervals, {settings.intervals} resamples, seed "
            f"{settings.seed}. Where chance alone raises a value, as with ECE, only the interval is corrected, so the "
            "value may be outside it."
        )


def settings_content(settings: Settings, input: str) -> dict[str, Any]:
    """Conventions of the computation, as plain data."""
    content: dict[str, Any] = {
        "input": input,
        "n_bins": list(settings.bins),
        "bins": "(lo, hi]",
        "ranking": "exact",
        "logarithm": "natural",
        "seed": settings.seed,
    }
    if settings.intervals is not None:
        content["intervals"] = {"method": "bootstrap", "resamples": settings.intervals, "level": settings.level}
    return content


def values_content(values: Values) -> dict[str, Any]:
    """``values`` and any ``intervals``, as plain data."""
    content: dict[str, Any] = {"values": values.values}
    if values.intervals:
        content["intervals"] = {key: [interval.low, interval.high] for key, interval in values.intervals.items()}
    return content


def _row(key: str) -> MetricRow:
    metric = key.partition("@")[0]
    return (METRICS | OOD | SOFT)[metric]


def _cost(key: str, values: Values) -> float:
    """The value so that a smaller number is better; nan where none is."""
    value = values.values.get(key, math.nan)
    return {"higher": -value, "lower": value, "zero": abs(value), "none": math.nan}[_row(key).better]


def _lowest_cost(key: str, entries: Sequence[Entry]) -> float:
    """The cost of the best entry; nan if all are equal."""
    costs = {cost for entry in entries if not math.isnan(cost := _cost(key, entry.values))}
    return min(costs) if len(costs) > 1 else math.nan


def _value(values: Values, key: str) -> str:
    text = cell(key, values.values.get(key, math.nan))
    interval = values.intervals.get(key)
    if interval is None or math.isnan(interval.low):
        return text
    return f"{text} [{cell(key, interval.low)}, {cell(key, interval.high)}]"


def _drawn(text: str, plain: bool = False) -> Text:
    """A cell for the terminal; in plain text, which knows no bold, between stars."""
    inside = unstarred(text)
    if inside is None:
        return Text(text)
    return Text(f"*{inside}*") if plain else Text(inside, style="bold")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def _json_values(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _json_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_json_values(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content
