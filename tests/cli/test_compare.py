"""`calib compare` with folders of runs."""

import csv
import io
import json
import math
import os

import numpy as np
import pytest
import scipy.stats
import torch

from calib_lightning import compare
from calib_lightning.comparison.tables import Method
from calib_lightning.posthoc import NeuralClamping, Temperature, load_calibrator, save_calibrator
from tests.cli.conftest import TOY
from tests.comparison.networks import LABELS, accuracies, losses
from tests.comparison.run_folders import entries_of, write_grid, write_record, write_run

QUICK = ("--metrics", "accuracy", "--exchanges", "100")
WRONG = {"cross_entropy": [24, 26, 25], "label_smoothing": [70, 74, 78]}


@pytest.fixture
def content(calib):
    """``content("runs/0", ...)``: the comparison as JSON."""

    def run(*argv):
        done = calib("compare", *QUICK, "--format", "json", *argv)
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


def _refused(calib, *argv, code=1):
    """The one line of an error."""
    done = calib("compare", *QUICK, *argv)
    assert done.code == code, done
    assert done.out == ""
    assert len(done.err.splitlines()) <= code, done.err  # of a wrong command line also where its help is
    return done.err


def _rows(content):
    """Seeds by data, network, set, method and calibrator."""
    return {
        (*(table[key] for key in ("data", "network", "set")), row["method"], row["calibrator"]): list(row["seeds"])
        for table in content["tables"]
        for row in table["methods"]
    }


def _notes(content):
    return content["notes"] + [note for table in content["tables"] for note in table["notes"]]


def test_a_benchmark_is_a_table_with_marks_against_its_baseline(calib, tmp_path):
    write_grid(tmp_path / "grid", WRONG, baseline="cross_entropy", temperature=True)
    done = calib("compare", "grid", "--metrics", "accuracy,nll", "--output", "table.md")
    assert (done.code, done.out) == (0, "")
    text = (tmp_path / "table.md").read_text()
    assert "digits_lt, small, test: mean ± std over seeds, N = 400, K = 4" in text
    assert "| cross_entropy | - | 3 | **93.75 ± 0.25** |" in text
    assert "| label_smoothing | - | 3 | 81.50 ± 1.00 ‡ |" in text
    assert "| label_smoothing | Temperature | 3 | 81.50 ± 1.00 ‡ |" in text
    json_of = calib("compare", "grid", "--metrics", "accuracy,nll", "--format", "json")
    (table,) = json.loads(json_of.out)["tables"]
    for row in (found for found in table["methods"] if not found["calibrator"]):
        sets = {}
        for seed in range(3):
            with np.load(tmp_path / f"grid/digits_lt-small-{row['method']}-{seed}/predictions/test.npz") as arrays:
                sets[seed] = arrays["logits"].astype(float), arrays["labels"]
        assert [row["seeds"][str(seed)]["accuracy"] for seed in range(3)] == pytest.approx(accuracies(sets))
        assert [row["seeds"][str(seed)]["nll"] for seed in range(3)] == pytest.approx(losses(sets))


def test_calibrated_rows_are_the_predictions_at_that_temperature(calib, content, tmp_path):
    runs = [write_run(tmp_path / f"run{seed}", 40, seed, temperature=True) for seed in range(2)]
    found = content(*runs, "--metrics", "nll")
    values = {row["calibrator"]: row["seeds"] for row in found["tables"][0]["methods"]}
    for seed, run in enumerate(runs):
        temperature = load_calibrator(run / "calibrate" / "Temperature.pt").temperature
        with np.load(run / "predictions" / "test.npz") as arrays:
            logits, labels = arrays["logits"].astype(float), arrays["labels"]
        assert values[""][str(seed)]["nll"] == pytest.approx(losses({0: (logits, labels)})[0])
        scaled = {0: (logits / temperature, labels)}
        assert values["Temperature"][str(seed)]["nll"] == pytest.approx(losses(scaled)[0], rel=1e-6)


