"""Classes that have names: in the header of a CSV file, as columns of a DataFrame, and as labels."""

import numpy as np
import pandas
import pytest

from calib_lightning import calibrate, score
from calib_lightning.predictions.class_names import numbered

from ..metrics.golden import random_set

LOGITS, LABELS = random_set(60, 3)
PROBS, Y = LOGITS.softmax(dim=1).numpy(), LABELS.numpy()
NAMES = ["cat", "dog", "eel"]
TEXT = np.array(NAMES)[Y]
CORE = score(PROBS, Y, input="probs", metrics="core").values


def _scored(source, labels=None):
    return score(source, labels, input="probs", metrics="core")


def _file(path, columns, labels, **options):
    table = pandas.DataFrame(PROBS, columns=columns)
    table["label"] = labels
    table.to_csv(path, **options)
    return path


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("labels", [TEXT, Y])
def test_headers_of_a_file_are_the_names_of_the_classes(tmp_path, labels, index):
    report = _scored(_file(tmp_path / "run.csv", NAMES, labels, index=index))
    assert report.values == CORE
    assert report.sets["run"].predictions.origin.class_names == tuple(NAMES)
    assert "'cat' to 'eel', which are taken as the classes, in this order; the labels are column 'label'" in repr(
        report
    )
    assert '"class_names": [\n        "cat",' in report.to_json()


@pytest.mark.parametrize("labels", ["text", "numbers"])
@pytest.mark.parametrize(("prefix", "named"), [("class_", True), ("z", False), ("prob_", False), ("scores", False)])
def test_numbered_names_of_classes_are_names(tmp_path, prefix, named, labels):
    columns = [f"{prefix}{number}" for number in range(3)]
    if labels == "text" and not named:
        with pytest.raises(ValueError, match="the classes have no names"):
            _scored(_file(tmp_path / "run.csv", columns, np.array(columns)[Y]))
        return
    report = _scored(_file(tmp_path / "run.csv", columns, np.array(columns)[Y] if labels == "text" else Y))
    assert report.values == CORE
    assert report.sets["run"].predictions.origin.class_names == (tuple(columns) if named else None)


@pytest.mark.parametrize(("columns", "names"), [(["2", "0", "1"], None), (["7", "3", "5"], ("3", "5", "7"))])
def test_whole_numbers_are_matched_in_any_order(tmp_path, columns, names):
    labels = np.array(columns)[Y].astype(int)
    made = _scored(pandas.DataFrame(PROBS, columns=map(int, columns)), labels)
    for report in (_scored(_file(tmp_path / "run.csv", columns, labels)), made):
        assert report.values == pytest.approx(CORE, abs=1e-12)
        (entry,) = report.sets.values()
        assert entry.predictions.origin.class_names == names


def test_classes_from_one_need_no_label_column_to_be_told(tmp_path):
    _file(tmp_path / "run.csv", ["1", "2", "3"], Y + 1, index=False)
    pandas.DataFrame(PROBS, columns=["1", "2", "3"]).to_csv(tmp_path / "scores.csv", index=False)
    pandas.Series(Y + 1, name="label").to_csv(tmp_path / "labels.csv", index=False)
    assert _scored(tmp_path / "run.csv").values == CORE
    assert _scored((tmp_path / "scores.csv", tmp_path / "labels.csv")).values == CORE


def test_the_index_of_pandas_is_skipped_when_it_was_read_and_written_again(tmp_path):
    again = pandas.read_csv(_file(tmp_path / "once.csv", NAMES, TEXT))
    again.to_csv(tmp_path / "twice.csv")
    assert _scored(tmp_path / "twice.csv").values == CORE


@pytest.mark.parametrize("column", ["p", "prob", "proba", "probability", "score", "eel"])
@pytest.mark.parametrize("labels", [[1, 0, 0, 1], [True, False, False, True]])
def test_one_column_of_a_binary_classifier(tmp_path, column, labels):
    pandas.DataFrame({column: [0.9, 0.2, 0.6, 0.3], "label": labels}).to_csv(tmp_path / "run.csv", index=False)
    found = _scored(tmp_path / "run.csv")
    assert found.values["brier"] == pytest.approx(2 * np.mean(np.square([0.1, 0.2, 0.6, 0.7])))
    assert f"1 column of the file, '{column}', of class" in repr(found)


@pytest.mark.parametrize(("column", "labels"), [("eel", ["eel", "cat", "cat", "eel"]), ("4", [4, 2, 2, 4])])
def test_one_column_that_is_named_by_its_class(tmp_path, column, labels):
    pandas.DataFrame({column: [0.9, 0.2, 0.6, 0.3], "label": labels}).to_csv(tmp_path / "run.csv", index=False)
    found = _scored(tmp_path / "run.csv")
    assert found.values["brier"] == pytest.approx(2 * np.mean(np.square([0.1, 0.2, 0.6, 0.7])))
    assert found.sets["run"].predictions.origin.class_names == (str(labels[1]), column)


