"""The report as text for a terminal, as Markdown for a paper or an issue, and as JSON for a program."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

import calib_lightning
from calib_lightning.commands.score_arguments import FigureOptions, Options
from calib_lightning.metrics import CORE, Difference, Spread
from calib_lightning.predictions.reading import Predictions
from calib_lightning.predictions.report import heading, row_of, show
from calib_lightning.predictions.scoring import Figures, Report, SetReport

_MOST_COLUMNS = 8
_SIDE_BY_SIDE = 4
_WIDE = 1000


class Grid(NamedTuple):
    """A table of text.

    Attributes:
        title: What stands above it.
        header: Titles of the columns; the first column has names.
        rows: Cells of each row; a row of one cell is a heading.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


class Entry(NamedTuple):
    """What figures are of.

    Attributes:
        name: Its name.
        cells: What stands before the figures.
        figures: The figures.
    """

    name: str
    cells: list[str]
    figures: Figures


def as_text(report: Report, options: Options, console: Console | None = None) -> str:
    """Write a report for people.

    Args:
        report: The report.
        options: The command line.
        console: A terminal to print to; without one the text is as wide as it needs to be.

    Returns:
        The text, empty if it went to a terminal.
    """
    return grids_as_text(_grids(report, options), _remarks(report, options), console)


def grids_as_text(grids: Iterable[Grid], remarks: Iterable[str], console: Console | None = None) -> str:
    """Draw tables and the remarks below them for people.

    Args:
        grids: The tables.
        remarks: The remarks.
        console: As in `as_text`.

    Returns:
        As in `as_text`.
    """
    buffer = io.StringIO()
    console = console or Console(file=buffer, width=_WIDE)
    for grid in grids:
        table = Table(title=Text(grid.title, style="italic"), title_justify="left")
        for place, title in enumerate(grid.header):
            table.add_column(Text(title), justify="right" if place else "left", overflow="fold")
        for row in grid.rows:
            if len(row) == 1:
                table.add_section()
                table.add_row(Text(row[0], style="bold"))
            else:
                table.add_row(*map(Text, row))
        console.print(table)
    for line in remarks:
        console.print(Text(line), soft_wrap=True)
    return buffer.getvalue()


def as_markdown(report: Report, options: Options) -> str:
    """Write a report that can be pasted into a paper or an issue.

    Args:
        report: The report.
        options: The command line.

    Returns:
        The text.
    """
    return grids_as_markdown(_grids(report, options), _remarks(report, options))


def grids_as_markdown(grids: Iterable[Grid], remarks: Iterable[str]) -> str:
    """Write tables and the remarks below them in Markdown.

    Args:
        grids: The tables.
        remarks: The remarks.

    Returns:
        The text.
    """
    blocks = []
    for grid in grids:
        width = len(grid.header)
        lines = [_line(grid.header), _line(["---", *["---:"] * (width - 1)])]
        for row in grid.rows:
            cells = [f"**{row[0]}**"] if len(row) == 1 else row
            lines.append(_line(cells + [""] * (width - len(row))))
        blocks.append("\n".join([f"{grid.title}\n", *lines]))
    blocks += list(remarks)
    return "\n\n".join(blocks) + "\n"


def as_json(report: Report, options: Options) -> str:
    """Write a report for programs: fractions at full precision.

    What is not defined is null, what is infinite the string "inf" or "-inf".

    Args:
        report: The report.
        options: The command line.

    Returns:
        The text.
    """
    content: dict[str, Any] = {
        "calib_lightning": calib_lightning.__version__,
        "settings": _settings(report, options),
        "sets": {entry.name: _set_content(report, entry) for entry in report.sets},
    }
    if report.spreads:
        content["seeds"] = {key: spread._asdict() for key, spread in report.spreads.items()}
    content["notes"] = report.notes
    return json_text(content)