def test_unfinished_runs_are_left_out_and_said(content, tmp_path):
    grid = write_grid(tmp_path / "grid", WRONG, temperature=True)
    entries = entries_of(grid)
    entries[4]["status"], entries[5]["status"] = "failed", "waiting"
    write_record(grid, entries)
    found = content("grid")
    assert _rows(found)["digits_lt", "small", "test", "label_smoothing", "Temperature"] == ["0"]
    notes = " ".join(_notes(found))
    assert "2 of 6 runs of grid are not finished" in notes
    assert "digits_lt-small-label_smoothing-1 (failed)" in notes
    assert "digits_lt-small-label_smoothing-2 (waiting)" in notes
    assert "fewer than 3 seeds, so not compared" in notes


def test_loose_runs_are_named_by_what_differs(content, tmp_path):
    rates = {0.1: 20, 0.2: 30}
    for rate, wrong in rates.items():
        for seed in range(2):
            options = {"label_smoothing": rate}
            write_run(tmp_path / f"{rate}-{seed}", wrong, seed, method="LabelSmoothing", options=options)
    write_run(tmp_path / "plain", 25, config={"trainer": {"max_epochs": 30}})
    found = content("0.1-0", "0.1-1", "0.2-0", "0.2-1", "plain")
    assert {key[3]: seeds for key, seeds in _rows(found).items()} == {
        "label_smoothing (label_smoothing=0.1)": ["0", "1"],
        "label_smoothing (label_smoothing=0.2)": ["0", "1"],
        "cross_entropy": ["0"],
    }
    assert all(key[:3] == ("digits", "digits_cnn", "test") for key in _rows(found))


def test_a_callback_and_the_length_of_training_are_in_the_name(content, tmp_path):
    plp = {"class_path": "calib_lightning.callbacks.PostHocCalibration"}
    write_run(tmp_path / "plain", 20)
    write_run(tmp_path / "with", 20, config={"trainer": {"max_epochs": 15, "callbacks": [plp]}})
    write_run(tmp_path / "long", 20, config={"trainer": {"max_epochs": 30, "callbacks": None}})
    names = {key[3] for key in _rows(content("plain", "with", "long"))}
    assert names == {
        "cross_entropy (max_epochs=15)",
        "cross_entropy (max_epochs=30)",
        "cross_entropy+post_hoc_calibration",
    }


def test_two_runs_with_the_same_seed(calib, tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name, 20, 3)
    said = _refused(calib, "one", "two")
    assert "one and two are both cross_entropy on digits with seed 3; each seed counts once" in said


def test_other_splits_are_a_table_of_their_own(content, tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", 20, seed, sets={"shift/c/fog_1": 40})
        other = {"splits": "1f" * 32}
        write_run(tmp_path / f"b{seed}", 60, seed, record=other, sets={"shift/c/fog_1": 90})
    found = content(*(f"{name}{seed}" for name in "ab" for seed in range(3)))
    assert _rows(found) == {
        (f"digits (splits {name})", "digits_cnn", "test", "cross_entropy", ""): ["0", "1", "2"]
        for name in ("5c5c5c", "1f1f1f")
    }
    (note,) = [note for note in _notes(found) if "different splits" in note]
    assert note.startswith("digits: the runs have different splits (5c5c5c in a0 ...; 1f1f1f in b0 ...), and so were")
    values = {(cell["data"], cell["set"]): cell["seeds"]["1"]["accuracy"] for cell in found["values"]}
    assert values["digits (splits 5c5c5c)", "shift/c/fog_1"] == pytest.approx(0.9)
    assert values["digits (splits 1f1f1f)", "shift/c/fog_1"] == pytest.approx(1 - 90 / 400)


def test_other_test_rows_are_a_table_of_their_own(content, tmp_path):
    write_run(tmp_path / "a", 20)
    write_run(tmp_path / "b", 20, method="LabelSmoothing", labels=LABELS[::-1].copy())
    found = content("a", "b")
    assert [len(table["methods"]) for table in found["tables"]] == [1, 1]
    assert "digits, digits_cnn, test: the test rows differ, hence separate tables" in _notes(found)


def test_other_data_and_networks_are_tables_of_their_own(content, tmp_path):
    for place, options in enumerate(
        [{}, {"network_name": "resnet18"}, {"data": "MNISTDataModule"}, {"data": "MNISTDataModule", "seed": 1}]
    ):
        write_run(tmp_path / f"{place}", 20, **options)
    assert set(_rows(content("0", "1", "2", "3"))) == {
        ("digits", "digits_cnn", "test", "cross_entropy", ""),
        ("digits", "resnet18", "test", "cross_entropy", ""),
        ("mnist", "digits_cnn", "test", "cross_entropy", ""),
    }


def test_a_calibrator_that_needs_the_network_is_said(content, tmp_path):
    run = write_run(tmp_path / "run", 20, temperature=True)
    image, label = torch.randn(40, 1, 2, 2), torch.arange(40) % 4
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4)).eval()
    clamping = NeuralClamping()
    clamping.fit(network=net, images=image, labels=label, progress=False)
    save_calibrator(clamping, run / "calibrate" / "NeuralClamping.pt")
    found = content("run")
    assert [key[4] for key in _rows(found)] == ["", "Temperature"]
    assert any(
        "NeuralClamping needs more than logits: its values are in run/calibrate/report.md" in note
        for note in _notes(found)
    )


