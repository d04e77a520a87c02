"""``calib calibrate``: figures as from the library, no fit on test rows, nothing overwritten, one pass for all."""

import hashlib
import json
import os
import re
import shutil
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch

from calib_lightning.__main__ import main
from calib_lightning.core import ClassificationModule, load_module
from calib_lightning.data import DigitsDataModule
from calib_lightning.metrics import EvaluationState, bootstrap_intervals, functional
from calib_lightning.posthoc import Calibrator, FixedTemperature, Optimum, build, load_calibrator
from calib_lightning.posthoc.clamping_start import DataDrivenStart
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.posthoc.neural_clamping import NeuralClamping
from calib_lightning.posthoc.sequential import Sequential
from calib_lightning.posthoc.temperature import Temperature
from calib_lightning.posthoc.wrappers import OneVsRest, TopLabel
from calib_lightning.predictions.calibrating import split_names
from calib_lightning.predictions.settings import CALIBRATION_METRICS

from ..metrics.golden import golden_set, random_set
from .conftest import QUICK

METRICS = tuple(CALIBRATION_METRICS.split(","))
GOLDEN_LOGITS, GOLDEN_LABELS = golden_set()
GOLDEN_LOGITS = GOLDEN_LOGITS / 1.6
HALVES = {"cal": slice(0, None, 2), "test": slice(1, None, 2)}
FILES = ("--calibration", "cal.npz", "--test", "test.npz")
FAST = ("--no_intervals",)


class FeatureScaling(Calibrator):
    """Divides logits by one plus the mean length of the features."""

    preserves_argmax = True
    needs: ClassVar[tuple[str, ...]] = ("logits", "features")

    def __init__(self) -> None:
        super().__init__()
        self.register_state("length")

    def fit_rows(self, logits, labels, features):
        self.length = features.double().norm(dim=1).mean()
        return Optimum()

    def transform(self, logits, features):
        scale = 1.0 + features.norm(dim=1, keepdim=True) / self.length.to(features.dtype)
        return torch.log_softmax(logits / scale.to(logits.dtype), dim=-1)


class ConstantScaling(FeatureScaling):
    """Uses features in another way."""

    def transform(self, logits, features):
        return torch.log_softmax(logits / self.length.to(logits.dtype), dim=-1)


class Broken(Calibrator):
    """Cannot be fitted."""

    preserves_argmax = True

    def fit_rows(self, logits, labels, features):
        raise FloatingPointError("the loss is\nnot finite")

    def transform(self, logits, features):
        return logits


def half(name):
    return GOLDEN_LOGITS[HALVES[name]], GOLDEN_LABELS[HALVES[name]]


def save(path, logits, labels, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, logits=np.asarray(logits), labels=np.asarray(labels), **more)
    return path


@pytest.fixture
def files(tmp_path):
    """``cal.npz`` and ``test.npz`` in ``tmp_path``."""
    for name in HALVES:
        save(tmp_path / f"{name}.npz", *half(name))
    return tmp_path


