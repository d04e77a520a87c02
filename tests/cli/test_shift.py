"""Shifted sets and images of other classes in a run: evaluated, saved, scored again, calibrated."""

import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from calib_lightning import score
from calib_lightning.metrics import OOD

SHIFT = "--data.shift=[{name: generated, corruptions: [contrast, brightness], severities: [1, 3, 5]}]"
KINDS = [f"{kind}_{severity}" for kind in ("contrast", "brightness") for severity in (1, 3, 5)]
SHORT = ("-c", "quickstart", "--trainer.max_epochs=3", "--quiet=true", "--data.shift_rows=150", SHIFT)


def others(folder, seed, name):
    images = np.random.default_rng(seed).integers(0, 256, (90, 12, 12), dtype=np.uint8)
    np.savez(folder / f"{name}.npz", images=images, labels=np.arange(90) % 2, class_names=["ant", "bee"])
    (folder / f"{name}.yaml").write_text(f"class_path: ArraysDataModule\ninit_args: {{file: {name}.npz}}\n")


@pytest.fixture
def outside(tmp_path):
    """Two sets of noise, as configuration files."""
    others(tmp_path, 0, "noise")
    others(tmp_path, 1, "more")
    return "--data.ood=[noise.yaml, more.yaml]"


def confidence_of(path):
    with np.load(path) as saved:
        return softmax(saved["logits"].astype(np.float64), axis=1).max(axis=1)


def by_sklearn(inside, outside):
    scores, truth = np.concatenate([inside, outside]), np.repeat([1, 0], [len(inside), len(outside)])
    false, true, _ = roc_curve(truth, scores)
    return {
        "ood_auroc": roc_auc_score(truth, scores),
        "ood_aupr": average_precision_score(truth, scores),
        "ood_aupr_out": average_precision_score(1 - truth, -scores),
        "ood_fpr95": false[np.argmax(true >= 0.95)],
    }