def test_a_benchmark_shows_the_calibrators_it_asks_for(content, tmp_path):
    grid = write_grid(tmp_path / "grid", {"mixup": [20]}, temperature=True)
    assert [key[4] for key in _rows(content("grid"))] == ["", "Temperature"]
    write_record(grid, [entry | {"calibrators": []} for entry in entries_of(grid)])
    assert [key[4] for key in _rows(content("grid"))] == [""]


def test_averages_over_corruptions_networks_and_other_classes(calib, tmp_path):
    errors = {
        ("digits_cnn", 0): (40, 80),
        ("digits_cnn", 1): (44, 84),
        ("resnet18", 0): (60, 120),
        ("resnet18", 1): (64, 124),
    }
    for (name, seed), (fog, snow) in errors.items():
        sets = {"shift/c/fog_1": fog, "shift/c/snow_5": snow, "ood/a": 10, "ood/b": 12}
        write_run(tmp_path / f"{name}{seed}", 20, seed, network_name=name, sets=sets)
    report = compare([tmp_path / f"{name}{seed}" for name, seed in errors], metrics="accuracy", exchanges=20)
    by_set = report.averages(["set"])
    key = ("digits", "digits_cnn", "cross_entropy", "", "shift/c")
    assert by_set.rows[key]["accuracy"] == pytest.approx(1 - (40 + 44 + 80 + 84) / 4 / 400)
    assert by_set.counts[key]["accuracy"] == 2
    assert by_set.counts["digits", "resnet18", "cross_entropy", "", "ood"]["ood_auroc"] == 2
    both = report.averages(["network", "set"])
    assert both.rows["digits", "cross_entropy", "", "shift/c"]["accuracy"] == pytest.approx(
        1 - np.mean(list(errors.values())) / 400
    )
    assert both.counts["digits", "cross_entropy", "", "shift/c"]["accuracy"] == 4
    text = report.to_markdown()
    accuracy = f"{100 * (1 - 62 / 400):.2f}"
    assert f"| digits | digits_cnn | cross_entropy | - | shift/c | 2 | {accuracy} |" in text
    assert "averages over networks and sets, of means over seeds" in text
    # The corruptions themselves are no tables.
    assert [table.key.set for table in report.tables] == ["test", "test"]


def test_what_an_average_leaves_out_is_said(tmp_path):
    sets = {"shift/c/fog_1": 40, "shift/c/snow_1": 50}
    write_run(tmp_path / "a", 20, sets=sets)
    write_run(tmp_path / "b", 20, method="LabelSmoothing", sets={"shift/c/fog_1": 60})
    report = compare([tmp_path / "a", tmp_path / "b"], metrics="accuracy")
    assert report.averages(["set"]).rows["digits", "digits_cnn", "cross_entropy", "", "shift/c"]["accuracy"] == 0.9
    assert any(
        "digits digits_cnn shift/c: shift/c/snow_1 is left out of the averages of accuracy" in line
        for line in report.remarks()
    )