@pytest.fixture
def calibrated(calib, tmp_path):
    """The JSON report of a command that ends with a code, 0 by default."""

    def run(*argv, code=0, output="out"):
        written = () if output is None else ("--output", output)
        done = calib("calibrate", *argv, *written)
        assert done.code == code, done.err
        newest = max(tmp_path.rglob("report.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one quickstart run, trained once; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()  # noqa: PTH109
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert main([*QUICK, "--trainer.max_epochs=4"]) == 0
    finally:
        os.chdir(before)
        os.environ.pop("PL_GLOBAL_SEED", None)
    return folder / "runs" / "quickstart"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def values_of(logits, labels, confidence=None, metrics=METRICS, **options):
    state = EvaluationState(metrics, **options)
    state.update(logits, labels, confidence)
    return {key: value.item() for key, value in state.compute().items()}


def rows_of(report, name="test"):
    return report["sets"][name]["rows"]


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- figures ---------------------------------------------------------------------------------------------------------


def test_several_calibrators_have_the_figures_of_the_library(files, calibrated):
    names = "Temperature, FixedTemperature(2.0),Sequential(FixedTemperature(0.5), OneVsRest(Isotonic()))"
    report = calibrated(*FILES, "--calibrators", names, "--calibrators", "TopLabel(Isotonic())", "--intervals", "20")
    direct = [
        Temperature(),
        FixedTemperature(2.0),
        Sequential(FixedTemperature(0.5), OneVsRest(Isotonic())),
        TopLabel(Isotonic()),
    ]
    assert list(rows_of(report)) == ["uncalibrated", *(calibrator.name for calibrator in direct)]
    logits, labels = half("test")
    assert rows_of(report)["uncalibrated"]["values"] == pytest.approx(values_of(logits, labels), abs=1e-12)
    for calibrator in direct:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prediction = calibrator.fit(*half("cal")).predict(logits)
        row = rows_of(report)[calibrator.name]
        assert row["values"] == pytest.approx(values_of(prediction.logits, labels, prediction.confidence), abs=1e-12)
        state = EvaluationState(METRICS, details=True)
        state.update(prediction.logits, labels, prediction.confidence)
        intervals = bootstrap_intervals(state, 20)
        for key, (low, high) in row["intervals"].items():
            assert (low, high) == pytest.approx((intervals[key].low, intervals[key].high), abs=1e-12)
        own = prediction.confidence is not None
        assert row["confidence"] == ("from the calibrator" if own else "largest probability")


def test_the_fit_reaches_known_values(calibrated, calib, tmp_path):
    save(tmp_path / "cal.npz", GOLDEN_LOGITS, GOLDEN_LABELS)
    save(tmp_path / "test.npz", *random_set(60, 5))
    entry = calibrated(*FILES, *FAST)["calibrators"]["Temperature"]
    assert entry["fit"]["nll_before"] == pytest.approx(0.740779985637, abs=1e-10)
    assert entry["fit"]["nll_after"] == pytest.approx(0.669823476850, abs=1e-10)
    assert entry["fit"]["ece_before"] == pytest.approx(0.159361677, abs=1e-8)
    assert entry["fit"]["ece_after"] == pytest.approx(0.059544043, abs=1e-7)
    assert (entry["fit"]["converged"], entry["fit"]["accuracy_change"], entry["fit"]["rows"]) == (True, 0.0, 500)
    assert load_calibrator(tmp_path / "out" / entry["file"]).temperature == pytest.approx(0.596883945176, abs=1e-8)
    line = next(line for line in calib("calibrate", *FILES, *FAST).out.splitlines() if "0.7408 →" in line)
    assert [cell.strip() for cell in line.split("│")[6:9]] == ["no", "0.7408 → 0.6698", "15.94 → 5.95"]


def test_text_and_markdown_have_a_row_for_each_calibrator(files, calib):
    options = ("--calibrators", "FixedTemperature(0.6)", "--intervals", "20", "--output", "out")
    done = calib("calibrate", *FILES, *options)
    assert (done.code, done.err) == (0, "")
    report = json.loads((files / "out" / "report.json").read_text())
    markdown = (files / "out" / "report.md").read_text()
    for name, row in rows_of(report).items():
        low, high = row["intervals"]["nll"]
        cell = f"{row['values']['nll']:.4f} [{low:.4f}, {high:.4f}]"
        assert any(name in line and cell in line for line in done.out.splitlines())
        assert any(line.startswith(f"| {name} |") and cell in line for line in markdown.splitlines())
    assert "test: 250 rows, 5 classes, 15 bins" in done.out
    assert "95 % bootstrap intervals, 20 resamples" in done.out
    assert "ECE % ↓ (10 bins)" in calib("calibrate", *FILES, *FAST, "--bins", "10,15", "--metrics", "ece").out
    wide = calib("calibrate", *FILES, *FAST, "--metrics", "all", "--calibrators", "FixedTemperature(0.6)").out
    assert [line for line in wide.splitlines() if "metric " in line and "uncalibrated" in line]


def test_before_is_what_score_says_and_after_is_what_score_says_of_the_saved_calibrator(files, calib, calibrated):
    names = "Temperature,TopLabel(Isotonic())"
    report = calibrated(*FILES, "--calibrators", names, "--intervals", "10")
    options = ("--metrics", CALIBRATION_METRICS, "--intervals", "10", "--format", "json")
    scored = json.loads(calib("score", "test.npz", *options).out)
    before = rows_of(report)["uncalibrated"]
    assert {key: scored["sets"]["test"][key] for key in before} == before
    for name, entry in report["calibrators"].items():
        done = calib("score", "test.npz", *options, "--calibrator", files / "out" / entry["file"])
        scored = json.loads(done.out)
        row = rows_of(report)[name]
        assert {key: scored["sets"]["test"][key] for key in row} == row
        assert scored["settings"]["calibrator"] == {"name": name, "file": str(files / "out" / entry["file"])}
    text = calib("score", "test.npz", "--metrics", "core", "--calibrator", files / "out" / entry["file"]).out
    assert f"calibrated by {name}" in text


def test_probabilities_are_taken_as_such(calib, calibrated, tmp_path):
    for name in HALVES:
        logits, labels = half(name)
        np.savez(tmp_path / f"{name}.npz", p=logits.softmax(dim=1).numpy(), y=labels.numpy())
    keys = ("--input", "probs", "--scores_key", "p", "--labels_key", "y")
    report = calibrated(*FILES, *keys, *FAST)
    logits, labels = half("test")
    direct = Temperature().fit(*half("cal"))(logits)
    assert rows_of(report)["Temperature"]["values"] == pytest.approx(values_of(direct, labels), abs=1e-9)
    before = values_of(logits.softmax(dim=1), labels, input="probs")
    assert rows_of(report)["uncalibrated"]["values"] == pytest.approx(before, abs=1e-12)
    saved = tmp_path / "out" / "Temperature.pt"
    options = ("--calibrator", saved, "--compare", "test.npz", "--metrics", "nll", "--format", "json")
    scored = json.loads(calib("score", "test.npz", *keys, *options).out)["sets"]["test"]
    assert scored["values"]["nll"] == rows_of(report)["Temperature"]["values"]["nll"]
    # what it is compared with stays as it is
    change = rows_of(report)["Temperature"]["values"]["nll"] - before["nll"]
    assert scored["compare"]["nll"]["difference"] == pytest.approx(change, abs=1e-9)


def test_several_sets_and_labels_of_their_own(calibrated, tmp_path):
    options = []
    for name in ("cal", "a", "b"):
        logits, labels = random_set(80, 4, seed=len(options))
        np.save(tmp_path / f"{name}.npy", logits.numpy())
        np.save(tmp_path / f"{name}_labels.npy", labels.numpy())
        options += ["--labels", f"{name}_labels.npy"]
    report = calibrated("--calibration", "cal.npy", "--test", "a.npy", "b.npy", *options, *FAST)
    assert list(report["sets"]) == ["a", "b"]
    assert [entry["file"] for entry in report["sets"]["b"]["files"]] == ["b.npy", "b_labels.npy"]
    for name, seed in (("a", 2), ("b", 4)):
        logits, labels = random_set(80, 4, seed=seed)
        assert rows_of(report, name)["uncalibrated"]["values"] == pytest.approx(values_of(logits, labels), abs=1e-12)


def test_a_loss_of_refinement_or_accuracy_is_said(files, calib):
    names = "OneVsRest(Isotonic()),FixedTemperature(1.0)"
    done = calib("calibrate", *FILES, *FAST, "--calibrators", names, "--metrics", "ece")
    logits, labels = half("test")
    before = values_of(logits, labels, metrics=("accuracy", "correctness_auroc"))
    calibrator = OneVsRest(Isotonic()).fit(*half("cal"))
    after = values_of(calibrator(logits), labels, metrics=("accuracy", "correctness_auroc"))
    lost = [key for key in before if before[key] - after[key] > 0.005]
    assert lost, "the test needs a calibrator that makes something worse"
    titles = {"accuracy": "accuracy", "correctness_auroc": "correctness AUROC"}
    for key, title in titles.items():
        said = f"the {title} from {100 * before[key]:.2f} to {100 * after[key]:.2f} %"
        assert (said in done.out) == (key in lost)
    assert "test: OneVsRest(Isotonic) lowers the " in done.out
    assert "FixedTemperature(temperature=1.0) lowers" not in done.out
    explained = done.out.splitlines()[-2]
    assert ("right from wrong answers less well" in explained) == ("correctness_auroc" in lost)


@pytest.mark.parametrize("bins", [15, 40])
def test_a_rise_of_nll_or_ece_is_said(files, calib, bins):
    words = ("--calibrators", "FixedTemperature(0.2),Temperature", "--metrics", "accuracy", "--bins", str(bins))
    done = calib("calibrate", *FILES, *FAST, *words)
    logits, labels = half("test")
    before, after = (
        {"nll": float(functional.nll(scores, labels)), "ece": float(functional.ece(scores, labels, n_bins=bins))}
        for scores in (logits, 5 * logits)
    )
    assert after["nll"] > before["nll"]
    nll = f"the NLL from {before['nll']:.4f} to {after['nll']:.4f}"
    ece = f"the ECE from {100 * before['ece']:.2f} to {100 * after['ece']:.2f} %"
    risen = [text for text, key in ((nll, "nll"), (ece, "ece")) if after[key] - before[key] > 0.005]
    assert f"test: FixedTemperature(temperature=0.2) raises {' and '.join(risen)}" in done.out
    assert "test: Temperature raises" not in done.out


def test_the_temperature_is_in_the_table_and_the_report(files, calib, calibrated):
    expected = Temperature().fit(*half("cal")).temperature
    names = ("--calibrators", "Temperature,OneVsRest(Isotonic)")
    fits = {name: entry["fit"] for name, entry in calibrated(*FILES, *FAST, *names)["calibrators"].items()}
    assert fits["Temperature"]["temperature"] == pytest.approx(expected, rel=1e-12)
    assert "temperature" not in fits["OneVsRest(Isotonic)"]
    lines = calib("calibrate", *FILES, *FAST, *names).out.splitlines()
    cells = [[cell.strip() for cell in line.replace("┃", "│").split("│")] for line in lines]
    place = next(row.index("T") for row in cells if "converged" in row)
    assert f"{expected:.4g}" in [row[place] for row in cells if "Temperature" in row and len(row) > place]


def test_tied_rows_are_not_dropped_by_default(calibrated, tmp_path):
    """All rows but a few have the lowest confidence: the quantile edges drop them, the equal split does not."""
    logits = torch.tensor([[1.0, 0.0]] * 95 + [[3.0, 0.0]] * 5)
    labels = torch.arange(100) % 4 // 3
    for name in ("cal", "test"):
        save(tmp_path / f"{name}.npz", logits + (name == "cal") * 1e-3, labels)
    report = rows_of(calibrated(*FILES, *FAST))["uncalibrated"]["values"]
    gap = float((logits.double().softmax(1)[:, 0] - (labels == 0).double()).mean().abs())
    assert report["aece_split"] >= gap - 1e-9
    assert "aece_official" not in report


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_report_says_where_everything_comes_from(files, calibrated):
    report = calibrated(*FILES, *FAST, "--seed", "4", "--bins", "10")
    for entry, name in ((report["calibration"], "cal.npz"), (report["sets"]["test"], "test.npz")):
        digest = hashlib.sha256((files / name).read_bytes()).hexdigest()
        assert entry["files"] == [{"file": name, "sha256": digest}]
        assert (entry["n"], entry["classes"]) == (250, 5)
    assert "." in report["calib_lightning"]
    assert report["settings"]["n_bins"] == [10]
    assert report["settings"]["seed"] == 4
    assert report["settings"]["calibrators"] == ["Temperature"]
    assert "intervals" not in report["settings"]
    assert report["failed"] == {}
    spec = report["calibrators"]["Temperature"]["spec"]
    assert build(spec, Calibrator).name == "Temperature"


def test_nothing_is_overwritten(files, calib):
    first = calib("calibrate", *FILES, *FAST, "--output", "new/out")
    assert "new/out;" in first.out
    before = tree(files)
    again = calib("calibrate", *FILES, *FAST, "--output", "new/out", "--calibrators", "FixedTemperature(2.0)")
    assert again.code == 0
    assert "new/out-2;" in again.out
    assert {path: path.read_bytes() for path in before} == before
    written = sorted(path.name for path in (files / "new" / "out-2").iterdir())
    assert written == ["FixedTemperature_temperature=2.0.pt", "report.json", "report.md"]


def test_files_are_written_only_on_request(files, calib):
    before = tree(files)
    done = calib("calibrate", *FILES, *FAST)
    assert done.code == 0
    assert "Nothing was written" in done.out
    assert "--output DIR" in done.out
    assert tree(files) == before


def test_names_of_files_are_safe_and_differ(files, calibrated):
    names = "Sequential(FixedTemperature(2.0),FixedTemperature(0.5)),Sequential(FixedTemperature(2.0),Temperature())"
    report = calibrated(*FILES, *FAST, "--calibrators", names, "--calibrators", "Temperature,Temperature()")
    assert list(report["calibrators"]) == [
        "Sequential(FixedTemperature(temperature=2.0), FixedTemperature(temperature=0.5))",
        "Sequential(FixedTemperature(temperature=2.0), Temperature)",
        "Temperature",
    ]
    found = [entry["file"] for entry in report["calibrators"].values()]
    assert len(set(found)) == 3
    for file in found:
        assert not set(file) & set(" /\\:*?\"<>|()'[]")
        assert (files / "out" / file).is_file()


def test_one_that_fails_does_not_cost_the_others(files, calib):
    names = "FixedTemperature(2.0),Broken,Temperature"
    done = calib("calibrate", *FILES, *FAST, "--calibrators", names, "--output", "out")
    assert done.code == 1
    assert done.err == "calib: error: Broken: the loss is not finite\n"
    report = json.loads((files / "out" / "report.json").read_text())
    assert report["failed"] == {"Broken": "the loss is not finite"}
    assert list(rows_of(report)) == ["uncalibrated", "FixedTemperature(temperature=2.0)", "Temperature"]
    assert sorted(path.name for path in (files / "out").glob("*.pt")) == [
        "FixedTemperature_temperature=2.0.pt",
        "Temperature.pt",
    ]


def test_what_is_not_defined_is_said_once(calib, tmp_path):
    save(tmp_path / "cal.npz", *half("cal"))
    save(tmp_path / "test.npz", 5 * torch.eye(5)[[0, 1, 2, 3]], torch.arange(4))
    done = calib(
        "calibrate", *FILES, "--intervals", "10", "--calibrators", "FixedTemperature(2.0),FixedTemperature(3.0)"
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.count("all 4 rows are correct") == 1


def test_what_a_fit_warns_of_is_in_the_report(calib, calibrated, tmp_path):
    save(tmp_path / "cal.npz", 5 * torch.eye(5)[[0, 1, 2, 3]], torch.arange(4))
    save(tmp_path / "test.npz", *half("test"))
    with pytest.warns(UserWarning, match="Temperature.fit: ") as caught:
        Temperature().fit(5 * torch.eye(5)[[0, 1, 2, 3]], torch.arange(4))
    done = calib("calibrate", *FILES, *FAST)
    entry = calibrated(*FILES, *FAST)["calibrators"]["Temperature"]
    assert entry["fit"]["notes"] == [str(warning.message).removeprefix("Temperature.fit: ") for warning in caught]
    assert entry["fit"]["at_bound"] is True
    assert f"Note: Temperature: {entry['fit']['notes'][0]}." in done.out


def test_help_names_the_commands_beside_the_trainer(calib):
    text = calib("--help").out
    for command in ("score", "calibrate", "classify", "list", "paper"):
        assert any(line.split()[:1] == [command] for line in text.splitlines()), text


def test_an_interrupted_command_ends_without_a_traceback(calib, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("calib_lightning.predictions.reading.read_predictions", interrupted)
    done = calib("calibrate", *FILES, "--output=out")
    assert done.code == 130
    assert done.err == "calib: interrupted\n"


# --- what is refused -------------------------------------------------------------------------------------------------


def _same_rows(folder):
    torch.save({"logits": half("test")[0].float(), "labels": half("test")[1]}, folder / "cal.pt")
    return ("--calibration", "cal.pt", "--test", "test.npz"), ["same rows", "cal.pt", "test.npz"]


def _some_rows_in_another_order(folder):
    rows = torch.arange(200).flip(0)
    save(folder / "part.npz", half("test")[0][rows], half("test")[1][rows])
    return ("--calibration", "part.npz", "--test", "test.npz"), ["same rows", "part.npz"]


def _fewer_rows_than_classes_in_another_order(folder):
    logits, labels = random_set(30, 40)
    save(folder / "one.npz", logits, labels)
    save(folder / "two.npz", logits.flip(0), labels.flip(0))
    return ("--calibration", "one.npz", "--test", "two.npz"), ["same rows"]


def _constant(folder):
    save(folder / "one.npz", torch.zeros(30, 5), torch.zeros(30, dtype=torch.int64))
    save(folder / "two.npz", torch.zeros(30, 5), torch.zeros(30, dtype=torch.int64))
    return ("--calibration", "one.npz", "--test", "two.npz"), ["same rows"]


def _of_a_run(name):
    def make(folder):
        (folder / "run").mkdir()
        (folder / "run" / "run.json").write_text("{}")
        save(folder / "run" / "predictions" / f"{name}.npz", *half("cal"))
        words = [f"{name!r} of the run", "calibration.npz"]
        return ("--calibration", f"run/predictions/{name}.npz", "--test", "test.npz"), words

    return make


def _other_classes(folder):
    save(folder / "three.npz", *random_set(30, 3))
    return ("--calibration", "cal.npz", "--test", "test.npz", "three.npz"), ["same classes", "5 and 3"]


def _empty(folder):
    save(folder / "empty.npz", torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    return ("--calibration", "empty.npz", "--test", "test.npz"), ["empty.npz", "no rows"]


def _without_features(folder):
    return (*FILES, "--calibrators", "FeatureScaling"), ["cal.npz", "'features'", "features_key"]


def _short_features(folder):
    save(folder / "cal.npz", *half("cal"), f=np.zeros((9, 2)))
    return (*FILES, "--calibrators", "FeatureScaling", "--features_key", "f"), ["'f' has shape (9, 2)", "(250, d)"]


def _other_width(folder):
    for name, width in (("cal", 2), ("test", 3)):
        save(folder / f"{name}.npz", *half(name), features=np.zeros((250, width)))
    return (*FILES, "--calibrators", "FeatureScaling"), ["same width", "2 and 3"]


def _features_in_csv(folder):
    (folder / "cal.csv").write_text("z0,z1,z2,z3,z4,label\n1,2,3,4,5,1\n")
    return ("--calibration", "cal.csv", "--test", "test.npz", "--calibrators", "FeatureScaling"), [".npz, .pt"]


def _no_run(folder):
    return ("nowhere",), ["nowhere", "run.json", "run.json"]


def _damaged_run(folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{")
    return ("run",), ["run.json", "damaged"]


def _run_without_predictions(folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    return ("run",), ["no predictions", "calib test"]


def _run_without_calibration(folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    save(folder / "run" / "predictions" / "test.npz", *half("test"))
    return ("run",), ["calibration.npz", "split.calibration"]


def _run_without_test_sets(folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    for name in ("calibration", "val"):
        save(folder / "run" / "predictions" / f"{name}.npz", *random_set(30, 3, seed=len(name)))
    return ("run",), ["no predictions of a test set"]


BAD = {
    "same file": lambda folder: (
        ("--calibration", "cal.npz", "--test", "./cal.npz"),
        ["for calibration and as a test set"],
    ),
    "same rows": _same_rows,
    "few same rows": _fewer_rows_than_classes_in_another_order,
    "some of its rows": _some_rows_in_another_order,
    "constant logits": _constant,
    "test set of a run": _of_a_run("test"),
    "validation set of a run": _of_a_run("val"),
    "other classes": _other_classes,
    "no rows": _empty,
    "missing file": lambda folder: ((*FILES, "none.npz"), ["none.npz", "no such file"]),
    "twice": lambda folder: ((*FILES, "test.npz"), ["test.npz", "2 times"]),
    "output below a file": lambda folder: ((*FILES, "--output", "cal.npz/out"), ["--output", "cal.npz"]),
    "no features": _without_features,
    "short features": _short_features,
    "other width": _other_width,
    "features in csv": _features_in_csv,
    "no run": _no_run,
    "damaged run": _damaged_run,
    "run without predictions": _run_without_predictions,
    "run without calibration": _run_without_calibration,
    "run without test sets": _run_without_test_sets,
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_found_before_anything_is_computed(files, calib, monkeypatch, case):
    def compute(*_, **__):
        raise AssertionError("computed before all inputs were checked")

    monkeypatch.setattr("calib_lightning.posthoc.Calibrator.fit", compute)
    monkeypatch.setattr("calib_lightning.predictions.values.EvaluationState", compute)
    argv, words = BAD[case](files)
    before = tree(files)
    done = calib(
        "calibrate", *argv, *(() if "--output" in argv or argv[0] in ("run", "nowhere") else ("--output", "o"))
    )
    assert (done.code, done.out) == (1, ""), done.err
    assert done.err.startswith("calib: error: ")
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err, done.err
    assert tree(files) == before


def test_shared_rows_are_said_and_chance_is_not_blamed(files, calib):
    logits, labels = (torch.cat([mine[:20], other]) for mine, other in zip(half("cal"), half("test"), strict=True))
    save(files / "mixed.npz", logits, labels)
    done = calib("calibrate", "--calibration", "cal.npz", "--test", "mixed.npz", *FAST)
    assert done.code == 0
    assert re.search(r"mixed: 20 of its \d+ distinct rows have the scores and label of a calibration row", done.out)
    for name in ("one", "two"):
        save(files / f"{name}.npz", torch.zeros(30, 5), torch.arange(30) % (2 + len(name)))
    save(files / "two.npz", torch.zeros(40, 5), torch.arange(40) % 5)
    done = calib(
        "calibrate", "--calibration", "one.npz", "--test", "two.npz", *FAST, "--calibrators", "FixedTemperature(2)"
    )
    assert done.code == 0, done.err
    assert "of a calibration row" not in done.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ["RUN", "--calibration"]),
        (("--calibration", "cal.npz"), ["--test"]),
        (("--test", "test.npz"), ["--calibration"]),
        (("run", *FILES), ["--calibration", "run"]),
        (("run", "--input", "probs"), ["--input"]),
        ((*FILES, "--labels", "a.npy"), ["--labels", "1 times"]),
        ((*FILES, "--calibrators", "Temprature"), ["'Temprature'", "Did you mean", "Temperature"]),
        ((*FILES, "--calibrators", "temperature"), ["'temperature'", "Temperature"]),
        ((*FILES, "--calibrators", "FixedTemperature(-1)"), ["temperature is -1"]),
        ((*FILES, "--calibrators", "FixedTemperature"), ["FixedTemperature takes temperature"]),
        ((*FILES, "--calibrators", "Temperature("), ["'Temperature('", "cannot be parsed"]),
        ((*FILES, "--calibrators", "] + ["), ["cannot be parsed"]),
        ((*FILES, "--calibrators", ""), ["cannot be parsed"]),
        ((*FILES, "--calibrators", "__import__('os')"), ["__import__"]),
        ((*FILES, "--calibrators", "Isotonic()"), ["Isotonic"]),
        ((*FILES, "--calibrators", "NeuralClamping"), ["NeuralClamping", "RUN"]),
        ((*FILES, "--metrics", "eec"), ["'eec'", "ece"]),
        ((*FILES, "--intervals", "1"), ["intervals is 1;", ">= 2"]),
        ((*FILES, "--frobnicate"), ["--frobnicate"]),
    ],
)
def test_wrong_command_lines_end_with_two(calib, argv, words):
    done = calib("calibrate", *argv)
    assert done.code == 2
    for word in words:
        assert word in done.err, done.err


def test_names_are_split_outside_brackets_and_quotes():
    assert split_names("A, B(C(), d=(1, 2)),E(f='x,y')") == ["A", "B(C(), d=(1, 2))", "E(f='x,y')"]


# --- calib score --calibrator ----------------------------------------------------------------------------------------


def test_score_applies_a_calibrator_with_features(files, calib, calibrated):
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(250, 3, generator=generator) for name in HALVES}
    for name in HALVES:
        logits, labels = half(name)
        torch.save({"logits": logits, "labels": labels, "f": features[name]}, files / f"{name}.pt")
    options = ("--features_key", "f")
    paths = ("--calibration", "cal.pt", "--test", "test.pt")
    report = calibrated(*paths, *FAST, *options, "--calibrators", "FeatureScaling")
    logits, labels = half("test")
    direct = FeatureScaling().fit(*half("cal"), features["cal"])(logits, features["test"])
    assert rows_of(report)["FeatureScaling"]["values"] == pytest.approx(values_of(direct, labels), abs=1e-12)
    score = (
        "score",
        "test.pt",
        "--metrics",
        CALIBRATION_METRICS,
        "--format",
        "json",
        "--calibrator",
        "out/FeatureScaling.pt",
    )
    scored = json.loads(calib(*score, *options).out)
    assert scored["sets"]["test"]["values"] == rows_of(report)["FeatureScaling"]["values"]
    done = calib(*score)
    assert done.code == 1
    assert all(word in done.err for word in ("test.pt", "'features'", "features_key"))


def test_score_refuses_a_calibrator_that_does_not_fit(files, calib):
    assert calib("calibrate", *FILES, *FAST, "--output", "out").code == 0
    save(files / "three.npz", *random_set(30, 3))
    cases = {
        ("three.npz", "out/Temperature.pt"): ["three.npz", "3 classes", "Temperature", "fitted to 5"],
        ("test.npz", "none.pt"): ["no calibrator none.pt"],
        ("test.npz", "test.npz"): ["test.npz"],
    }
    for (file, calibrator), words in cases.items():
        done = calib("score", file, "--calibrator", calibrator)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("calib: error: ")
        for word in words:
            assert word in done.err, done.err


def test_a_confidence_of_the_method_is_replaced(files, calib):
    for name in HALVES:
        save(files / f"{name}.npz", *half(name), confidence=np.linspace(0.01, 0.99, 250))
    done = calib("calibrate", *FILES, *FAST, "--output", "out", "--metrics", "signed_gap")
    assert "test: the confidence in the file is replaced by that of the calibrated logits" in done.out
    report = json.loads((files / "out" / "report.json").read_text())
    logits, labels = half("test")
    rows = rows_of(report)
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert rows["uncalibrated"]["confidence"] == "from the file"
    assert rows["uncalibrated"]["values"]["signed_gap"] == pytest.approx(0.5 - accuracy, abs=1e-9)
    assert rows["Temperature"]["confidence"] == "largest probability"
    confidence = Temperature().fit(*half("cal"))(logits).exp().amax(1).mean().item()
    assert rows["Temperature"]["values"]["signed_gap"] == pytest.approx(confidence - accuracy, abs=1e-9)
    scored = calib("score", "test.npz", "--calibrator", "out/Temperature.pt", "--metrics", "signed_gap").out
    assert "is replaced by" in scored


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_calibrated_from_its_saved_predictions(run, calib, monkeypatch):
    def load(*_, **__):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr("calib_lightning.predictions.run_network.load_module", load)
    before = tree(run)
    done = calib("calibrate", run, *FAST)
    assert done.code == 0, done.err
    assert calib("calibrate", run, *FAST, "--calibrators", "FixedTemperature(2.0)").code == 0
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in run.glob("calibrate*")) == ["calibrate", "calibrate-2"]
    assert "CALIB_RUN_FOLDER" not in os.environ or "calibrate" not in os.environ["CALIB_RUN_FOLDER"]
    report = json.loads((run / "calibrate" / "report.json").read_text())
    assert list(report["sets"]) == ["test"]
    assert report["settings"]["run"] == str(run)
    with np.load(run / "predictions" / "calibration.npz") as cal, np.load(run / "predictions" / "test.npz") as test:
        fitted = Temperature().fit(torch.from_numpy(cal["logits"]), torch.from_numpy(cal["labels"]))
        logits, labels = torch.from_numpy(test["logits"]), torch.from_numpy(test["labels"])
    assert rows_of(report, "test")["Temperature"]["values"] == pytest.approx(
        values_of(fitted(logits), labels), abs=1e-9
    )
    path = str(run / "predictions" / "calibration.npz")
    assert report["calibration"]["files"][0]["file"] == path
    files = ("--calibration", path, "--test", run / "predictions" / "test.npz", "--output", run / "again")
    assert calib("calibrate", *files, *FAST).code == 0
    again = json.loads((run / "again" / "report.json").read_text())
    assert again["sets"] == report["sets"]


def test_features_come_from_one_pass_of_the_network(run, calib, monkeypatch):
    seen, outputs = [], ClassificationModule.outputs

    def counted(self, image):
        seen.append(len(image))
        return outputs(self, image)

    monkeypatch.setattr(ClassificationModule, "outputs", counted)
    done = calib("calibrate", run, *FAST, "--calibrators", "FeatureScaling,ConstantScaling,Temperature")
    assert done.code == 0, done.err
    assert sum(seen) == 200 + 400
    assert "agree with the saved ones" in done.out
    report = json.loads((run / "calibrate" / "report.json").read_text())
    assert report["settings"]["checkpoint"]["file"] == str(run / "checkpoints" / "best.ckpt")
    module, data = load_module(run / "checkpoints" / "best.ckpt"), DigitsDataModule()
    data.setup()
    sets = {}
    for name in ("calibration", "test"):
        images = torch.cat([batch.image for batch in data.evaluation_loader(name)])
        with np.load(run / "predictions" / f"{name}.npz") as saved, torch.no_grad():
            sets[name] = [torch.from_numpy(saved[key]) for key in ("logits", "labels")] + [module.features(images)]
    logits, labels, features = sets["test"]
    for cls in (FeatureScaling, ConstantScaling):
        direct = cls().fit(*sets["calibration"])(logits, features)
        found = rows_of(report, "test")[cls.__name__]["values"]
        assert found == pytest.approx(values_of(direct, labels), abs=1e-5)


def test_the_folder_of_a_test_has_the_network_of_its_run(run, calib):
    (run / "test").mkdir()
    shutil.copytree(run / "predictions", run / "test" / "predictions")
    (run / "test" / "run.json").write_text("{}")
    done = calib("calibrate", run / "test", *FAST, "--calibrators", "FeatureScaling")
    assert done.code == 0, done.err
    assert (run / "test" / "calibrate" / "FeatureScaling.pt").is_file()


def test_a_network_that_did_not_make_the_predictions_is_refused(run, calib):
    path = run / "predictions" / "test.npz"
    with np.load(path) as saved:
        columns = dict(saved)
    columns["logits"] = columns["logits"] + np.float32(0.5) * np.sin(np.arange(columns["logits"].size)).reshape(
        columns["logits"].shape
    ).astype(np.float32)
    np.savez(path, **columns)
    done = calib("calibrate", run, "--calibrators", "FeatureScaling")
    assert (done.code, done.out) == (1, "")
    assert all(word in done.err for word in ("test.npz", "best.ckpt", "relative difference"))
    assert not (run / "calibrate").exists()


@pytest.mark.parametrize("fault", ["config", "checkpoint", "splits", "data"])
def test_a_run_whose_network_cannot_be_asked_is_refused(run, calib, fault):
    config, record = run / "config.yaml", json.loads((run / "run.json").read_text())
    if fault == "config":
        config.unlink()
    elif fault == "checkpoint":
        (run / "checkpoints" / "best.ckpt").unlink()
    elif fault == "splits":
        (run / "run.json").write_text(json.dumps(record | {"splits": "0" * 64}))
    else:
        config.write_text(config.read_text().replace("calib_lightning.data.DigitsDataModule", "os.system"))
    done = calib("calibrate", run, "--calibrators", "FeatureScaling")
    assert (done.code, done.out) == (1, "")
    words = {"config": "config.yaml", "checkpoint": "no selected checkpoint", "splits": "splits", "data": "os.system"}
    assert words[fault] in done.err, done.err
    assert calib("calibrate", run, *FAST).code == 0


def test_a_calibration_split_that_was_trained_with_is_said(run, calib):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"calibration_used_by": ["MACCal"]}))
    files = ("--calibration", run / "predictions" / "calibration.npz", "--test", run / "predictions" / "test.npz")
    for argv in ((run,), files):
        done = calib("calibrate", *argv, *FAST)
        assert "not independent of the network: MACCal was trained with it" in done.out
    assert any("MACCal" in note for note in json.loads((run / "calibrate" / "report.json").read_text())["notes"])


def test_a_data_driven_start_takes_the_range_of_the_runs_images(run, calib):
    name = "NeuralClamping(gammas=(1.0,), start=DataDrivenStart(), descent=None)"
    done = calib("calibrate", run, *FAST, "--calibrators", name)
    assert done.code == 0, done.err
    found = load_calibrator(next((run / "calibrate").glob("NeuralClamping*.pt")))
    module, data = load_module(run / "checkpoints" / "best.ckpt"), DigitsDataModule()
    data.setup()
    low, high = ([(edge - mean) / std for mean, std in zip(data.mean, data.std, strict=True)] for edge in (0.0, 1.0))
    images, labels = (torch.cat(parts) for parts in list(zip(*data.evaluation_loader("calibration"), strict=True))[:2])
    direct = NeuralClamping((1.0,), start=DataDrivenStart(low, high), descent=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct.fit(network=module, images=images, labels=labels, progress=False)
    assert torch.equal(found.delta, direct.delta)
    assert bool((found.delta != 0).any())


def test_fits_over_seeds_and_ablations(run, calib):
    parts = "start=RandomStart(0.3),descent=ClampOptimum(1)"
    names = [f"NeuralClamping((1.0,),keep='{keep}',{parts})" for keep in ("input", "output")]
    done = calib("calibrate", run, *FAST, "--calibrators", ",".join([*names, "Temperature"]), "--seeds", "3")
    assert done.code == 0, done.err
    report = json.loads((run / "calibrate" / "report.json").read_text())
    rows = rows_of(report, "test")
    assert len(rows) == 1 + 2 * 3 + 1
    seeds = report["sets"]["test"]["seeds"]
    assert len(seeds) == 2
    for called, found in seeds.items():
        keep = "input" if "input" in called else "output"
        each = [row["values"]["ece"] for name, row in rows.items() if f"'{keep}'" in name]
        assert len(set(each)) == 3
        assert found["ece"]["mean"] == pytest.approx(np.mean(each), abs=1e-12)
        assert found["ece"]["std"] == pytest.approx(np.std(each, ddof=1), abs=1e-12)
        assert f"{100 * np.mean(each):.2f} ± {100 * np.std(each, ddof=1):.2f}" in done.out
    assert calib("calibrate", run, "--seeds", "0").code == 2


def test_neural_clamping_of_a_run(run, calib):
    name = "NeuralClamping(gammas=[1.0], descent=ClampDescent(epochs=2, lr=0.1))"
    done = calib("calibrate", run, *FAST, "--calibrators", f"{name},Temperature")
    assert done.code == 0, done.err
    report = json.loads((run / "calibrate" / "report.json").read_text())
    entry = report["calibrators"][name]
    module, data = load_module(run / "checkpoints" / "best.ckpt"), DigitsDataModule()
    data.setup()
    direct = build(entry["spec"], NeuralClamping)
    batches = list(data.evaluation_loader("calibration"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, labels = (torch.cat(parts) for parts in list(zip(*batches, strict=True))[:2])
        direct.fit(network=module, images=images, labels=labels, progress=False)
    batches = list(data.evaluation_loader("test"))
    with torch.no_grad():
        logits = torch.cat([direct.predict(network=module, images=batch.image).logits for batch in batches])
    labels = torch.cat([batch.label for batch in batches])
    assert rows_of(report, "test")[name]["values"] == pytest.approx(values_of(logits, labels), abs=1e-6)
    assert entry["fit"]["chosen"]["nll"] == pytest.approx(direct.search.chosen.nll, abs=1e-9)
    content = torch.load(run / "calibrate" / entry["file"], weights_only=True)["calib_lightning.calibrator"]
    again = build(content["spec"], NeuralClamping)
    again.load_state_dict(content["state"])
    assert torch.equal(again.delta, direct.delta)
    assert again.temperature == direct.temperature
    refused = calib("score", run / "predictions" / "test.npz", "--calibrator", run / "calibrate" / entry["file"])
    assert refused.code == 1
    assert "NeuralClamping" in refused.err


def test_real_networks(calibrated, real_data, tmp_path):
    folder = real_data / "logits" / "psr-calibration" / "resnet-50_cifar10"
    labels = [f"--labels={folder / part / 'targets.npy'}" for part in ("val", "tst")]
    paths = ("--calibration", folder / "val" / "predictions.npy", "--test", folder / "tst" / "predictions.npy")
    rows = rows_of(calibrated(*paths, *labels, *FAST), "predictions")
    before, after = rows["uncalibrated"]["values"], rows["Temperature"]["values"]
    assert after["ece"] < before["ece"]
    assert after["nll"] < before["nll"]
    assert after["accuracy"] == before["accuracy"]


def _table(n, seed):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, 4)) * 2, generator.integers(0, 4, n)


def test_the_same_rows_with_fewer_digits_are_refused(tmp_path, capsys):
    logits, labels = _table(300, 5)
    np.savez(tmp_path / "cal.npz", logits=logits, labels=labels)
    order = np.random.default_rng(0).permutation(300)
    table = np.column_stack([np.round(logits[order], 5), labels[order]])
    np.savetxt(tmp_path / "test.csv", table, delimiter=",", fmt="%.5f")
    code = main(["calibrate", "--calibration", str(tmp_path / "cal.npz"), "--test", str(tmp_path / "test.csv")])
    assert code == 1
    assert "the same rows up to rounding" in capsys.readouterr().err


def test_probabilities_taken_for_logits_are_refused(tmp_path, capsys):
    for name in ("cal", "test"):
        logits, labels = _table(60, len(name))
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.savez(tmp_path / f"{name}.npz", logits=probs, labels=labels)
    files = ["--calibration", str(tmp_path / "cal.npz"), "--test", str(tmp_path / "test.npz")]
    assert main(["calibrate", *files]) == 1
    assert "Set --input probs" in capsys.readouterr().err


def test_what_cannot_stand_alone_says_how_to_write_it(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["calibrate", "RUN", "--calibrators", "Isotonic"])
    assert leaving.value.code == 2
    assert "Write OneVsRest(Isotonic) or TopLabel(Isotonic)" in capsys.readouterr().err