@pytest.mark.usefixtures("drawn")
def test_a_run_evaluates_every_named_set_and_its_predictions_say_the_same(calib, tmp_path, outside):
    done = calib("fit", *SHORT, outside, "--run_dir=run")
    assert done.code == 0, done.err
    run = tmp_path / "run"
    results = json.loads((run / "run.json").read_text())["results"]
    saved = {
        path.relative_to(run / "predictions").with_suffix("").as_posix()
        for path in (run / "predictions").rglob("*.npz")
    }
    assert saved >= {"test", "calibration", "ood/noise", "ood/more", *(f"shift/generated/{kind}" for kind in KINDS)}

    # of other classes: against test, by the largest probability
    inside = confidence_of(run / "predictions/test.npz")
    for name in ("noise", "more"):
        want = by_sklearn(inside, confidence_of(run / f"predictions/ood/{name}.npz"))
        assert {key: results[f"ood/{name}/{key}"] for key in OOD} == pytest.approx(want, abs=1e-7)  # logged in float32
        assert results[f"ood/{name}/n"] == 90
        assert f"ood/{name}/accuracy" not in results
    mean = {key: (results[f"ood/noise/{key}"] + results[f"ood/more/{key}"]) / 2 for key in OOD}
    assert {key: results[f"ood/{key}"] for key in OOD} == pytest.approx(mean, abs=1e-7)
    assert results["ood/sets"] == 2

    # of corruptions: every set, and the mean with equal weights
    for key in ("accuracy", "ece", "nll", "correctness_auroc", "smece", "aurc"):
        each = [results[f"shift/generated/{kind}/{key}"] for kind in KINDS]
        assert results[f"shift/generated/{key}"] == pytest.approx(np.mean(each), abs=1e-6)
    assert results["shift/generated/sets"] == 6
    assert results["shift/generated/contrast_1/n"] == 150
    rows = {line.split("│")[1].strip(): line for line in done.out.splitlines() if line.startswith("│")}
    assert [*rows] == [
        *("test", "calibration", *(f"shift/generated, severity {severity}" for severity in (1, 3, 5))),
        *("shift/generated, mean", "ood/noise", "ood/more", "mean of these"),
    ]
    assert "6 sets" in rows["shift/generated, mean"]
    assert f"{100 * results['shift/generated/ece']:.2f}" in rows["shift/generated, mean"]
    at_3 = np.mean([results[f"shift/generated/{kind}/accuracy"] for kind in ("contrast_3", "brightness_3")])
    assert f"{100 * at_3:.2f}" in rows["shift/generated, severity 3"]
    assert f"{100 * results['ood/noise/ood_auroc']:.2f}" in rows["ood/noise"]
    assert "constants 'cifar', seed 0; not the archive's images" in done.out
    assert "of shifted sets at most the first 150 test rows" in done.out
    assert "ood/noise: 12 x 12 resized to 8 x 8" in done.out
    figures = {path.stem for path in (run / "figures").iterdir()}
    assert "shift_generated_robustness" in figures
    assert not any("contrast" in name for name in figures)

    # the same from what is saved
    done = calib("score", "run", "--format", "json", "--metrics", "core", "--figures", "drawn")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    for name in ("noise", "more"):
        want = by_sklearn(inside, confidence_of(run / f"predictions/ood/{name}.npz"))
        assert found["ood"][f"ood/{name}"] == pytest.approx(want, abs=1e-12)
    means = found["means"]["shift/generated"]
    assert means["sets"] == 6
    for key in ("accuracy", "nll", "ece", "correctness_auroc"):
        assert means[key] == pytest.approx(results[f"shift/generated/{key}"], abs=1e-6)
    assert (tmp_path / "drawn/shift/generated/robustness.svg").is_file()
    assert not (tmp_path / "drawn/shift/generated/contrast_1").exists()
    report = score(run)
    assert report.ood == found["ood"]
    assert "shift/generated, severity 5" in report.table()
    assert "contrast_5" not in report.table()

    # before and after a calibrator, on every set
    done = calib("calibrate", "run", "--calibrators", "Temperature", "--no_intervals")
    assert done.code == 0, done.err
    for title in (
        "test: ",
        "shift/generated, severity 3: 2 sets",
        "shift/generated, mean: 6 sets",
        "ood/noise: ",
        "mean",
    ):
        assert title in done.out
    report = json.loads((run / "calibrate" / "report.json").read_text())
    temperature = report["calibrators"]["Temperature"]["fit"]["temperature"]
    hot = {}
    for name in ("test", "ood/noise"):
        with np.load(run / f"predictions/{name}.npz") as file:
            hot[name] = softmax(file["logits"].astype(np.float64) / temperature, axis=1).max(axis=1)
    want = by_sklearn(hot["test"], hot["ood/noise"])
    assert report["ood"]["Temperature"]["ood/noise"] == pytest.approx(want, abs=1e-6)
    assert report["ood"]["uncalibrated"] == found["ood"]
    each = [report["sets"][f"shift/generated/{kind}"]["rows"]["Temperature"]["values"]["ece"] for kind in KINDS]
    assert report["means"]["Temperature"]["shift/generated"]["ece"] == pytest.approx(np.mean(each), abs=1e-12)


def test_sets_can_be_named_for_a_trained_network_and_for_one_that_goes_on(calib, tmp_path, outside):
    quick = ("fit", "-c", "quickstart", "--model.scheduler=null", "--quiet=true")
    done = calib(*quick, "--trainer.max_epochs=3", "--run_dir=run")
    assert done.code == 0, done.err
    done = calib("test", "-c", "run/config.yaml", SHIFT, outside, "--quiet=true")
    assert done.code == 0, done.err
    tested = json.loads((tmp_path / "run/test/run.json").read_text())["results"]
    assert tested["ood/sets"] == 2
    resume = ("fit", "-c", "run/config.yaml", "--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_epochs=4")
    done = calib(*resume, SHIFT, outside, "--quiet=true")
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "run/run.json").read_text())["results"]
    done = calib(*quick, "--trainer.max_epochs=4", "--run_dir=whole", SHIFT, outside)
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "whole/run.json").read_text())["results"]
    wanted = {key: value for key, value in again.items() if key.startswith(("shift/", "ood/"))}
    assert len(wanted) > 200
    assert {key: results[key] for key in wanted} == pytest.approx(wanted, nan_ok=True, abs=0)

    # what needs the network finds the sets that were named later
    for run in ("run", "run/test"):
        done = calib("calibrate", run, "--calibrators", "TrustScore", "--no_intervals", "--metrics", "accuracy")
        assert done.code == 0, done.err
        assert "ood/more: images of other classes" in done.out

    # files of sets that the last evaluation did not have are of an earlier network
    done = calib("fit", "-c", "run/config.yaml", "--ckpt_path=run/checkpoints/last.ckpt", "--trainer.max_epochs=5")
    assert done.code == 0, done.err
    assert (tmp_path / "run/predictions/ood/more.npz").is_file()
    found = json.loads(calib("score", "run", "--metrics", "accuracy", "--format", "json").out)
    assert [*found["sets"]] == ["test", "calibration"]
    assert "ood" not in found