def _over_data(tmp_path, errors):
    modules = ["DigitsDataModule", "MNISTDataModule", "SVHNDataModule", "CIFAR10HDataModule", "TexturesDataModule"]
    runs = []
    for place, wrong in enumerate(errors):
        for method, count in zip(("CrossEntropy", "LabelSmoothing", "Focal"), wrong, strict=True):
            folder = tmp_path / f"{place}-{method}"
            runs.append(write_run(folder, count, method=method, data=modules[place]))
    return runs


def test_ranks_and_a_critical_difference_over_five_data_sets(tmp_path):
    errors = [(20, 40, 60), (30, 20, 70), (10, 50, 50), (20, 30, 40), (20, 40, 60)]
    report = compare(_over_data(tmp_path, errors), metrics="accuracy", exchanges=20)
    by_hand = scipy.stats.rankdata(errors, axis=1).mean(axis=0)
    assert list(report.ranks("accuracy").values()) == pytest.approx(by_hand.tolist())
    found = report.rank_comparison("accuracy")
    # Nemenyi: q / sqrt(2) of the studentized range for 3 methods.
    q = scipy.stats.studentized_range.ppf(0.95, 3, np.inf) / math.sqrt(2)
    assert found.critical_difference == pytest.approx(q * math.sqrt(3 * 4 / (6 * 5)), rel=1e-4)
    ranks = json.loads(report.to_json())["ranks"]["accuracy"]
    assert list(ranks.values()) == pytest.approx(by_hand.tolist())
    text = report.to_markdown()
    assert "average ranks over 5 tables, 1 is best" in text
    assert f"| critical difference | {found.critical_difference:.2f} |" in text


def test_ranks_over_four_data_sets_have_no_critical_difference(tmp_path):
    errors = [(20, 40, 60), (30, 20, 70), (10, 50, 50), (20, 30, 40)]
    report = compare(_over_data(tmp_path, errors), metrics="accuracy", exchanges=20)
    assert list(report.ranks("accuracy").values()) == pytest.approx(
        scipy.stats.rankdata(errors, axis=1).mean(axis=0).tolist()
    )
    with pytest.raises(ValueError, match="5"):
        report.rank_comparison("accuracy")
    assert "no critical difference: it needs 5 data sets" in report.to_markdown()


def test_several_networks_have_no_critical_difference(tmp_path):
    runs = _over_data(tmp_path, [(20, 40, 60)] * 5)
    for method, wrong in (("CrossEntropy", 20), ("LabelSmoothing", 30), ("Focal", 40)):
        runs.append(write_run(tmp_path / f"more-{method}", wrong, method=method, network_name="resnet18"))
    report = compare(runs, metrics="accuracy", exchanges=20)
    with pytest.raises(ValueError, match="several tables are of the same data"):
        report.rank_comparison("accuracy")


def test_cost_by_stage_with_a_shared_first_stage(calib, tmp_path):
    grid = write_grid(tmp_path / "grid", {"cross_entropy": [20, 21, 22], "label_smoothing": [30, 31, 32]})
    entries = entries_of(grid)
    for first, entry in zip(entries[:3], entries[3:], strict=True):
        entry["first_stage"] = first["folder"]
    write_record(grid, entries)
    text = calib("compare", "grid", *QUICK, "--format", "markdown").out
    line = next(line for line in text.splitlines() if line.startswith("| digits_lt | small | label_smoothing |"))
    header = next(line for line in text.splitlines() if line.startswith("| data | network | method | "))
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["first stage (of another run) s"] == cells["fit s"] == "31.0 ± 1.0"
    assert cells["test s"] == "2.0 ± 0.0"
    assert cells["images/s in training"] == "1,000 ± 0"
    assert cells["process MiB"] == "600 ± 0"
    costs = json.loads(calib("compare", "grid", *QUICK, "--format", "json").out)["costs"]
    assert costs[3]["seconds"] == {"first stage (of another run)": 30.0, "fit": 30.0, "test": 2.0}


