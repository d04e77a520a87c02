"""``calib score``: accuracy, calibration and refinement of saved predictions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calib_lightning.commands.options import parse
from calib_lightning.commands.running import (
    check_headers,
    check_metrics,
    check_output,
    named_files,
    one_line,
    print_report,
    reported,
    style_of,
)
from calib_lightning.predictions.settings import Reading, Settings, keywords_of
from calib_lightning.utils.files import check_no_input, check_writable

if TYPE_CHECKING:
    from calib_lightning.posthoc import Calibrator
    from calib_lightning.predictions.reading import Predictions
    from calib_lightning.predictions.score_report import ScoreReport

Format = Literal["text", "json", "markdown", "latex"]
_FORMATS: dict[str, Format] = {".txt": "text", ".json": "json", ".md": "markdown", ".tex": "latex"}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Groups and comparisons.

    Args:
        groups: Report values of each class, or of frequent and rare classes.
        train_counts: Training images of each class, for --groups frequency: K whole numbers in a .csv, .npy or .json
            file.
        compare: Another run on the same samples. Report the difference of each file to it, with the p-value of a
            permutation test.
        seeds: Report mean and standard deviation over the files, which are runs of one method.
    """

    groups: Literal["class", "frequency"] | None = None
    train_counts: Path | None = None
    compare: Path | None = None
    seeds: bool = False


@dataclass(frozen=True, kw_only=True)
class Written:
    """Output.

    Args:
        format: Format of the report. Default: by the suffix of --output, or text.
        output: File for the report (.txt, .json, .md or .tex). Default: print it.
        figures: Write figures as PNG and SVG to DIR/<set>/.
    """

    format: Format | None = None
    output: Path | None = None
    figures: Path | None = field(default=None, metadata={"metavar": "DIR"})

    @property
    def style(self) -> Format:
        """The format, given or by suffix."""
        return style_of(self.output, self.format, _FORMATS)


@dataclass(frozen=True, kw_only=True)
class Options(Compared, Written, Settings, Reading):
    """Accuracy, calibration and refinement of saved predictions.

    files:
      RUN          the folder of a run, for all its sets: with the means over corruptions and, of a single run, how well
                   images of other classes are told from test
      .npz         arrays `logits` (with --input probs: `probs`) of shape (N, K) and `labels` (N,); optionally
                   `confidence` (N,), if it is not the largest probability, `class_names` (K,), and
                   `label_distribution` (N, K), such as the votes of annotators. --scores_key and --labels_key set other
                   names. `calib test` writes such files.
      .pt, .pth    a dict of tensors with these names (class_names: a list), or one tensor (N, K) with --labels
      .npy         scores (N, K), with --labels
      .csv         one row per sample: a column `label` (or --labels_key) and K columns of scores, named by their
                   classes or, in class order, 0, 1, 2, ... or z0, z1, z2, ...; `confidence` as above; `id`, `index` and
                   a first column without a name are skipped. For two classes, one column may hold the probability of
                   class 1 (`p` or `prob`), or of the class that it is named by. Without a header, the labels are the
                   last column.

    Fractions are shown in percent where that is usual. JSON has fractions at full precision, null for undefined
    values, and "inf" or "-inf" for infinite ones.

    Args:
        files: Saved scores and labels, or folders of runs; see below.
        labels: File of labels (.npy, .npz, .pt or .csv), once for all FILEs or once for each, in their order.
        ood: Scores of images of other classes; report how well the confidence tells them from those of FILE.
        calibrator: File of `calib calibrate`, a calibrator to apply to each FILE (not to --compare).
    """

    files: list[Path] = field(metadata={"metavar": "FILE"})
    labels: list[Path] = field(default_factory=list, metadata={"metavar": "FILE", "once": True})
    ood: list[Path] = field(default_factory=list, metadata={"metavar": "FILE", "once": True})
    calibrator: Path | None = field(default=None, metadata={"metavar": "CAL"})

    def __post_init__(self) -> None:
        super().__post_init__()
        Reading.__post_init__(self)
        if (self.groups == "frequency") != (self.train_counts is not None):
            raise ValueError("--groups frequency and --train_counts FILE must be given together")
        if len(self.labels) not in (0, 1, len(self.files)):
            raise ValueError(
                f"--labels is given {len(self.labels)} times for {len(self.files)} files; it must be given once, or "
                "once for each file"
            )
        if self.ood and len(self.files) > 1:
            raise ValueError(f"--ood is for one FILE; {len(self.files)} are given")
        if self.labels and any(path.is_dir() for path in self.files):
            raise ValueError("--labels is for files; a run has its own")
        if self.seeds and len(self.files) < 2:
            raise ValueError("--seeds needs two or more files, one for each run")
        _ = self.style


def main(argv: Sequence[str]) -> int:
    """Run ``calib score``; exit code 1 if a file is invalid or a figure cannot be drawn, 2 for a wrong command line."""
    options = parse(Options, "score", argv)
    return reported(lambda: _headers(options)) or reported(lambda: _run(options))


