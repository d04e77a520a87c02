"""`score` and `calibrate` from Python: the numbers of the metrics and of the commands, from tensors and files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import calib_lightning
from calib_lightning import calibrate, load_calibrator, read_predictions, score
from calib_lightning.__main__ import main
from calib_lightning.metrics import functional
from calib_lightning.posthoc import DensityRatio, Temperature
from calib_lightning.predictions import Predictions, Settings, apply

from ..metrics.golden import GOLDEN, golden_set, random_set

LOGITS, LABELS = golden_set()
HALF, OTHER = (LOGITS[:250], LABELS[:250]), (LOGITS[250:], LABELS[250:])


def test_tensors_give_the_golden_values():
    values = score(LOGITS, LABELS, metrics="core").values
    assert values == pytest.approx(GOLDEN, abs=1e-9)


@pytest.mark.parametrize("make", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_arrays_and_lists_are_tensors_too(make):
    assert score(make(LOGITS), make(LABELS)).values == score(LOGITS, LABELS).values


def test_probabilities_are_said_to_be_so():
    probs = LOGITS.softmax(dim=1)
    values = score(probs, LABELS, input="probs", metrics="nll,ece").values
    assert values["nll"] == pytest.approx(float(functional.nll(LOGITS, LABELS)), abs=1e-12)
    assert values["ece"] == pytest.approx(float(functional.ece(LOGITS, LABELS)), abs=1e-12)
    report = score(probs, LABELS, input="logits", metrics="nll")
    assert any("taken for logits" in note for note in report.notes)


def test_it_is_what_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("run.npz", logits=LOGITS, labels=LABELS)
    np.savez("other.npz", logits=-LOGITS, labels=LABELS)
    words = ["--bins", "10,15", "--intervals", "20", "--compare", "other.npz", "--groups", "class", "--seed", "3"]
    assert main(["score", "run.npz", *words, "--metrics", "core", "--output", "report.json"]) == 0
    report = score("run.npz", compare="other.npz", groups="class", metrics="core", bins=(10, 15), intervals=20, seed=3)
    assert json.loads(report.to_json()) == json.loads((tmp_path / "report.json").read_text())
    assert main(["score", "run.npz", *words, "--metrics", "core", "--output", "report.md"]) == 0
    assert report.to_markdown() == (tmp_path / "report.md").read_text()
    assert "ECE % ↓ (10 bins)" in report.table()


def test_sets_are_named():
    sets = {"clean": HALF, "shifted": OTHER}
    report = score(sets, metrics="accuracy", seeds=True)
    assert list(report.sets) == ["clean", "shifted"]
    found = [entry.values.values["accuracy"] for entry in report.sets.values()]
    (spreads,) = report.spreads.values()
    assert spreads["accuracy"].mean == pytest.approx(sum(found) / 2)
    assert list(score([HALF, OTHER], metrics="accuracy").sets) == ["set-1", "set-2"]
    with pytest.raises(ValueError, match="2 sets"):
        _ = report.values


def test_groups_by_training_counts_and_one_comparison_for_each_set():
    groups = score(HALF, groups=[500, 300, 100, 50, 10], metrics="accuracy").sets["set"].groups
    assert groups.by == "frequency"
    assert int(sum(groups.table.rows)) == 250
    report = score([HALF, OTHER], compare=[(-HALF[0], HALF[1]), (-OTHER[0], OTHER[1])], metrics="accuracy")
    for entry, (logits, labels) in zip(report.sets.values(), (HALF, OTHER), strict=True):
        off = float(functional.accuracy(logits, labels) - functional.accuracy(-logits, labels))
        assert entry.values.differences["accuracy"].value == pytest.approx(off, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score(LOGITS), "a tuple"),
        (lambda: score(LOGITS, LABELS[:9]), "500 rows of scores but 9 labels"),
        (lambda: score(LOGITS, LABELS, metrics="eec"), "unknown 'eec'"),
        (lambda: score(LOGITS, LABELS, bins=0), "bins is 0"),
        (lambda: score(LOGITS, LABELS, level=95), "level is 95"),
        (lambda: score(LOGITS, LABELS, intervals=True), "intervals is True"),
        (lambda: score(LOGITS, LABELS, groups="size"), "groups is 'size'"),
        (lambda: score(LOGITS, LABELS, groups=[1, 2]), "5 whole numbers"),
        (lambda: score(LOGITS, LABELS, seeds=True), "two or more sets"),
        (lambda: score(LOGITS, LABELS, compare=HALF), "same samples"),
        (lambda: score(LOGITS, LABELS, compare=[HALF, HALF]), "compare has 2 runs for 1 sets"),
        (lambda: score("nowhere.npz"), "no such file"),
        (lambda: score(LOGITS, LABELS, metrics="core,eec"), "unknown 'eec'.*Did you mean ece"),
        (lambda: score(LOGITS, LABELS, input="prob"), "input is 'prob'"),
        (lambda: score(LOGITS, LABELS, bin=3), "no option 'bin'"),
        (lambda: score("."), "is not the folder of a run"),
        (lambda: score([]), "at least one set"),
        (lambda: calibrate(HALF, OTHER, []), "at least one"),
        (lambda: calibrate(HALF, OTHER, Temperature), "such as Temperature"),
        (lambda: calibrate("nowhere.npz"), "not the folder of a run"),
        (lambda: score(LOGITS, LABELS, bins="15"), "bins is '15'"),
        (lambda: calibrate(HALF), "test is None"),
        (lambda: calibrate(HALF, HALF), "hold the same rows"),
        (lambda: calibrate(HALF, OTHER, "Temperture"), "Did you mean Temperature"),
        (lambda: calibrate(HALF, OTHER, "DensityRatio"), "no features"),
        (lambda: calibrate(HALF, OTHER, "NeuralClamping"), "needs the network and its images"),
        (lambda: calibrate(HALF, (OTHER[0][:, :4], OTHER[1].clamp(max=3))), "same classes"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        call()


def test_calibrate_gives_fitted_calibrators_and_both_sides(tmp_path):
    report = calibrate(HALF, {"test": OTHER}, ["Temperature", Temperature()], intervals=None, metrics="nll,ece")
    by_hand = Temperature().fit(*HALF)
    assert list(report.calibrators) == ["Temperature"]
    assert report.calibrators["Temperature"].temperature == by_hand.temperature
    after = report.rows["test"]["Temperature"].values.values
    assert after["nll"] == pytest.approx(float(functional.nll(by_hand(OTHER[0]), OTHER[1])), abs=1e-12)
    assert report.rows["test"]["uncalibrated"].values.values == pytest.approx(
        score(OTHER, metrics="nll,ece").values, abs=1e-15
    )
    folder = report.save(tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["Temperature.pt", "report.json", "report.md"]
    assert load_calibrator(folder / "Temperature.pt").temperature == by_hand.temperature
    assert json.loads((folder / "report.json").read_text()) == json.loads(report.to_json())
    assert (folder / "report.md").read_text() == report.to_markdown()
    assert report.save(tmp_path / "out").name == "out-2"


def test_features_come_as_a_third_part_or_from_the_file(tmp_path):
    logits, labels = random_set(200, 3)
    features = torch.tanh(logits @ torch.ones(3, 4, dtype=logits.dtype))
    sets = [(part[:100] if first else part[100:]) for first in (True, False) for part in (logits, labels, features)]
    report = calibrate(tuple(sets[:3]), tuple(sets[3:]), DensityRatio(), intervals=None, metrics="correctness_auroc")
    direct = DensityRatio().fit(*sets[:3]).predict(sets[3], sets[5])
    found = report.rows["set"]["DensityRatio"].values.values["correctness_auroc"]
    area = functional.correctness_auroc(sets[3], sets[4], confidence=direct.confidence)
    assert found == pytest.approx(float(area), abs=1e-12)
    for name, part in (("cal", sets[:3]), ("test", sets[3:])):
        np.savez(tmp_path / f"{name}.npz", logits=part[0], labels=part[1], h=part[2])
    files = calibrate(
        tmp_path / "cal.npz",
        tmp_path / "test.npz",
        DensityRatio(),
        features_key="h",
        intervals=None,
        metrics="correctness_auroc",
    )
    assert files.rows["test"]["DensityRatio"].values.values["correctness_auroc"] == found


def test_the_callers_calibrator_stays_as_it_was():
    mine = Temperature()
    report = calibrate(HALF, OTHER, mine, intervals=None, metrics="nll")
    assert not mine.fitted
    assert report.calibrators["Temperature"].fitted


def test_names_do_not_collide(tmp_path):
    np.savez(tmp_path / "set.npz", logits=LOGITS, labels=LABELS)
    report = score([tmp_path / "set.npz", HALF], metrics="accuracy")
    assert list(report.sets) == ["set", "set (tensors)"]


def test_each_comparison_is_named():
    others = {"a": (-HALF[0], HALF[1]), "b": (-OTHER[0], OTHER[1])}
    report = score({"a": HALF, "b": OTHER}, compare=list(others.values()), metrics="accuracy")
    assert report.compared_with == {"a": "predictions", "b": "predictions"}


def test_scores_in_a_file_and_labels_in_memory_or_another_file(tmp_path):
    np.save(tmp_path / "logits.npy", LOGITS)
    np.save(tmp_path / "labels.npy", LABELS)
    whole = score(LOGITS, LABELS, metrics="core").values
    assert score(tmp_path / "logits.npy", LABELS, metrics="core").values == whole
    assert score((tmp_path / "logits.npy", tmp_path / "labels.npy"), metrics="core").values == whole


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_column_of_probabilities_is_class_one_of_two(shape):
    p, labels = torch.tensor([0.9, 0.2, 0.6, 0.3], dtype=torch.float64), torch.tensor([1, 0, 0, 1])
    both = torch.stack([1 - p, p], dim=1)
    found = score(p.reshape(shape), labels, input="probs", metrics="core").values
    assert found == score(both, labels, input="probs", metrics="core").values
    with pytest.raises(ValueError, match=r"one column of values in \[0, 1\].*input=probs.*0 and z"):
        score(p.reshape(shape), labels)


def test_a_report_shows_itself_as_a_table():
    report = score(HALF, metrics="core")
    assert repr(report) == report.table()


def test_predictions_made_by_hand_are_checked():
    assert (
        score(Predictions(LOGITS.numpy(), LABELS.numpy()), metrics="core").values
        == score(LOGITS, LABELS, metrics="core").values
    )
    probs = Predictions(LOGITS.softmax(1), LABELS, input="probs")
    assert score(probs, metrics="nll").input == "probs"
    with pytest.raises(ValueError, match=r"must be in 0\.\.1"):
        score(Predictions(LOGITS[:, :1], LABELS + 1))


def test_a_calibrator_that_fails_does_not_cost_the_others():
    class Failing(Temperature):
        def fit_rows(self, logits, labels, features):
            raise RuntimeError("no luck")

    report = calibrate(HALF, OTHER, [Failing(), "Temperature"], intervals=None, metrics="nll")
    assert report.failed == {"Failing": "no luck"}
    assert list(report.calibrators) == ["Temperature"]
    assert "Failed: Failing: no luck" in report.table()


def test_apply_keeps_what_it_was(tmp_path):
    np.savez(tmp_path / "run.npz", logits=LOGITS, labels=LABELS, class_names=np.array(list("abcde")))
    predictions = read_predictions(tmp_path / "run.npz")
    assert isinstance(predictions, Predictions)
    calibrated = apply(Temperature().fit(*HALF), predictions)
    assert calibrated.origin.class_names == tuple("abcde")
    assert calibrated.origin.calibrator == "Temperature"
    assert "calibrated by Temperature" in score(calibrated, metrics="nll").table()
    with pytest.raises(ValueError, match="fitted to 5"):
        apply(Temperature().fit(*HALF), predictions._replace(scores=LOGITS[:, :4]))


def test_settings_are_checked_and_plain():
    assert Settings(metrics=["nll", "ece"], bins=[10, 10, 15]) == Settings(metrics="nll,ece", bins=(10, 15))


def test_the_face_is_lazy_and_complete():
    program = (
        "import sys, calib_lightning\n"
        "print(*[name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])\n"
        "from calib_lightning import score\n"
        "print(*[name for name in ('lightning', 'timm') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n\n"
    for name in calib_lightning.__all__:
        assert getattr(calib_lightning, name) is not None
    assert set(calib_lightning.__all__) <= set(dir(calib_lightning))
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = calib_lightning.scores


def test_the_best_value_of_each_column_is_bold():
    report = calibrate(
        HALF, OTHER, "Temperature,FixedTemperature(50.0)", intervals=None, metrics="accuracy,nll,entropy"
    )
    table = next(report.grids())
    values = {name: row.values.values for name, row in report.rows["set"].items()}
    best = min(values, key=lambda name: values[name]["nll"])
    for name, accuracy, nll, entropy in table.rows:
        assert not accuracy.startswith("**")  # equal for all
        assert nll.startswith("**") == (name == best)
        assert not entropy.startswith("**")  # no direction is better
    assert "Bold (plain text: between stars): the best value." in report.table()
    assert "**" not in next(calibrate(HALF, OTHER, "FixedTemperature(1.0)", intervals=None).grids()).rows[0][2]