def test_other_versions_of_packages_are_said(content, tmp_path):
    write_run(tmp_path / "old", 20, 0, record={"stage": {"versions": {"torch": "2.5.0", "python": "3.11.7"}}})
    write_run(tmp_path / "new", 20, 1)
    (note,) = [note for note in _notes(content("old", "new")) if "versions" in note]
    assert note == "the runs were made with different versions of torch: 2.5.0 in old; 2.6.0 in new"


@pytest.mark.parametrize("style", ["text", "markdown", "latex", "csv", "json"])
def test_formats(calib, tmp_path, style):
    write_grid(tmp_path / "grid", WRONG, baseline="cross_entropy")
    done = calib("compare", "grid", *QUICK, "--format", style, "--intervals", "50")
    assert done.code == 0, done.err
    if style == "csv":
        rows = list(csv.DictReader(io.StringIO(done.out)))
        assert [float(row["mean"]) for row in rows] == pytest.approx([0.9375, 0.815])
        assert all(float(row["low"]) < float(row["mean"]) < float(row["high"]) for row in rows)
    elif style == "json":
        assert json.loads(done.out)["settings"]["intervals"]["resamples"] == 50
    else:
        assert "81.50" in done.out
        assert "50 resamples" in done.out


def test_folders_that_are_no_runs(calib, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        said = _refused(calib, name)
        assert f"{name} is not the folder of a run (it has no run.json) or of a benchmark" in said
        assert "Give folders that `calib fit` or `calib benchmark` has made" in said


def test_runs_without_predictions(calib, tmp_path):
    run = write_run(tmp_path / "run", 20)
    (run / "predictions" / "test.npz").rename(run / "predictions" / "calibration.npz")
    assert "run has no predictions of a test set. Run `calib test -c run/config.yaml`" in _refused(calib, "run")
    (run / "predictions" / "calibration.npz").unlink()
    assert "run has no predictions yet. Run `calib test -c run/config.yaml`" in _refused(calib, "run")


def test_damaged_files(calib, tmp_path):
    run = write_run(tmp_path / "run", 20)
    (run / "predictions" / "test.npz").write_bytes(b"PK")
    assert "run/predictions/test.npz" in _refused(calib, "run")
    record = (run / "run.json").read_text()
    (run / "run.json").write_text("{")
    assert "run/run.json is damaged" in _refused(calib, "run")
    (run / "run.json").write_text(record)
    (run / "config.yaml").write_text("{")
    assert "run/config.yaml cannot be read" in _refused(calib, "run")
    (run / "config.yaml").write_text("a: 1")
    assert "run/config.yaml is no configuration of a run" in _refused(calib, "run")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"runs": [{"folder": "a"}]}', '{"runs": 3}', '{"runs": [3]}'])
def test_a_damaged_benchmark(calib, tmp_path, text):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "benchmark.json").write_text(text)
    said = _refused(calib, "grid")
    assert "grid/benchmark.json is damaged" in said
    assert "Run `calib benchmark` again" in said


def test_a_benchmark_and_one_of_its_runs(content, calib, tmp_path):
    grid = write_grid(tmp_path / "grid", {"mixup": [20, 21]})
    run = grid / "digits_lt-small-mixup-1"
    assert _rows(content("grid", run)) == {("digits_lt", "small", "test", "mixup", ""): ["0", "1"]}
    (run / "run.json").unlink()
    said = _refused(calib, "grid")
    assert "digits_lt-small-mixup-1 has no run.json, but benchmark.json says that it is finished. Run" in said


def test_equal_means_are_all_the_best(calib, tmp_path):
    write_grid(tmp_path / "grid", WRONG, temperature=True)
    text = calib("compare", "grid", *QUICK, "--format", "markdown").out
    for calibrator in ("-", "Temperature"):  # it changes no class
        assert f"| cross_entropy | {calibrator} | 3 | **93.75 ± 0.25** |" in text


def test_a_benchmark_without_a_finished_run(calib, tmp_path):
    grid = write_grid(tmp_path / "grid", {"mixup": [20]})
    write_record(grid, [entry | {"status": "waiting"} for entry in entries_of(grid)])
    said = _refused(calib, "grid")
    assert "there is no finished run to compare. 1 of 1 runs of grid are not finished: digits_lt-small-mixup-0" in said


