"""A saved calibrator on rows without labels: `calib apply`, `apply_to_file` and `apply_calibrator`."""

import csv
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

from calib_lightning import apply_calibrator, calibrate, load_calibrator, save_calibrator, score
from calib_lightning.__main__ import main
from calib_lightning.posthoc import DensityRatio, FixedTemperature, TopLabel, VectorScaling, as_logits
from calib_lightning.posthoc.isotonic import Isotonic
from calib_lightning.predictions import Reading, apply_to_file

from ..metrics.golden import random_set

LOGITS, LABELS = random_set(80, 3)
PROBS = LOGITS.softmax(dim=1)
NAMES = ["cat", "dog", "eel"]
TEXT = np.array(NAMES)[LABELS]
FITTED = VectorScaling().fit(LOGITS, LABELS)
EXPECTED = FITTED(as_logits(PROBS)).exp().numpy()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_calibrator(FITTED, "cal.pt")


def _table(**columns):
    return pandas.DataFrame(PROBS.numpy(), columns=NAMES).assign(**columns)


def test_a_csv_file_keeps_all_but_its_scores(capsys):
    ids = [f"=img,{i}" for i in range(80)]
    _table(id=ids, label=TEXT).to_csv("new.csv")
    assert main(["apply", "new.csv", "--calibrator", "cal.pt", "--input", "probs", "--output", "out.csv"]) == 0
    said = capsys.readouterr().out
    assert "'cat' to 'eel', which are taken as the classes" in said
    assert "out.csv: calibrated probabilities of 80 rows and 3 classes, by VectorScaling" in said
    with Path("out.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["", *NAMES, "id", "label"]
    assert [row[4] for row in rows] == ids
    assert np.array([row[1:4] for row in rows], dtype=float) == pytest.approx(EXPECTED, abs=1e-12)
    after = score("new.csv", input="probs", metrics="nll").values["nll"]
    assert score("out.csv", input="probs", metrics="nll").values["nll"] < after


def test_labels_are_not_needed_and_columns_keep_their_places():
    _table()[["eel", "cat", "dog"]].set_axis(["2", "0", "1"], axis=1).to_csv("new.csv")
    apply_to_file(FITTED, "new.csv", "out.csv", Reading(input="probs"))
    assert pandas.read_csv("out.csv")[["0", "1", "2"]].to_numpy() == pytest.approx(EXPECTED, abs=1e-12)


@pytest.mark.parametrize(("column", "kind"), [("z", "logits"), ("prob", "probs"), ("eel", "probs")])
def test_one_column_becomes_the_probability_of_its_class(column, kind):
    z = (LOGITS[:, 1] - LOGITS[:, 0]).numpy()
    halved = FixedTemperature(2.0).fit(LOGITS[:, :2], LABELS.clamp(max=1))
    values = z if kind == "logits" else 1 / (1 + np.exp(-z))
    pandas.DataFrame({column: values}).to_csv("new.csv", index=False)
    apply_to_file(halved, "new.csv", "out.csv", Reading(input=kind))
    out = pandas.read_csv("out.csv")
    assert list(out.columns) == ["p" if column == "z" else column]
    assert out.to_numpy()[:, 0] == pytest.approx(1 / (1 + np.exp(-z / 2)), abs=1e-12)


def test_an_archive_keeps_its_other_arrays(capsys):
    names = np.array(NAMES)
    np.savez("new.npz", logits=LOGITS, index=np.arange(80), labels=LABELS, confidence=np.ones(80), class_names=names)
    assert main(["apply", "new.npz", "--calibrator", "cal.pt", "--output", "out.npz"]) == 0
    out = np.load("out.npz")
    assert sorted(out) == ["class_names", "index", "labels", "probs"]
    assert out["class_names"].tolist() == NAMES
    assert out["index"].tolist() == list(range(80))
    assert out["probs"] == pytest.approx(FITTED(LOGITS).exp().numpy(), abs=1e-12)
    np.save("new.npy", LOGITS)
    apply_to_file("cal.pt", "new.npy", "plain.npz")
    assert (np.load("plain.npz")["probs"] == out["probs"]).all()


def test_columns_in_another_order_than_in_the_fit_are_refused(capsys):
    _table(label=TEXT).to_csv("new.csv", index=False)
    frame = _table()
    report = calibrate((frame[:40], TEXT[:40]), (frame[40:], TEXT[40:]), "VectorScaling", intervals=None, input="probs")
    report.save("made")
    frame = frame[NAMES[::-1]]
    frame.assign(label=TEXT).to_csv("turned.csv", index=False)
    expected = apply_calibrator(report.calibrators["VectorScaling"], _table(), input="probs")
    assert apply_calibrator("made/VectorScaling.pt", _table(), input="probs").equals(expected)
    assert apply_calibrator("made/VectorScaling.pt", PROBS, input="probs").numpy() == pytest.approx(expected.to_numpy())
    words = "the classes are 'eel', 'dog', 'cat'; VectorScaling was fitted to 'cat', 'dog', 'eel', in this order"
    with pytest.raises(ValueError, match=words):
        apply_calibrator("made/VectorScaling.pt", frame, input="probs")
    for argv in (("score", "turned.csv"), ("apply", "turned.csv", "--output", "out.csv")):
        assert main([*argv, "--input", "probs", "--calibrator", "made/VectorScaling.pt"]) == 1
        assert words in capsys.readouterr().err
    assert report.calibrators["VectorScaling"].fit(LOGITS, LABELS).class_names is None


def test_no_uncalibrated_scores_stay_in_an_archive():
    np.savez("new.npz", logits=LOGITS, probs=PROBS, labels=LABELS)
    apply_to_file(FITTED, "new.npz", "out.npz", Reading(input="probs"))
    assert sorted(np.load("out.npz")) == ["labels", "probs"]
    with pytest.raises(ValueError, match="has no 'logits'"):
        score("out.npz")


def test_a_confidence_of_the_calibrators_own_is_written():
    features = torch.tanh(LOGITS @ torch.ones(3, 4, dtype=LOGITS.dtype)) + torch.arange(80)[:, None] / 80
    ratio = DensityRatio().fit(LOGITS, LABELS, features)
    np.savez("new.npz", logits=LOGITS, h=features)
    apply_to_file(ratio, "new.npz", "out.npz", Reading(features_key="h"))
    own = ratio.predict(LOGITS, features).confidence
    assert np.load("out.npz")["confidence"] == pytest.approx(own.numpy())
    top = TopLabel(Isotonic()).fit(LOGITS, LABELS)
    _table(confidence=0.0).to_csv("new.csv", index=False)
    apply_to_file(top, "new.csv", "out.csv", Reading(input="probs"))
    found = pandas.read_csv("out.csv")
    expected = top.predict(as_logits(PROBS))
    assert found["confidence"].to_numpy() == pytest.approx(
        (expected.logits.exp().amax(1) if expected.confidence is None else expected.confidence).numpy()
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("new.csv", "--output", "out.npz"), ["suffix must be .csv"]),
        (("new.csv", "--output", "new.csv"), ["which this command reads"]),
        (("./new.csv", "--output", "link.csv"), ["which this command reads"]),
        (("new.csv", "--output", "cal.pt"), ["which this command reads"]),
        (("two.csv", "--output", "out.csv"), ["2 classes", "fitted to 3"]),
        (("logits.csv", "--output", "out.csv"), ["row 0", "sum to 1"]),
    ],
)
def test_nothing_is_written_over_or_for_wrong_rows(capsys, tmp_path, argv, words):
    _table().to_csv("new.csv", index=False)
    (tmp_path / "link.csv").symlink_to("new.csv")
    pandas.DataFrame({"cat": [0.5, 0.25], "dog": [0.5, 0.75]}).to_csv("two.csv", index=False)
    pandas.DataFrame(LOGITS.numpy(), columns=NAMES).to_csv("logits.csv", index=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["apply", *argv, "--calibrator", "cal.pt", "--input", "probs"]) == 1
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_scores_in_memory_keep_their_kind():
    frame = _table().set_axis([f"row-{i}" for i in range(80)])
    found = apply_calibrator("cal.pt", frame, input="probs")
    assert list(found.columns) == NAMES
    assert list(found.index) == list(frame.index)
    assert found.to_numpy() == pytest.approx(EXPECTED, abs=1e-12)
    assert apply_calibrator(load_calibrator("cal.pt"), PROBS.numpy(), input="probs") == pytest.approx(
        EXPECTED, abs=1e-12
    )
    assert torch.equal(apply_calibrator(FITTED, LOGITS), FITTED(LOGITS).exp())
    reordered = apply_calibrator(FITTED, frame.set_axis([2, 0, 1], axis=1)[[0, 1, 2]], input="probs")
    whole = apply_calibrator(FITTED, frame.set_axis([2, 0, 1], axis=1), input="probs")
    assert whole[[0, 1, 2]].to_numpy() == pytest.approx(reordered.to_numpy(), abs=1e-15)
    with pytest.raises(ValueError, match="look like probabilities"):
        apply_calibrator(FITTED, PROBS)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_probabilities_of_class_one_keep_their_shape(shape):
    halved = FixedTemperature(2.0).fit(LOGITS[:, :2], LABELS.clamp(max=1))
    p = np.array([0.9, 0.1, 0.5]).reshape(shape)
    found = apply_calibrator(halved, p, input="probs")
    assert found == pytest.approx(np.sqrt(p) / (np.sqrt(p) + np.sqrt(1 - p)), abs=1e-12)


