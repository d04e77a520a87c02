"""``calib compare``: methods over seeds, with marks that are more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calib_lightning.commands.options import parse
from calib_lightning.commands.running import check_metrics, check_output, print_report, reported, style_of
from calib_lightning.predictions.settings import Settings

Format = Literal["text", "markdown", "latex", "csv", "json"]
_FORMATS: dict[str, Format] = {".txt": "text", ".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}

_READ = ("benchmark.json", "run.json", "config.yaml", "*.npz", "*.pt")


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """Compare methods over seeds: which is better, and is the difference real?

    runs:
      RUN          folders of `calib fit`, as many as there are; calibrators that `calib calibrate RUN` has fitted are
                   rows of their own
      GRID         the folder of a benchmark, with its finished runs

    Methods are compared on the same test set and splits; others are in separate tables. A difference is marked if it is
    found for these networks on other rows (rows exchanged at random) and for the methods on new seeds (Welch's t, from
    three seeds on), both adjusted for all pairs of the table.

    Args:
        runs: Folders of runs, or of a benchmark; see below.
        baseline: Method that the others are measured by, as in the table. Default: that of the benchmark.
        published: Table of a paper to show beside, PAPER/TABLE or PAPER/TABLE/COLUMN. Default: those about the same
            data and network; none for none.
        alpha: Largest adjusted p-value of a mark.
        exchanges: Number of random exchanges of rows.
        metrics: core, all, or comma-separated keys.
        format: Format of the report. Default: by the suffix of --output, or text.
        output: File for the report (.txt, .md, .tex, .csv or .json). Default: print it.
    """

    runs: list[Path] = field(metadata={"metavar": "RUN"})
    baseline: str | None = None
    published: str | None = None
    alpha: float = 0.05
    exchanges: int = 1000
    metrics: str | None = "core"
    format: Format | None = None
    output: Path | None = None

    @property
    def style(self) -> Format:
        """The format, given or by suffix."""
        return style_of(self.output, self.format, _FORMATS)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.style


def main(argv: Sequence[str]) -> int:
    """Run ``calib compare``; exit code 1 if a folder is invalid, 2 for a wrong command line."""
    options = parse(Options, "compare", argv)
    check_metrics("compare", options.metrics)
    return reported(lambda: _run(options))


def _run(options: Options) -> int:
    from calib_lightning.comparison import compare

    read = [path for run in options.runs for name in _READ for path in run.rglob(name)] if options.output else []
    check_output(options, read)
    named: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("baseline", "published", "alpha", "exchanges", "metrics", "bins", "intervals", "level", "seed")
    }
    print_report(compare(options.runs, **named), options.style, options.output)
    return 0