def test_bad_options(calib, tmp_path):
    grid = write_grid(tmp_path / "grid", WRONG)
    assert "baseline is 'magic'; it must be one of cross_entropy, label_smoothing" in _refused(
        calib, "grid", "--baseline", "magic"
    )
    for alpha in ("0", "2"):
        assert f"alpha is {float(alpha)}; it must be between 0 and 1" in _refused(calib, "grid", "--alpha", alpha)
    assert "exchanges is 3; it must be" in _refused(calib, "grid", "--exchanges", "3")
    assert "magic" in _refused(calib, "grid", "--metrics", "magic", code=2)
    assert "level is 95.0" in _refused(calib, "grid", "--level", "95", code=2)
    assert "its suffix must be one of .txt, .md, .tex, .csv, .json" in _refused(
        calib, "grid", "--output", "a.pdf", code=2
    )
    (tmp_path / "folder.md").mkdir()
    assert "folder.md" in _refused(calib, "grid", "--output", "folder.md")
    before = (grid / "benchmark.json").read_text()
    said = _refused(calib, "grid", "--output", "grid/benchmark.json")
    assert "--output is grid/benchmark.json, which this command reads" in said
    assert (grid / "benchmark.json").read_text() == before
    said = _refused(calib, "grid", "--output", "grid/digits_lt-small-cross_entropy-0/run.json")
    assert "which this command reads" in said


def test_output_next_to_the_runs(calib, tmp_path):
    write_grid(tmp_path / "grid", WRONG)
    for name, begin in {"t.txt": "digits_lt", "t.tex": "% needs", "t.csv": "data,", "t.json": "{"}.items():
        done = calib("compare", "grid", *QUICK, "--output", f"grid/{name}")
        assert (done.code, done.out) == (0, ""), done.err
        assert (tmp_path / "grid" / name).read_text().startswith(begin)
    assert calib("compare", "grid", *QUICK).code == 0


def test_help_names_what_it_takes(calib):
    done = calib("compare", "--help")
    assert done.code == 0
    assert all(word in done.out for word in ("RUN", "GRID", "--baseline", "--alpha", "--exchanges", "--output"))


def test_python_reads_folders_too(tmp_path):
    write_grid(tmp_path / "grid", WRONG, baseline="cross_entropy")
    for given in (tmp_path / "grid", str(tmp_path / "grid"), [tmp_path / "grid"]):
        report = compare(given, metrics="accuracy", exchanges=20)
        assert report.baseline == "cross_entropy"
        assert report.tables[0].is_worse("accuracy", Method("label_smoothing"), Method("cross_entropy"), 0.05)


def test_real_runs(calib, content, tmp_path):
    """What `calib fit` and `calib calibrate` write is compared; its values are those that they report."""
    net = ("--model.encoder=digits_cnn", "--trainer.max_epochs=1", "--trainer.accelerator=cpu")
    runs = []
    for method in ("cross_entropy", "label_smoothing"):
        for seed in range(1 + (method == "cross_entropy")):
            runs.append(f"runs/{method}{seed}")
            named = (f"--model={method}", f"--seed_everything={seed}", f"--run_dir={runs[-1]}")
            done = calib("fit", *TOY, *named, *net, "--test_after_fit=true")
            assert done.code == 0, done.err
            assert calib("calibrate", runs[-1]).code == 0
    found = content(*runs, "--metrics", "nll")
    (table,) = found["tables"]
    assert (table["data"], table["network"]) == ("toy", "digits_cnn")
    assert [(row["method"], row["calibrator"]) for row in table["methods"]] == [
        (method, calibrator) for method in ("cross_entropy", "label_smoothing") for calibrator in ("", "Temperature")
    ]
    for row in table["methods"]:
        for seed, values in row["seeds"].items():
            run = tmp_path / "runs" / f"{row['method']}{seed}"
            reported = json.loads((run / "run.json").read_text())["results"]["test/nll"]
            if row["calibrator"]:
                report = json.loads((run / "calibrate" / "report.json").read_text())
                reported = report["sets"]["test"]["rows"]["Temperature"]["values"]["nll"]
            assert values["nll"] == pytest.approx(reported, rel=1e-5)
    costs = found["costs"]
    assert [list(cost["seconds"]) for cost in costs] == [["fit", "test"]] * 3
    assert all(cost["seconds"]["fit"] > 0 for cost in costs)


