"""Values that papers report, in the scale of our metrics, and which of them a run can stand beside."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from calib_lightning.utils.papers import filled, pick, read_index, rows_and_columns, words_of


class Unit(NamedTuple):
    """How papers print a metric: our key, and the printed value and standard deviation of a value of 1."""

    metric: str
    scale: int
    std_scale: int


_PERCENT, _SAME = (100, 100), (1, 1)

UNITS: dict[str, Unit | None] = {
    "accuracy %": Unit("accuracy", *_PERCENT),
    "Brier x 100": Unit("brier", *_PERCENT),  # of the multi-class score, from 0 to 2
    "entropy in nats": Unit("entropy", *_SAME),
    "entropy in nats (std x 100)": Unit("entropy", 1, 100),
    "ECE %": Unit("ece", *_PERCENT),
    "ECE as a fraction": Unit("ece", *_SAME),
    "equal-mass ECE %": Unit("aece_official", *_PERCENT),
    "class-wise ECE x 100": Unit("classwise_ece", *_PERCENT),
    "class-wise ECE x 1000": Unit("classwise_ece", 1000, 1000),
    "MCE %": Unit("mce", *_PERCENT),
    "correctness AUROC %": Unit("correctness_auroc", *_PERCENT),
    "one-versus-one AUROC %": Unit("ovo_auroc", *_PERCENT),
    "OOD AUROC %": Unit("ood_auroc", *_PERCENT),
    "FPR95 %": Unit("ood_fpr95", *_PERCENT),
    "seconds": None,
}
"""The metrics of the index; ``None`` has no counterpart among ours."""

_MAC_CAL = {"mac_cal", "mac_cal_paper", "mac_cal_paper_sparsity", "masked_classifier"}


class PublishedValue(NamedTuple):
    """A published value.

    Attributes:
        value: In the scale of our metric: a fraction where the paper has percent.
        std: Its standard deviation in the same scale, if the paper reports one.
        text: As the paper prints it.
        unit: What the paper prints, such as ``Brier x 100``.
    """

    value: float
    std: float | None
    text: str
    unit: str


class PublishedRow(NamedTuple):
    """A row of a published table.

    Attributes:
        method: Our name of the paper's method, with its callback after a ``+``.
        calibrator: Our name of the paper's calibrator with its arguments, or nothing.
        remark: How the paper's or our row differs, or nothing.
        values: By column and by our key of the metric.
    """

    method: str
    calibrator: str
    remark: str
    values: dict[str, dict[str, PublishedValue]]


class PublishedTable(NamedTuple):
    """A published table, or one column of it.

    Attributes:
        choice: The names of paper and table, and of the column if it is one: ``dark_side/table2/cifar10/vgg16``.
        paper: Authors, title and year.
        title: What the table shows.
        columns: ``data/network``, or the data alone for an average over the paper's networks.
        rows: The rows that have values, by the paper's name.
        remarks: On the table and its columns.
    """

    choice: str
    paper: str
    title: str
    columns: tuple[str, ...]
    rows: dict[str, PublishedRow]
    remarks: tuple[str, ...]


def published_table(choice: str) -> PublishedTable:
    """Read a published table from the index of the papers.

    Args:
        choice: ``paper/table`` or ``paper/table/column``; ``calib paper`` lists the names.

    Returns:
        The table, with values in the scale of our metrics.

    Raises:
        ValueError: There is no such table or column.

    Example:
        >>> table = published_table("dark_side/table2/cifar10/vgg16")
        >>> table.rows["ts"].values["cifar10/vgg16"]["brier"]
        PublishedValue(value=0.1021, std=0.0018, text='10.21 ± 0.18', unit='Brier x 100')
    """
    paper, _, rest = choice.partition("/")
    table, _, column = rest.partition("/")
    index = read_index(as_text=True)
    known = pick(index, paper, "paper")
    of_table = pick(known["tables"], table, f"table of {paper}")
    columns = _columns(index, paper, table)
    if column and column not in columns.values():
        column = pick(columns, column, f"column of {paper} {table}")
    first = next(name for name, published in columns.items() if column in ("", published))
    parts = (of_table, *(known["columns"][name] for name, shown in columns.items() if column in ("", shown)))
    notes = [f"evaluated epoch: {known['selects']}", *(str(part["note"]) for part in parts if "note" in part)]
    shown = (column,) if column else tuple(dict.fromkeys(columns.values()))
    rows = {}
    for row in rows_and_columns(index, paper, table)[0]:
        printed = of_table["published"].get(row, {})
        values = {name: dict(_values(of_table["metrics"], printed[name])) for name in shown if name in printed}
        if any(values.values()):
            words, remark = words_of(index, paper, table, row, first), known["rows"][row].get("note", "")
            rows[row] = PublishedRow(_method(words), filled("{calibrator}", words) or "", remark, values)
    title = str(of_table["title"])
    name = "/".join([paper, table, *([column] if column else [])])
    return PublishedTable(name, str(known["title"]), title, shown, rows, tuple(dict.fromkeys(notes)))


def row_of(table: PublishedTable, method: str, calibrator: str = "") -> str | None:
    """Find the row of a published table that is about a method of ours.

    A fitted temperature is found in a row with a fixed one, and MaC-Cal as we recommend it in the row of the paper's;
    the row has the paper's in full, and a remark. Of several rows the last is found: ablations end with the whole
    method.

    Args:
        table: The table.
        method: Name of a method, with its callbacks after a ``+`` each.
        calibrator: Name of a calibrator, with or without arguments; empty for none.

    Returns:
        The paper's name of the row, ``None`` if there is none.

    Example:
        >>> row_of(published_table("dark_side/table2"), "cross_entropy", "Temperature")
        'ts'
        >>> row_of(published_table("mac_cal/table3/cifar10"), "mixup+mac_cal")
        'mixup+mac_cal'
    """
    wanted = _parts(method), _kind(calibrator)
    found = [name for name, row in table.rows.items() if (_parts(row.method), _kind(row.calibrator)) == wanted]
    return found[-1] if found else None


def tables_about(data: str, network: str, set: str = "test") -> list[str]:
    """Find the published columns that are about data, network and set of a run.

    Configurations of one data set for different papers, such as ``cifar10`` and ``cifar10_mac_cal``, differ in what is
    held out of the training images; they have the same test images, so they are not told apart.

    Args:
        data: Name of the data's configuration.
        network: Name of the encoder.
        set: The set that is evaluated, such as ``test`` or ``shift/cifar10_2``.

    Returns:
        Choices for `published_table`, each with a column.

    Example:
        >>> tables_about("cifar10", "vgg16_bn_cifar", "shift/cifar10_2")
        ['dark_side/table3/cifar10_2/vgg16']
    """
    index = read_index(as_text=True)
    found = []
    for paper, known in index.items():
        for table, of_table in known["tables"].items():
            if not any(map(UNITS.get, of_table["metrics"])):
                continue
            for column, published in _columns(index, paper, table).items():
                words = known["columns"][column]
                about = words.get("encoder", words.get("network")), words.get("set", "test")
                same = _data_set(words["data"], index) == _data_set(data, index)
                if same and about == (network, set.rpartition("/")[2]):
                    found.append(f"{paper}/{table}/{published}")
    return found


def _columns(index: Mapping[str, Any], paper: str, table: str) -> dict[str, str]:
    """The columns of a table, each with the name under which it has values: an average has that of the data."""
    printed = index[paper]["tables"][table]["published"].values()
    names = {name for values in printed for name in values}
    columns = rows_and_columns(index, paper, table)[1]
    return {column: column if column in names else column.partition("/")[0] for column in columns}


def _values(units: list[str], texts: list[str]) -> Iterator[tuple[str, PublishedValue]]:
    """Values by our keys."""
    for name, text in zip(units, texts, strict=True):
        unit = UNITS.get(name)
        if unit is not None:
            mean, _, std = text.partition(" ± ")
            scaled = float(Decimal(std) / unit.std_scale) if std else None
            yield unit.metric, PublishedValue(float(Decimal(mean) / unit.scale), scaled, text, name)


def _method(words: Mapping[str, Any]) -> str:
    """The method of a row with its callbacks; papers on calibrators train with cross-entropy."""
    return "+".join([words.get("model", "cross_entropy"), *re.findall(r"callback/(\w+)", words.get("pieces", ""))])


def _parts(method: str) -> tuple[str, frozenset[str]]:
    """A method and its callbacks; all kinds of MaC-Cal are one."""
    model, *callbacks = method.split("+")
    if model in _MAC_CAL:
        model, callbacks = "cross_entropy", [*callbacks, "mac_cal"]
    return model, frozenset("mac_cal" if name in _MAC_CAL else name for name in callbacks)


def _kind(calibrator: str) -> tuple[str, bool]:
    """A calibrator without its arguments, and whether it has cross-entropy in place of the focal losses."""
    name = next(iter(re.findall(r"[A-Za-z]+", calibrator)), "").removeprefix("Fixed")
    entropy = name == "NeuralClamping" and re.search(r"gammas=[(_]*0(\.0)?,?[)_]", f"{calibrator}_")
    return name, bool(entropy)


def _data_set(data: str, index: Mapping[str, Any]) -> str:
    """The name of a data set without the paper whose division it has."""
    return next((data.removesuffix(f"_{paper}") for paper in index if data.endswith(f"_{paper}")), data)