def test_of_several_runs_the_shifted_sets_are_compared_by_name(calib, tmp_path):
    for seed in (0, 1):
        done = calib("fit", *SHORT, f"--run_dir=runs/{seed}", f"--seed_everything={seed}")
        assert done.code == 0, done.err
    done = calib("score", "runs/0", "runs/1", "--seeds", "--metrics", "accuracy", "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    spread = found["seeds"]["CrossEntropy on Digits, shift/generated/contrast_5"]["accuracy"]
    each = [found["sets"][f"{seed}/shift/generated/contrast_5"]["values"]["accuracy"] for seed in (0, 1)]
    assert (spread["mean"], spread["runs"]) == (pytest.approx(np.mean(each)), 2)
    means = [found["means"][f"{seed}/shift/generated"]["accuracy"] for seed in (0, 1)]
    spread = found["seeds"]["CrossEntropy on Digits, shift/generated, mean of 6 sets"]["accuracy"]
    assert (spread["mean"], spread["std"]) == (pytest.approx(np.mean(means)), pytest.approx(np.std(means, ddof=1)))
    text = calib("score", "runs/0", "runs/1", "--seeds", "--metrics", "accuracy").out
    assert "1/shift/generated, severity 5" in text
    assert "contrast_5" not in text
    done = calib("score", "runs/0", "--compare", "runs/1", "--metrics", "accuracy", "--format", "json")
    assert done.code == 0, done.err
    compared = json.loads(done.out)["sets"]["shift/generated/contrast_5"]["compare"]["accuracy"]
    assert compared["difference"] == pytest.approx(each[0] - each[1])


def test_files_of_other_classes_need_no_labels(calib, tmp_path):
    draw = np.random.default_rng(3)
    logits, labels = draw.normal(size=(300, 4)) * 3, draw.integers(0, 4, 300)
    np.savez(tmp_path / "test.npz", logits=logits[:200], labels=labels[:200])
    np.savez(tmp_path / "cal.npz", logits=logits[200:], labels=labels[200:])
    np.save(tmp_path / "out.npy", draw.normal(size=(50, 4)))
    done = calib("score", "test.npz", "--ood", "out.npy", "--format", "json")
    assert done.code == 0, done.err
    inside, outside = (softmax(each, axis=1).max(axis=1) for each in (logits[:200], np.load(tmp_path / "out.npy")))
    want = by_sklearn(inside, outside)
    assert json.loads(done.out)["ood"]["out"] == pytest.approx(want, abs=1e-12)
    of_arrays = score(logits[:200], labels[:200], ood={"x": np.load(tmp_path / "out.npy")})
    assert of_arrays.ood == {"x": pytest.approx(want, abs=1e-12)}
    done = calib("calibrate", "--calibration", "cal.npz", "--test", "test.npz", "--ood", "out.npy")
    assert done.code == 0, done.err
    assert "out: images of other classes, told from test" in done.out
    np.save(tmp_path / "wide.npy", draw.normal(size=(50, 5)))
    done = calib("score", "test.npz", "--ood", "wide.npy")
    assert done.code == 1
    assert "wide.npy has scores of 5 classes, test.npz of 4" in done.err
    assert calib("score", "test.npz", "cal.npz", "--ood", "out.npy").code == 2
    assert calib("score", "test.npz", "--ood", "out.npy", "--output", "out.npy").code != 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.shift=[cifar10c]", "shift has 'cifar10c'.*Did you mean cifar10_c"),
        ("--data.shift=[{name: generated, corruptions: [mist]}]", "corruption is 'mist'"),
        ("--data.ood=[digits]", "ood has 'digits', which is the data itself"),
        ("--data.ood=[svhn]", "ood has 'svhn', whose classes are those of DigitsDataModule"),
        ("--data.ood=[{name: cifar10, download: false}]", "CIFAR10DataModule cannot use the files"),
        ("--data.shift_rows=0", "shift_rows is 0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(calib, tmp_path, option, message):
    done = calib("fit", *SHORT, option, "--run_dir=run")
    assert done.code != 0
    assert message.split(".*")[0] in done.err
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("metrics.csv"))