def test_the_only_set_of_other_classes_is_shown(tmp_path):
    write_run(tmp_path / "a", 20, sets={"ood/svhn": 10})
    report = compare(tmp_path / "a", metrics="accuracy")
    row = ("digits", "digits_cnn", "cross_entropy", "", "ood/svhn")
    assert report.averages(["set"]).counts[row]["ood_auroc"] == 1
    assert "| ood/svhn | 1 |" in report.to_markdown()


def test_corruptions_one_by_one_are_no_averages_over_networks(tmp_path):
    for name in ("digits_cnn", "resnet18"):
        write_run(tmp_path / name, 20, network_name=name, sets={"shift/c/fog_1": 40, "shift/c/snow_1": 50})
    report = compare([tmp_path / "digits_cnn", tmp_path / "resnet18"], metrics="accuracy")
    text = report.to_markdown()
    assert "| digits | cross_entropy | - | test | 2 | 95.00 |" in text
    assert "fog_1" not in text
    content = json.loads(report.to_json())
    both = next(found for found in content["averages"] if found["over"] == ["network", "set"])
    assert both["rows"] == [
        {
            "data": "digits",
            "method": "cross_entropy",
            "calibrator": "",
            "set": "shift/c",
            "means": {"accuracy": pytest.approx(1 - 45 / 400)},
            "counts": {"accuracy": 4},
        }
    ]


def test_a_shifted_set_of_its_own_is_a_table(content, tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"{seed}", 20, seed, sets={"shift/v6": 60})
    found = content("0", "1")
    assert [(table["set"], table["best"]["accuracy"]) for table in found["tables"]] == [
        ("test", "cross_entropy"),
        ("shift/v6", "cross_entropy"),
    ]
    (row,) = found["tables"][1]["methods"]
    assert row["spreads"]["accuracy"]["mean"] == pytest.approx(0.85)
    assert found["ranks"] == {}


def test_the_newest_calibration_of_a_run_counts(content, tmp_path):
    run = write_run(tmp_path / "run", 40, temperature=True)
    with np.load(run / "predictions" / "test.npz") as arrays:
        logits, labels = arrays["logits"].astype(float), arrays["labels"]
    other = Temperature()
    other.fit(torch.tensor(3.0 * logits), torch.tensor(labels))
    (run / "calibrate-2").mkdir()
    save_calibrator(other, run / "calibrate-2" / "Temperature.pt")
    os.utime(run / "calibrate", (1, 1))
    found = content("run", "--metrics", "nll")["tables"][0]["methods"]
    scale = float(other.temperature)
    assert found[1]["seeds"]["0"]["nll"] == pytest.approx(losses({0: (logits / scale, labels)})[0], rel=1e-6)


def test_a_test_in_the_folder_of_a_run(content, tmp_path):
    run = write_run(tmp_path / "run", 20, 4)
    inner = write_run(run / "test", 24, 4)
    (inner / "config.yaml").unlink()
    found = content("run/test")
    assert _rows(found) == {("digits", "digits_cnn", "test", "cross_entropy", ""): ["4"]}
    assert found["tables"][0]["methods"][0]["seeds"]["4"]["accuracy"] == pytest.approx(0.94)


def test_many_unfinished_runs_are_not_all_named(content, tmp_path):
    grid = write_grid(tmp_path / "grid", {"mixup": [20] * 6})
    write_record(grid, [entry | {"status": "waiting"} if entry["seed"] else entry for entry in entries_of(grid)])
    (note,) = [note for note in content("grid")["notes"] if "finished" in note]
    assert note.startswith("5 of 6 runs of grid are not finished: digits_lt-small-mixup-1 (waiting), ")
    assert note.endswith("digits_lt-small-mixup-3 (waiting) and others")