def json_text(content: dict[str, Any]) -> str:
    """Write JSON; what is not defined is null, what is infinite the string "inf" or "-inf".

    Args:
        content: Plain data.

    Returns:
        The text.
    """
    return json.dumps(_json_values(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def figure_settings(options: FigureOptions) -> dict[str, Any]:
    """Say by which conventions the figures were computed.

    Args:
        options: The command line.

    Returns:
        Plain data.
    """
    settings: dict[str, Any] = {
        "input": options.input,
        "n_bins": options.bins,
        "bins": "(lo, hi]",
        "ranking": "exact",
        "logarithm": "natural",
        "seed": options.seed,
    }
    if options.intervals is not None:
        settings["intervals"] = {"method": "bootstrap", "resamples": options.intervals, "level": options.level}
    return settings


def figure_content(figures: Figures) -> dict[str, Any]:
    """Figures and their intervals as plain data.

    Args:
        figures: The figures.

    Returns:
        ``values`` and, where there are any, ``intervals``.
    """
    content: dict[str, Any] = {"values": figures.values}
    if figures.intervals:
        content["intervals"] = {key: [interval.low, interval.high] for key, interval in figures.intervals.items()}
    return content


def _settings(report: Report, options: Options) -> dict[str, Any]:
    settings = figure_settings(options)
    if report.calibrator is not None:
        settings["calibrator"] = {"name": report.calibrator, "file": str(options.calibrator)}
    if options.groups is not None:
        settings["groups"] = {"by": options.groups, "n_bins": options.bins[0]}
    if options.compare is not None:
        settings["compare"] = {"method": "paired permutation test", "other": str(options.compare)}
    if options.seeds:
        settings["seeds"] = {"runs": len(options.files), "std": "sample (ddof = 1)", "level": options.level}
    return settings


def _set_content(report: Report, entry: SetReport) -> dict[str, Any]:
    scores, confidence = entry.predictions.scores, entry.predictions.confidence
    own = "from the file" if report.calibrator is None else "from the calibrator"
    content: dict[str, Any] = {
        "file": str(entry.path),
        "n": len(scores),
        "classes": scores.shape[1],
        "confidence": "largest probability" if confidence is None else own,
        **figure_content(entry.figures),
    }
    if entry.figures.differences:
        content["compare"] = {
            key: {"difference": difference.value, "p_value": difference.p_value}
            for key, difference in entry.figures.differences.items()
        }
    if entry.predictions.class_names is not None:
        content["class_names"] = list(entry.predictions.class_names)
    if entry.groups:
        table, titles = entry.groups.table, class_titles(entry.predictions)
        content["groups"] = {
            titles.get(name, name): {
                "n": int(table.rows[place]),
                "values": {key: float(values[place]) for key, values in table.values.items()},
            }
            for place, name in enumerate(table.names)
        }
        content["worst_class"] = {
            key: {
                "class": int(name) if name else None,
                **({"name": titles[name]} if name in titles else {}),
                "value": value,
            }
            for key, (name, value) in entry.groups.worst.items()
        }
    return content


def _json_values(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _json_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_json_values(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content


def _grids(report: Report, options: Options) -> Iterator[Grid]:
    title = f"{options.input}, {bins_title(options)}"
    if report.calibrator is not None:
        title += f", calibrated by {report.calibrator}"
    entries = [Entry(entry.name, _sizes(entry), entry.figures) for entry in report.sets]
    yield from figure_grids(title, ["set", "N", "K"], entries)
    if report.spreads:
        cells = {key: _spread_cells(key, spread) for key, spread in report.spreads.items()}
        runs = f"{len(report.sets)} runs"
        yield Grid(f"over {runs}", ["metric", "mean ± std", _interval_title(options)], _sectioned(cells))
    for entry in report.sets:
        if entry.figures.differences:
            cells = {key: _difference_cells(key, found) for key, found in entry.figures.differences.items()}
            yield Grid(f"{entry.name} less {options.compare}", ["metric", "difference", "p"], _sectioned(cells))
        if entry.groups:
            yield _group_grid(entry, options)


def bins_title(options: FigureOptions) -> str:
    """Say how many bins there are."""
    return f"{', '.join(map(str, options.bins))} bins (lo, hi]"


def figure_grids(title: str, header: Sequence[str], entries: Sequence[Entry]) -> Iterator[Grid]:
    """Tables of figures: one row for each entry, or, of many metrics, one row for each metric.

    Args:
        title: What stands above each table.
        header: Titles of the name and of the cells that stand before the figures.
        entries: What the figures are of.

    Yields:
        The tables.
    """
    keys = list(dict.fromkeys(key for entry in entries for key in entry.figures.values))
    if len(keys) <= _MOST_COLUMNS:
        rows = [[entry.name, *entry.cells, *(_figure(entry.figures, key) for key in keys)] for entry in entries]
        yield Grid(title, [*header, *map(_heading, keys)], rows)
        return
    for start in range(0, len(entries), _SIDE_BY_SIDE):
        some = entries[start : start + _SIDE_BY_SIDE]
        before = [[name, *(entry.cells[place] for entry in some)] for place, name in enumerate(header[1:])]
        cells = {key: [_figure(entry.figures, key) for entry in some] for key in keys}
        yield Grid(title, ["metric", *(entry.name for entry in some)], [*before, *_sectioned(cells)])


def _group_grid(entry: SetReport, options: Options) -> Grid:
    assert entry.groups is not None
    (table, worst), titles = entry.groups, class_titles(entry.predictions)
    keys = list(table.values)
    if len(keys) > _MOST_COLUMNS:
        keys = [key for key in CORE if key in table.values]
    rows = [
        [titles.get(name, name), f"{int(count):,}", *(_cell(key, float(table.values[key][place])) for key in keys)]
        for place, (name, count) in enumerate(zip(table.names, table.rows, strict=True))
    ]
    worst_cells = []
    for key in keys:
        name, value = worst.get(key, ("", math.nan))
        worst_cells.append(f"{_cell(key, value)} ({titles.get(name, name)})" if name else "-")
    rows.append(["worst class", "", *worst_cells])
    title = f"{entry.name} by {options.groups}, {options.bins[0]} bins (lo, hi]"
    return Grid(title, [options.groups or "", "N", *map(_heading, keys)], rows)


def class_titles(predictions: Predictions) -> dict[str, str]:
    """Names of the classes by their numbers, empty where they are not known; one that two classes share is numbered."""
    names = predictions.class_names or ()
    return {str(k): name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names)}


def _sectioned(cells: Mapping[str, list[str]]) -> list[list[str]]:
    """Rows of a table; in a long one each metric stands below the heading of its section."""
    rows: list[list[str]] = []
    last = None
    for key, row in cells.items():
        section = row_of(key.partition("@")[0]).section
        if section != last and len(cells) > _MOST_COLUMNS:
            rows.append([section])
        last = section
        rows.append([_heading(key), *row])
    return rows


def _sizes(entry: SetReport) -> list[str]:
    rows, classes = entry.predictions.scores.shape
    return [f"{rows:,}", f"{classes:,}"]


def _heading(key: str) -> str:
    metric, _, bins = key.partition("@")
    return heading(metric) + (f" ({bins} bins)" if bins else "")


def _cell(key: str, value: float) -> str:
    return show(value, row_of(key.partition("@")[0]).percent)


def _figure(figures: Figures, key: str) -> str:
    text = _cell(key, figures.values.get(key, math.nan))
    interval = figures.intervals.get(key)
    if interval is None or math.isnan(interval.low):
        return text
    return f"{text} [{_cell(key, interval.low)}, {_cell(key, interval.high)}]"


def _spread_cells(key: str, spread: Spread) -> list[str]:
    interval = "-" if math.isnan(spread.low) else f"[{_cell(key, spread.low)}, {_cell(key, spread.high)}]"
    return [f"{_cell(key, spread.mean)} ± {_cell(key, spread.std)}", interval]


def _difference_cells(key: str, found: Difference) -> list[str]:
    text = _cell(key, found.value)
    return [f"+{text}" if found.value > 0 else text, "-" if math.isnan(found.p_value) else f"{found.p_value:.4f}"]


def _interval_title(options: Options) -> str:
    return f"{100 * options.level:g} % interval of the mean"


def intervals_remark(options: FigureOptions) -> Iterator[str]:
    """Say what the intervals are, where there are any."""
    if options.intervals is not None:
        yield (
            f"In brackets: {100 * options.level:g} % bootstrap intervals, {options.intervals} resamples, seed "
            f"{options.seed}. What chance alone enlarges, such as ECE, is corrected for that in the interval, not in "
            "the figure, which may lie outside."
        )


def _remarks(report: Report, options: Options) -> Iterator[str]:
    yield from intervals_remark(options)
    if options.compare is not None:
        yield f"p: paired permutation test, seed {options.seed}; not corrected for the number of metrics."
    for note in report.notes:
        yield f"Note: {note}."