@pytest.mark.parametrize("labels", [TEXT, list(TEXT), pandas.Series(TEXT), pandas.Categorical(TEXT), Y, TEXT[:, None]])
def test_columns_of_a_frame_are_the_names_of_the_classes(labels):
    report = _scored(pandas.DataFrame(PROBS, columns=NAMES), labels)
    assert report.values == CORE
    assert report.sets["set"].predictions.origin.class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("columns", "labels", "words"),
    [
        (NAMES, np.where(TEXT == "dog", "Dog", TEXT), ["label 'Dog'", "'cat', 'dog', 'eel'", "Did you mean dog?"]),
        (["1", "2", "3"], Y, ["label '0'", "'1', '2', '3'"]),
        (["0", "1", "2"], TEXT, ["label", "whole number", "no names", "columns=model.classes_"]),
        (["0", "1", "1"], Y, ["same name"]),
        (["id_of_image", "0", "1"], Y, ["unrecognised columns: 'id_of_image'", "names of their classes"]),
    ],
)
def test_what_is_no_class_is_named(tmp_path, columns, labels, words):
    _file(tmp_path / "run.csv", [f"{name}" for name in columns], labels, index=False)
    frame = pandas.DataFrame(PROBS, columns=columns)
    for source in ((tmp_path / "run.csv", None), (frame, labels)):
        with pytest.raises(ValueError) as error:
            _scored(*source)
        for word in words:
            assert word in str(error.value)


@pytest.mark.parametrize("missing", ["", None, np.nan, pandas.NA])
def test_a_missing_label_is_no_class(tmp_path, missing):
    labels = ["spam", "spam", missing, "spam"]
    p = [0.9, 0.8, 0.1, 0.7]
    pandas.DataFrame({"spam": p, "label": labels}).to_csv(tmp_path / "run.csv", index=False)
    for source in ((tmp_path / "run.csv",), (pandas.DataFrame({"spam": p}), labels)):
        with pytest.raises(ValueError, match=r"row 2 has no label \('.*'\); each row must have one\."):
            _scored(*source)
    with pytest.raises(ValueError, match="row 1 has no label"):
        _scored(pandas.DataFrame({"spam": p}), [1.0, np.nan, 1.0, 0.0])
    assert _scored(pandas.DataFrame({"spam": p}), ["None" if label is not labels[0] else label for label in labels])


def test_a_column_that_is_no_class_is_named(tmp_path):
    frame = pandas.DataFrame(LOGITS.numpy(), columns=NAMES).assign(age=np.arange(60) + 20, label=TEXT)
    frame.to_csv(tmp_path / "run.csv", index=False)
    for source in ((tmp_path / "run.csv",), (frame.drop(columns="label"), TEXT)):
        with pytest.raises(ValueError, match=r"'age' must be the scores of a class.*Drop what is no class\."):
            score(*source)
    path = _file(tmp_path / "fold.csv", NAMES, TEXT)
    pandas.read_csv(path, index_col=0).assign(fold=0).to_csv(path)
    assert _scored(path).notes[0] == "fold: no row has the label 'fold'; drop columns that are no class"
    frame = pandas.DataFrame(PROBS, columns=NAMES)
    assert "no row has the label 'eel'" in repr(_scored(frame[Y < 2], TEXT[Y < 2]))
    assert "no row has the label" not in repr(_scored(frame, TEXT))


def test_labels_as_text_of_an_array_ask_for_names():
    with pytest.raises(ValueError, match=r"row 0 has label '\w+'; it must be a whole number.*columns=model.classes_"):
        _scored(PROBS, TEXT)
    with pytest.raises(
        ValueError, match="the labels are 'cat', 'dog', 'eel'; they must be 'cat', which names the column"
    ):
        numbered(TEXT, ("cat",), "x")


@pytest.mark.parametrize(
    ("cell", "words"), [("", "column 2 'dog' is empty in row 1"), ("x", "column 2 'dog' has 'x' in")]
)
def test_a_cell_that_is_no_number_is_named_by_its_column(tmp_path, cell, words):
    (tmp_path / "run.csv").write_text(f"cat,dog,label\n0.5,0.5,cat\n0.5,{cell},dog\n")
    with pytest.raises(ValueError, match=words):
        _scored(tmp_path / "run.csv")


def test_sets_have_the_same_classes_in_the_same_order():
    held_out = pandas.DataFrame(PROBS[:30], columns=NAMES), TEXT[:30]
    test = pandas.DataFrame(PROBS[30:], columns=NAMES), TEXT[30:]
    report = calibrate(held_out, test, intervals=None, metrics="nll", input="probs")
    plain = calibrate((PROBS[:30], Y[:30]), (PROBS[30:], Y[30:]), intervals=None, metrics="nll", input="probs")
    found, same = (each.rows["set"]["Temperature"].values.values["nll"] for each in (report, plain))
    assert found == pytest.approx(same, abs=1e-12)
    with pytest.raises(ValueError, match="same classes in the same order, but have 'cat', 'dog', 'eel' and 'eel'"):
        calibrate(held_out, (test[0][NAMES[::-1]], test[1]), intervals=None, metrics="nll", input="probs")


def test_the_other_class_of_one_column_has_no_name_that_could_differ():
    frame = pandas.DataFrame({"spam": PROBS[:, 1]})
    text, numbers = np.where(Y == 1, "spam", "ham"), (Y == 1).astype(int)
    for first, second in ((text, numbers), (numbers, text)):
        report = calibrate((frame[:30], first[:30]), (frame[30:], second[30:]), intervals=None, input="probs")
        assert list(report.calibrators) == ["Temperature"]
    other = frame.set_axis(["eel"], axis=1)
    with pytest.raises(ValueError, match="same classes in the same order, but have 'ham', 'spam' and 'not eel', 'eel'"):
        calibrate((frame[:30], text[:30]), (other[30:], numbers[30:]), intervals=None, input="probs")
