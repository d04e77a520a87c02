"""Published values beside ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from calib_lightning.comparison.tables import Method, Table
from calib_lightning.predictions.tables import Grid, cell, heading
from calib_lightning.utils.published import PublishedTable, PublishedValue, row_of, tables_about


def published_grids(table: Table, published: PublishedTable) -> Iterator[Grid]:
    """Our values and those of a paper in the same rows, for each of its columns.

    Args:
        table: Ours.
        published: The paper's table.

    Returns:
        The tables; none where the paper has no row of our methods or none of our metrics.
    """
    rows = _rows(table, published)
    for column in published.columns:
        found = {method: published.rows[name].values.get(column, {}) for method, name in rows.items()}
        keys = dict.fromkeys(key for values in found.values() for key in values)
        metrics = [key for key in keys if all(key in table.methods[method].spreads for method in found)]
        if not metrics:
            continue
        units = {key: next(values[key].unit for values in found.values() if key in values) for key in metrics}
        header = ["method", "calibrator", "row of the paper"]
        header += [title for key in metrics for title in (f"{heading(key)} ours", f"{units[key]} published")]
        lines = []
        for method, values in found.items():
            cells = [text for key in metrics for text in (_ours(table, method, key), _theirs(values, key))]
            lines.append([method.method, method.calibrator or "-", rows[method], *cells])
        yield Grid(f"{table.key.title or 'test'} beside {published.choice}, {column}: {published.title}", header, lines)


def published_remarks(table: Table, published: PublishedTable) -> Iterator[str]:
    """Where the numbers are from, and in what they differ from ours."""
    if not _rows(table, published):
        yield f"Note: {published.choice} has no row of these methods."
        return
    yield (
        f"{published.choice}: {published.paper}. Published values are as printed, in the unit above them; ours are in "
        "percent where the title has a %, else the value itself (Brier from 0 to 2)."
    )
    about = tables_about(table.key.data_name, table.key.network, table.key.set)
    if not any(choice.startswith(published.choice) for choice in about):
        yield f"Note: {published.choice} is about other data or another network than {table.key.title or 'ours'}."
    if any("/" not in column for column in published.columns):
        yield f"Note: {published.choice} has averages over the paper's networks."
    shown = [table.methods[method].spreads for method in _rows(table, published)]
    missing = dict.fromkeys(
        key
        for name in _rows(table, published).values()
        for values in published.rows[name].values.values()
        for key in values
        if not all(key in spreads for spreads in shown)
    )
    if missing:
        yield f"Note: {published.choice} also has {', '.join(missing)}; add --metrics to have ours beside them."
    remarks = [published.rows[name].remark for name in _rows(table, published).values()]
    for remark in dict.fromkeys([*published.remarks, *remarks]):
        if remark:
            yield f"{published.choice}: {remark.rstrip('.')}."


def _rows(table: Table, published: PublishedTable) -> dict[Method, str]:
    found = {method: row_of(published, *method) for method in table.methods}
    return {method: name for method, name in found.items() if name is not None}


def _ours(table: Table, method: Method, key: str) -> str:
    spread = table.methods[method].spreads[key]
    return cell(key, spread.mean) + ("" if math.isnan(spread.std) else f" ± {cell(key, spread.std)}")


def _theirs(values: Mapping[str, PublishedValue], key: str) -> str:
    return values[key].text if key in values else "-"