def test_a_series_stays_a_series():
    halved = FixedTemperature(2.0).fit(LOGITS[:, :2], LABELS.clamp(max=1))
    p = pandas.Series([0.9, 0.1, 0.5], index=["a", "b", "c"], name="spam")
    found = apply_calibrator(halved, p, input="probs")
    pandas.testing.assert_series_equal(found, np.sqrt(p) / (np.sqrt(p) + np.sqrt(1 - p)))


@pytest.mark.parametrize(
    ("calibrator", "scores", "words"),
    [
        (FITTED, pandas.DataFrame([["a", "b", "c"]]), "scores are of the type object; they must be numbers"),
        (FITTED, 3.0, r"scores are the number 3\.0; they must have shape \(N, K\)"),
        (FITTED, [[1.0, 2.0, 3.0], [1.0]], "scores are lists of different lengths"),
        (None, LOGITS, "calibrator is None; it must be a fitted calibrator or a file"),
    ],
)
def test_what_is_no_calibrator_and_no_scores_is_named(calibrator, scores, words):
    with pytest.raises((TypeError, ValueError), match=words):
        apply_calibrator(calibrator, scores)


def test_probabilities_that_are_no_numbers_are_named():
    with pytest.raises(TypeError, match="as_logits: probs are of the type <U3; they must be numbers"):
        as_logits("abc")
    with pytest.raises(ValueError, match="predictions: scores are lists of different lengths"):
        score([[1, 2], [3]], [0, 1])
    with pytest.raises(ValueError, match="predictions: labels are lists of different lengths"):
        score(LOGITS[:2], [[0], [1, 2]])


def test_further_tensors_of_a_file_need_not_be_of_numpy():
    extra = torch.ones(80, 2, dtype=torch.bfloat16)
    torch.save({"logits": LOGITS, "features": extra}, "new.pt")
    apply_to_file(FITTED, "new.pt", "out.npz")
    assert np.load("out.npz")["features"].dtype == np.float32
    torch.save({"logits": LOGITS, "graph": torch.eye(80).to_sparse()}, "new.pt")
    with pytest.raises(ValueError, match=r"new\.pt: 'graph' is torch\.float32 \(torch\.sparse_coo\), which no \.npz"):
        apply_to_file(FITTED, "new.pt", "out.npz")
