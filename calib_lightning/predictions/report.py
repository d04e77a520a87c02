"""Tables of results for people; figures come in as fractions and are shown in percent where that is usual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from calib_lightning.metrics import CORE, DIRECTION, SOFT


class Column(NamedTuple):
    """How one metric is shown."""

    title: str
    percent: bool


SECTIONS: dict[str, dict[str, Column]] = {
    "accuracy and proper scores": {
        "accuracy": Column("accuracy %", True),
        "top5_accuracy": Column("top-5 accuracy %", True),
        "nll": Column("NLL", False),
        "brier": Column("Brier", False),
        "entropy": Column("entropy", False),
    },
    "calibration": {
        "ece": Column("ECE %", True),
        "signed_gap": Column("signed gap %", True),
        "over_ece": Column("over-confident part of ECE %", True),
        "under_ece": Column("under-confident part of ECE %", True),
        "mce": Column("MCE %", True),
        "rmsce": Column("RMSCE %", True),
        "overconfidence_error": Column("overconfidence error %", True),
        "classwise_ece": Column("class-wise ECE %", True),
        "aece_split": Column("equal-mass ECE % (even split)", True),
        "aece_official": Column("equal-mass ECE % (quantile edges)", True),
        "ks": Column("KS error %", True),
        "debiased_l2": Column("debiased L2 error %", True),
        "smece": Column("smooth ECE %", True),
    },
    "ranking of right over wrong answers": {
        "correctness_auroc": Column("correctness AUROC %", True),
        "aupr_success": Column("AUPR success %", True),
        "aupr_error": Column("AUPR error %", True),
        "fpr95": Column("FPR at 95 % TPR %", True),
        "aurc": Column("AURC %", True),
        "e_aurc": Column("E-AURC %", True),
        "augrc": Column("AUGRC %", True),
        "coverage_at_risk_0.05": Column("coverage at 5 % risk %", True),
        "risk_at_coverage_0.8": Column("risk at 80 % coverage %", True),
        "risk_at_coverage_0.9": Column("risk at 90 % coverage %", True),
        "ovo_auroc": Column("one-vs-one AUROC %", True),
    },
    "decompositions": {
        "calibration_nll": Column("calibration part of NLL", False),
        "refinement_nll": Column("refinement part of NLL", False),
        "murphy_reliability": Column("Murphy reliability", False),
        "murphy_resolution": Column("Murphy resolution", False),
        "murphy_uncertainty": Column("Murphy uncertainty", False),
        "corp_miscalibration": Column("CORP miscalibration", False),
        "corp_discrimination": Column("CORP discrimination", False),
        "corp_uncertainty": Column("CORP uncertainty", False),
        "dark_side_alpha": Column("dark side alpha", False),
        "dark_side_beta": Column("dark side beta", False),
        "dark_side_gamma": Column("dark side gamma", False),
        "dark_side_residual": Column("dark side residual", False),
    },
    "distributions of labels": {
        "soft_nll": Column("soft NLL", False),
        "soft_brier": Column("soft Brier", False),
        "label_entropy": Column("label entropy", False),
    },
}
"""How every metric is shown, in the order and under the headings of a full report."""

_ALL = {key: column for section in SECTIONS.values() for key, column in section.items()}

COLUMNS: dict[str, Column] = {key: _ALL[key] for key in CORE}
"""The columns of a result table, in order; a key is the name of the metric's function.

Those of `SOFT` stand behind them where a set has distributions of labels.
"""

SHARED = "validation and calibration are the same images"
"""What the header of a table says where a split was made with ``share``."""

_ARROWS = {"higher": " ↑", "lower": " ↓", "zero": " →0", "none": ""}


def results_by_set(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Sort logged values by the set they belong to: ``shift/cifar10_1/ece`` is ``ece`` of ``shift/cifar10_1``.

    Args:
        metrics: Logged values by key.

    Returns:
        For each set, its values by metric name; training values are left out.
    """
    sets: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        prefix, _, name = key.rpartition("/")
        if prefix and prefix != "train" and (name in COLUMNS or name in SOFT or name == "n"):
            sets.setdefault(prefix, {})[name] = float(value)
    return sets


def result_table(metrics: Mapping[str, float], title: str) -> Table:
    """Make the table of a run: one row a set, one column a metric, an arrow in the better direction.

    Args:
        metrics: Logged values by key, fractions.
        title: What stands above the table.

    Returns:
        A table to print with rich.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    table.add_column("N", justify="right")
    sets = results_by_set(metrics)
    keys = [*COLUMNS, *(key for key in SOFT if any(key in values for values in sets.values()))]
    for key in keys:
        table.add_column(heading(key), justify="right")
    for set_name, values in sets.items():
        cells = [show(values.get(key, math.nan), column_of(key).percent) for key in keys]
        table.add_row(set_name, f"{values.get('n', math.nan):,.0f}", *cells)
    return table


def column_of(key: str) -> Column:
    """Tell how a metric is shown.

    Args:
        key: Key of the metric.

    Returns:
        Its column; one with the key as title where `SECTIONS` has none.
    """
    return _ALL.get(key, Column(key, False))


def heading(key: str) -> str:
    """Title of a metric with an arrow in its better direction.

    Args:
        key: Key of the metric.

    Returns:
        Text such as ``accuracy % ↑``.
    """
    return column_of(key).title + _ARROWS[DIRECTION[key]]


def show(value: float, percent: bool) -> str:
    """Show one figure: two decimals in percent, four otherwise, a dash where it is undefined."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if percent else f"{value:.4f}"


def print_table(metrics: Mapping[str, float], title: str) -> None:
    """Print the table of a run, as wide as it needs to be where the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(result_table(metrics, title))
