"""Names of classes and distributions of labels: from the data through a run to every answer."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from calib_lightning.callbacks import RunRecord, SavePredictions
from calib_lightning.core import ClassificationModule, load_module
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.deploy import CalibratedClassifier, Preprocessing, export_onnx, export_torch, save_classifier
from calib_lightning.metrics import functional
from calib_lightning.posthoc import FixedTemperature
from tests.ddp.cases import sgd, trainer

from .conftest import QUICK

NAMES = ("ant", "bee", "cat")
SOFT = ("soft_nll", "soft_brier", "label_entropy")


class Named(ToyDataModule):
    """Toy images with names, and votes on those of the test set."""

    class_names = NAMES

    def label_distributions(self, name):
        if name != "test":
            return None
        votes = torch.rand(len(self.source_rows(name)), 3, generator=torch.Generator().manual_seed(3))
        return votes / votes.sum(1, keepdim=True)


def module():
    torch.manual_seed(0)
    return ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)


def fitted(folder, data):
    run = trainer(folder, max_epochs=1)
    made = module()
    run.fit(made, datamodule=data)
    run.save_checkpoint(folder / "made.ckpt")
    return folder / "made.ckpt"


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught if "of the data is" in str(warning.message)]


# --- the module and its checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_keeps_the_names(tmp_path):
    path = fitted(tmp_path, Named(SplitSpec(val=30)))
    record = torch.load(path, weights_only=True)["calib_lightning"]
    assert record["class_names"] == list(NAMES)
    assert load_module(path).class_names == NAMES
    # a file of an older version has no names, and takes those of the data
    content = torch.load(path, weights_only=True)
    del content["calib_lightning"]["class_names"]
    torch.save(content, tmp_path / "older.ckpt")
    older = load_module(tmp_path / "older.ckpt")
    assert older.class_names is None
    trainer(tmp_path).test(older, datamodule=Named(), verbose=False)
    assert older.class_names == NAMES


def test_data_without_names_leaves_them_alone(tmp_path):
    made = load_module(fitted(tmp_path, Named(SplitSpec(val=30))))
    trainer(tmp_path).test(made, datamodule=ToyDataModule(), verbose=False)
    assert made.class_names == NAMES
    assert load_module(fitted(tmp_path / "plain", ToyDataModule(SplitSpec(val=30)))).class_names is None


def test_other_names_than_those_of_the_checkpoint_are_told_once(tmp_path):
    path = fitted(tmp_path, Named(SplitSpec(val=30)))
    other = Named(SplitSpec(val=30))
    other.class_names = ("ant", "cat", "bee")
    made = load_module(path)
    said = warned(lambda: trainer(tmp_path).test(made, datamodule=other, verbose=False))
    assert len(said) == 1
    assert said[0].startswith("Class 1 of the data is 'cat', but 'bee' in the network.")
    assert made.class_names == NAMES  # what the network says is as it was
    for command in ("validate", "predict"):
        assert len(warned(lambda command=command: getattr(trainer(tmp_path), command)(made, datamodule=other))) == 1
    # a fit that goes on with such data learns its names
    resumed = module()
    said = warned(lambda: trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=other, ckpt_path=path))
    assert len(said) == 1
    assert resumed.class_names == ("ant", "cat", "bee")
    assert warned(lambda: trainer(tmp_path).test(load_module(path), datamodule=Named(), verbose=False)) == []


def test_names_of_another_number_of_classes_are_refused(tmp_path):
    data = Named()
    data.class_names, data.num_classes = (*NAMES, "dog"), 4
    with pytest.raises(ValueError, match="has 4 class names; it must have one for each of the module's 3 classes"):
        trainer(tmp_path).test(module(), datamodule=data, verbose=False)


# --- what a test writes ----------------------------------------------------------------------------------------------


def evaluated(folder, data):
    run = trainer(folder, callbacks=[SavePredictions(folder / "predictions"), RunRecord(folder)])
    run.test(module(), datamodule=data, verbose=False)
    return run


def test_a_test_writes_names_and_distributions_and_scores_them(tmp_path, calib):
    data = Named(SplitSpec(calibration=30))
    run = evaluated(tmp_path, data)
    assert json.loads((tmp_path / "run.json").read_text())["class_names"] == list(NAMES)
    stored = np.load(tmp_path / "predictions" / "test.npz")  # no pickles
    assert stored["class_names"].tolist() == list(NAMES)
    votes = data.label_distributions("test")
    assert stored["label_distribution"].dtype == np.float32
    assert np.array_equal(stored["label_distribution"], votes.numpy()[stored["index"]])
    other = np.load(tmp_path / "predictions" / "calibration.npz")
    assert other["class_names"].tolist() == list(NAMES)
    assert "label_distribution" not in other
    logits, labels = torch.from_numpy(stored["logits"]), torch.from_numpy(stored["label_distribution"])
    expected = {
        "soft_nll": functional.soft_nll(logits, labels).item(),
        "soft_brier": functional.soft_brier(logits, labels).item(),
        "label_entropy": functional.label_entropy(labels).item(),
    }
    logged = {key: float(run.callback_metrics[f"test/{key}"]) for key in SOFT}
    assert logged == pytest.approx(expected, rel=1e-6)
    assert not any(key.startswith("calibration/soft") for key in run.callback_metrics)

    assert calib("score", tmp_path / "predictions" / "test.npz", "--output", "all.json").code == 0
    entry = json.loads((tmp_path / "all.json").read_text())["sets"]["test"]
    assert {key: entry["values"][key] for key in SOFT} == pytest.approx(expected, rel=1e-12)
    assert entry["class_names"] == list(NAMES)


def test_data_of_ones_own_has_neither(tmp_path):
    run = evaluated(tmp_path, ToyDataModule(SplitSpec(calibration=30)))
    assert "class_names" not in json.loads((tmp_path / "run.json").read_text())
    assert set(np.load(tmp_path / "predictions" / "test.npz").files) == {"logits", "labels", "index"}
    assert not any("soft" in key for key in run.callback_metrics)


@pytest.mark.parametrize("wrong", ["rows", "shape", "sum"])
def test_distributions_that_do_not_fit_are_refused(tmp_path, wrong):
    class Broken(Named):
        def label_distributions(self, name):
            votes = super().label_distributions(name)
            if votes is None:
                return None
            return {"rows": votes[:-1], "shape": votes[0], "sum": 3 * votes}[wrong]

    message = "invalid soft labels" if wrong == "sum" else r"label_distributions\('test'\) has shape"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).test(module(), datamodule=Broken(), verbose=False)


def _on_each(rank, world, folder):
    data = Named(SplitSpec(calibration=30), batch_size=16)
    run = trainer(folder, world, [SavePredictions(f"{folder}/predictions")])
    run.test(module(), datamodule=data, verbose=False)
    return {key: float(run.callback_metrics[f"test/{key}"]) for key in SOFT}


def test_two_processes_score_and_save_what_one_does(pool2, tmp_path):
    alone = _on_each(0, 1, str(tmp_path / "one"))
    assert pool2.run(_on_each, str(tmp_path / "two")) == [pytest.approx(alone, rel=1e-6)] * 2
    one, two = (np.load(tmp_path / name / "predictions" / "test.npz") for name in ("one", "two"))
    assert one.files == two.files
    assert np.array_equal(one["label_distribution"], two["label_distribution"])


# --- calib score -----------------------------------------------------------------------------------------------------


@pytest.fixture
def predictions(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    logits = torch.randn(60, 3, generator=generator) + torch.nn.functional.one_hot(labels, 3)
    return {"logits": logits.numpy(), "labels": labels.numpy()}


@pytest.mark.parametrize("suffix", ["npz", "pt"])
def test_groups_and_the_worst_class_have_names(calib, tmp_path, predictions, suffix):
    if suffix == "npz":
        np.savez(tmp_path / "a.npz", **predictions, class_names=np.array(NAMES))
    else:
        tensors = {name: torch.from_numpy(value) for name, value in predictions.items()}
        torch.save({**tensors, "class_names": list(NAMES)}, tmp_path / "a.pt")
    argv = ("score", f"a.{suffix}", "--groups", "class", "--metrics", "accuracy,nll")
    assert calib(*argv, "--output", "a.json").code == 0
    entry = json.loads((tmp_path / "a.json").read_text())["sets"]["a"]
    assert list(entry["groups"]) == list(NAMES)
    worst = entry["worst_class"]["nll"]
    losses = {name: group["values"]["nll"] for name, group in entry["groups"].items()}
    assert worst["name"] == NAMES[worst["class"]] == max(losses, key=losses.get)
    out = calib(*argv).out
    assert f"({worst['name']})" in next(line for line in out.splitlines() if "worst class" in line)
    assert all(any(line.startswith(f"│ {name} ") for line in out.splitlines()) for name in NAMES)


def test_a_name_of_two_classes_is_numbered(calib, tmp_path, predictions):
    np.savez(tmp_path / "a.npz", **predictions, class_names=np.array(["crane", "bee", "crane"]))
    assert calib("score", "a.npz", "--groups", "class", "--output", "a.json").code == 0
    entry = json.loads((tmp_path / "a.json").read_text())["sets"]["a"]
    assert list(entry["groups"]) == ["crane (0)", "bee", "crane (2)"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (np.array(["ant", "bee"]), "a.npz: class_names are ['ant', 'bee']; they must be 3 strings"),
        (np.arange(3), "a.npz: class_names are [0, 1, 2]; they must be 3 strings"),
        (np.array(NAMES, dtype=object), "a.npz: 'class_names' cannot be read"),
        (np.array("ant"), "a.npz: class_names are 'ant'; they must be 3 strings"),
    ],
)
def test_wrong_names_in_a_file_are_refused(calib, tmp_path, predictions, names, message):
    np.savez(tmp_path / "a.npz", **predictions, class_names=names)
    done = calib("score", "a.npz")
    assert done.code == 1
    assert f"calib: error: {message}" in done.err


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (np.ones((60, 3)), "60 of 60 rows have invalid soft labels; row 0"),
        (np.full((60, 2), 0.5), "must have the shape (60, 3)"),
        (np.ones((60, 3), dtype=np.int64), "soft labels are torch.int64; they must be floating point"),
    ],
)
def test_wrong_distributions_in_a_file_are_refused(calib, tmp_path, predictions, distribution, message):
    np.savez(tmp_path / "a.npz", **predictions, label_distribution=distribution)
    done = calib("score", "a.npz")
    assert done.code == 1
    assert "a.npz: label_distribution: " in done.err
    assert message in done.err


def test_metrics_of_distributions_can_be_named(calib, tmp_path, predictions):
    p = np.full((60, 3), 1 / 3)
    np.savez(tmp_path / "a.npz", **predictions, label_distribution=p)
    for metrics, keys in (
        ("soft_nll", ["soft_nll"]),
        ("nll,label_entropy", ["nll", "label_entropy"]),
        ("nll", ["nll"]),
    ):
        assert calib("score", "a.npz", "--metrics", metrics, "--intervals", "9", "--output", "a.json").code == 0
        assert list(json.loads((tmp_path / "a.json").read_text())["sets"]["a"]["values"]) == keys
    assert set(SOFT) <= set(_values(calib, tmp_path, "core"))
    np.savez(tmp_path / "a.npz", **predictions)
    assert not set(SOFT) & set(_values(calib, tmp_path, "core"))
    done = calib("score", "a.npz", "--metrics", "soft_nll")
    assert done.code == 1
    assert "soft_nll needs an array 'label_distribution' (N, K)" in done.err


def _values(calib, folder, metrics):
    assert calib("score", "a.npz", "--metrics", metrics, "--output", "a.json").code == 0
    return json.loads((folder / "a.json").read_text())["sets"]["a"]["values"]


def test_a_calibrator_changes_them_and_its_table_shows_them(calib, tmp_path, predictions):
    p = np.full((60, 3), 1 / 3)
    np.savez(tmp_path / "test.npz", **predictions, label_distribution=p)
    np.savez(tmp_path / "val.npz", logits=4 * predictions["logits"][::-1], labels=predictions["labels"][::-1])
    done = calib("calibrate", "--calibration", "val.npz", "--test", "test.npz", "--metrics", "core", "--output", "out")
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["sets"]["test"]["rows"]
    plain, fitted = rows["uncalibrated"]["values"], rows["Temperature"]["values"]
    assert fitted["soft_nll"] < plain["soft_nll"]  # it makes all less sure, and the labels are not sure at all
    assert fitted["label_entropy"] == plain["label_entropy"] == pytest.approx(np.log(3), rel=1e-6)
    assert "soft NLL ↓" in done.out


# --- from a run to an answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "pt2", "onnx"])
def test_names_of_a_run_reach_the_answers(calib, tmp_path, suffix):
    made = load_module(_run(calib, tmp_path))
    assert made.class_names == tuple("0123456789")
    calibrator = FixedTemperature(1.5).fit(torch.randn(20, 10), torch.arange(20) % 10)
    prepare = Preprocessing(size=(8, 8), mean=(0.3,), std=(0.4,))
    made.class_names = tuple(f"digit {k}" for k in range(10))  # so that they are no numbers
    classifier = CalibratedClassifier(made, calibrator, preprocessing=prepare)
    assert classifier.classes == made.class_names
    assert CalibratedClassifier(made, calibrator, classes="abcdefghij").classes == tuple("abcdefghij")
    write = {"pt": save_classifier, "pt2": export_torch, "onnx": export_onnx}[suffix]
    write(classifier, tmp_path / f"model.{suffix}")
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8), 200).save(tmp_path / "images" / "a.png")
    done = calib("classify", "images", "--model", f"model.{suffix}", "--output", "out.json")
    assert done.code == 0, done.err
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["label"] in made.class_names


def _run(calib, folder):
    done = calib(*QUICK, "--trainer.max_epochs=1", "--test_after_fit=false")
    assert done.code == 0, done.err
    run = folder / "runs" / "quickstart"
    assert json.loads((run / "run.json").read_text())["class_names"] == list("0123456789")
    return run / "checkpoints" / "best.ckpt"


def test_the_table_of_a_run_shows_distributions_only_where_there_are_any():
    from rich.console import Console

    from calib_lightning.predictions.results import result_tables

    def text(metrics):
        console = Console(width=200, file=io.StringIO())
        for table in result_tables(metrics, "run"):
            console.print(table)
        return console.file.getvalue()

    plain = {"test/accuracy": 0.5, "test/n": 10, "shift/a/accuracy": 0.25, "shift/a/n": 10}
    assert "soft" not in text(plain)
    shown = text(plain | {"test/soft_nll": 1.25, "test/soft_brier": 0.5, "test/label_entropy": 0.75})
    assert all(title in shown for title in ("soft NLL ↓", "soft Brier ↓", "label entropy"))
    assert [row.count("-") for row in shown.splitlines() if row.startswith("│ shift/a")] == [8]