def _headers(options: Options) -> int:
    check_headers(options.files, options.labels_key, "scores" if options.labels else "scores and labels")
    check_metrics("score", options.metrics)
    return 0


def _run(options: Options) -> int:
    from calib_lightning.posthoc import load_calibrator
    from calib_lightning.predictions.files import read_counts
    from calib_lightning.predictions.others import read_others
    from calib_lightning.predictions.reading import read_predictions, unique_names
    from calib_lightning.predictions.scoring import score
    from calib_lightning.predictions.seeds import files_of_runs

    found, outside = _found(options.files)
    outside |= dict(zip(unique_names(options.ood), options.ood, strict=True))
    read = [*found.values(), *outside.values(), *(files_of_runs(found.values()) if options.seeds else [])]
    check_output(options, read)
    if options.figures is not None:
        from calib_lightning.predictions.figures import every_figure  # it imports matplotlib

        check_writable(options.figures, "--figures")
        for path in every_figure(options.figures, found):
            check_no_input(path, "--figures", [*named_files(options), *read])
    labels: list[Path | None] = [*options.labels] or [None]
    labels = labels * len(found) if len(labels) == 1 else labels
    calibrator = None if options.calibrator is None else load_calibrator(options.calibrator)
    files = dict(zip(found, zip(found.values(), labels, strict=True), strict=True))
    read_sets = {name: read_predictions(path, options, of) for name, (path, of) in files.items()}
    sets = {name: _applied(options, each, calibrator) for name, each in read_sets.items()}
    others = {name: _applied(options, each, calibrator) for name, each in read_others(outside, options).items()}
    groups: Any = options.groups
    if options.train_counts is not None:
        groups = read_counts(options.train_counts, next(iter(sets.values())).scores.shape[1])
    report = score(
        sets,
        compare=None if options.compare is None else _compared(options, options.compare, files),
        groups=groups,
        ood=others or None,
        seeds=options.seeds,
        **keywords_of(options),
    )
    print_report(report, options.style, options.output)
    return 0 if options.figures is None else _write_figures(options.figures, report)


def _found(files: Sequence[Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Files of scores by the names of their sets; of a single run also those of other classes."""
    from calib_lightning.predictions.inputs import files_of_run
    from calib_lightning.predictions.reading import unique_names

    if len(files) == 1 and files[0].is_dir():
        return files_of_run(files[0])
    found: dict[str, Path] = {}
    for name, path in zip(unique_names(files), files, strict=True):
        of_run = files_of_run(path)[0] if path.is_dir() else {}
        found |= {f"{name}/{each}": file for each, file in of_run.items()} if path.is_dir() else {name: path}
    return found, {}


def _applied(options: Options, predictions: Predictions, calibrator: Calibrator | None) -> Predictions:
    from calib_lightning.predictions.reading import with_features
    from calib_lightning.predictions.scoring import apply

    if calibrator is None:
        return predictions
    if "network" in calibrator.needs:
        raise ValueError(
            f"{options.calibrator}: {calibrator.name} needs the network and its images. Use `calib calibrate RUN`, or "
            "CalibratedClassifier in Python."
        )
    if "features" in calibrator.needs:
        predictions = with_features(predictions, options)
    return apply(calibrator, predictions, file=options.calibrator)


def _compared(options: Options, compare: Path, files: dict[str, tuple[Path, Path | None]]) -> list[Predictions]:
    """The other run of each set: one file for all, or the file of the same set in a run."""
    if not compare.is_dir():
        return [_other(options, compare, labels) for _, labels in files.values()]
    found, _ = _found([compare])
    missing = [name for name in files if name not in found]
    if missing:
        raise ValueError(f"{compare} (--compare) has no predictions of {missing[0]!r}; it has {', '.join(found)}.")
    return [_other(options, found[name], None) for name in files]


def _other(options: Options, path: Path, labels: Path | None) -> Predictions:
    from calib_lightning.predictions.reading import read_predictions

    other = read_predictions(path, options, labels)
    return other if options.calibrator is None else other._replace(scores=other.logits, input="logits")


def _write_figures(folder: Path, report: ScoreReport) -> int:
    from calib_lightning.predictions.figures import curve_names, shown_sets, write_curves, write_figures

    sys.stdout.flush()
    code = 0
    sets = {name: entry.predictions for name, entry in report.sets.items()}
    values = {name: entry.values.values for name, entry in report.sets.items()}
    work = {name: partial(write_curves, folder, name, values, sets) for name in curve_names(report.sets)}
    for name in shown_sets(report.sets):
        work[name] = partial(write_figures, folder, name, report.sets[name].predictions, report.settings.bins[0])
    for name, write in work.items():
        try:
            write()
        except Exception as error:  # the figures of the other sets may succeed
            print(f"calib: warning: no figures of {name}: {one_line(error)}", file=sys.stderr)
            code = 1
    return code
