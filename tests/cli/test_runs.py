"""A run from the command line: what it leaves behind, and that everything in it can be had again."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
import yaml

from calib_lightning.commands.fit_folder import folder_of_restarted_job
from calib_lightning.core import load_module
from calib_lightning.methods import LabelSmoothing
from calib_lightning.utils.run_folder import job_id

from .conftest import QUICK


def _reference(logits, labels, bins=15):
    """All figures of the table in float64 numpy, written from the definitions."""
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    c, right = p.max(axis=1), p.argmax(axis=1) == labels
    nll = -np.mean(z[np.arange(len(z)), labels] - np.log(np.exp(z).sum(axis=1)))
    brier = np.mean(((p - np.eye(p.shape[1])[labels]) ** 2).sum(axis=1))
    edges = np.linspace(0, 1, bins + 1)
    ece = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (c > low) & (c <= high)
        if inside.any():
            ece += inside.mean() * abs(c[inside].mean() - right[inside].mean())
    rest = np.sort(z, axis=1)[:, :-1]
    score = z.max(axis=1) - np.log(np.exp(rest).sum(axis=1))
    wins = (score[right][:, None] > score[~right][None]).mean() + 0.5 * (
        score[right][:, None] == score[~right][None]
    ).mean()
    return {
        "accuracy": right.mean(),
        "nll": nll,
        "brier": brier,
        "ece": ece,
        "signed_gap": c.mean() - right.mean(),
        "correctness_auroc": wins,
    }


def _weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def _assert_equal_weights(one, two):
    one, two = _weights(one), _weights(two)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_everything_and_every_figure_can_be_computed_again(calib, tmp_path):
    done = calib(*QUICK, "--trainer.max_epochs=3")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "quickstart"
    for name in (
        "config.yaml",
        "metrics.csv",
        "run.json",
        "splits.npz",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    ):
        assert (run / name).is_file(), name

    names = {path.stem for path in (run / "figures").glob("*.png")}
    kinds = ("confidence", "reliability", "risk_coverage")
    assert names == {f"{name}_{kind}" for name in ("test", "calibration") for kind in kinds}

    for word in ("test", "calibration", "400", "accuracy % ↑", "ECE % ↓", "correctness AUROC % ↑"):
        assert word in done.out, word

    record = json.loads((run / "run.json").read_text())
    assert [stage["status"] for stage in record["stages"]] == ["finished", "finished"]
    fit = record["stages"][0]
    assert fit["versions"]["torch"] == torch.__version__
    assert fit["seconds"] > 0
    assert fit["images_per_second"] > 0
    assert fit["peak_memory_mib"]["process"] > 0
    assert record["checkpoint"]["select_on"] == "val/nll"

    with np.load(run / "splits.npz") as splits:
        sets = {name: splits[name] for name in ("train", "val", "calibration", "test")}
        assert str(splits["hash"]) == record["splits"]
    assert len(np.unique(np.concatenate(list(sets.values())))) == sum(map(len, sets.values()))

    for name, prefix in (("test", "test"), ("calibration", "calibration")):
        with np.load(run / "predictions" / f"{name}.npz") as saved:
            assert saved["logits"].dtype == np.float32
            np.testing.assert_array_equal(saved["index"], sets.get(prefix, sets.get(name)))
            for metric, value in _reference(saved["logits"], saved["labels"]).items():
                assert record["results"][f"{prefix}/{metric}"] == pytest.approx(value, abs=2e-6), metric
            assert record["results"][f"{prefix}/n"] == len(saved["labels"])

    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = min(float(row["val/nll"]) for row in rows if row["val/nll"])
    chosen = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    scores = [state["best_model_score"] for key, state in chosen["callbacks"].items() if "val/nll" in key]
    assert float(scores[0]) == pytest.approx(best, abs=1e-6)


def test_test_reproduces_the_figures_and_nothing_is_overwritten(calib, tmp_path):
    assert calib(*QUICK, "--trainer.max_epochs=2").code == 0
    run = tmp_path / "runs" / "quickstart"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    results = json.loads((run / "run.json").read_text())["results"]

    for arguments in (
        ("-c", run / "config.yaml"),
        ("-c", run / "config.yaml", "--ckpt_path", run / "checkpoints/best.ckpt"),
    ):
        done = calib("test", *arguments, "--quiet=true")
        assert done.code == 0, done.err
    for folder in ("test", "test-2"):
        again = json.loads((run / folder / "run.json").read_text())["results"]
        tested = {key: value for key, value in results.items() if key.startswith(("test/", "calibration/"))}
        assert {key: again[key] for key in tested} == tested
        with (
            np.load(run / folder / "predictions" / "test.npz") as new,
            np.load(run / "predictions" / "test.npz") as old,
        ):
            np.testing.assert_array_equal(new["logits"], old["logits"])

    assert calib("validate", "-c", run / "config.yaml", "--quiet=true").code == 0
    assert (run / "validate" / "predictions" / "val.npz").is_file()
    assert calib("predict", "-c", run / "config.yaml", "--quiet=true").code == 0
    with np.load(run / "predict" / "predictions" / "test.npz") as new, np.load(run / "predictions" / "test.npz") as old:
        np.testing.assert_array_equal(new["logits"], old["logits"])

    assert calib(*QUICK, "--trainer.max_epochs=1", "--test_after_fit=false").code == 0
    assert (tmp_path / "runs" / "quickstart-2" / "checkpoints" / "last.ckpt").is_file()
    assert {path: path.read_bytes() for path in before} == before


def test_a_resumed_run_goes_on_in_its_folder_and_ends_as_if_never_stopped(calib, tmp_path):
    # a schedule that does not follow the number of epochs
    same = (*QUICK, "--test_after_fit=false", "--model.scheduler=CosineAnnealingLR", "--model.scheduler.T_max=40")
    assert calib(*same, "--trainer.max_epochs=4", "--run_dir=runs/whole").code == 0
    assert calib(*same, "--trainer.max_epochs=2", "--run_dir=runs/part").code == 0
    part = tmp_path / "runs" / "part"
    done = calib(
        "fit", "-c", part / "config.yaml", "--trainer.max_epochs=4", "--ckpt_path", part / "checkpoints/last.ckpt"
    )
    assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["part", "whole"]
    assert (part / "config-2.yaml").is_file()
    _assert_equal_weights(tmp_path / "runs/whole/checkpoints/last.ckpt", part / "checkpoints/last.ckpt")
    _assert_equal_weights(tmp_path / "runs/whole/checkpoints/best.ckpt", part / "checkpoints/best.ckpt")
    columns = []
    for run in ("whole", "part"):
        with (tmp_path / "runs" / run / "metrics.csv").open() as file:
            columns.append([row["val/nll"] for row in csv.DictReader(file) if row["val/nll"]])
    assert len(columns[0]) == 4
    assert columns[0] == columns[1]


def test_a_resume_says_in_run_json_which_configuration_it_had(calib, tmp_path):
    assert calib(*QUICK, "--trainer.max_epochs=1", "--select_on=last").code == 0
    run = tmp_path / "runs" / "quickstart"
    last = run / "checkpoints" / "last.ckpt"
    done = calib("fit", "-c", run / "config.yaml", "--ckpt_path", last, "--trainer.max_epochs=2")
    assert done.code == 0, done.err
    assert "(last.ckpt, the last epoch)" in " ".join(done.out.split())
    stages = json.loads((run / "run.json").read_text())["stages"]
    said = [(stage["stage"], stage["config"]) for stage in stages]
    assert said == [(name, config) for config in ("config.yaml", "config-2.yaml") for name in ("fit", "test")]


def test_last_checkpoint_is_of_the_last_epoch_even_if_the_best_is_not(calib, tmp_path):
    # a learning rate that soon makes things worse
    done = calib(*QUICK, "--trainer.max_epochs=6", "--model.optimizer.init_args.lr=3", "--model.scheduler=null")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "quickstart"
    with (run / "metrics.csv").open() as file:
        scores = [float(row["val/nll"]) for row in csv.DictReader(file) if row["val/nll"]]
    assert np.argmin(scores) < 5, "the test needs a run that gets worse"
    epochs = {
        name: torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"] for name in ("best", "last")
    }
    assert epochs == {"best": int(np.argmin(scores)), "last": 5}
    # the results of the run are those of its best checkpoint
    done = calib("test", "-c", run / "config.yaml", "--ckpt_path", run / "checkpoints/best.ckpt", "--quiet=true")
    assert done.code == 0, done.err
    of_run, of_best = (json.loads((folder / "run.json").read_text())["results"] for folder in (run, run / "test"))
    assert of_best == {key: of_run[key] for key in of_best}


def test_a_moved_run_remembers_its_best_score(calib, tmp_path):
    options = ("--test_after_fit=false", "--model.optimizer.init_args.lr=3", "--model.scheduler=null")
    assert calib(*QUICK, *options, "--trainer.max_epochs=3").code == 0
    moved = (tmp_path / "runs" / "quickstart").rename(tmp_path / "runs" / "elsewhere")
    with (moved / "metrics.csv").open() as file:
        best = min(float(row["val/nll"]) for row in csv.DictReader(file) if row["val/nll"])
    last = moved / "checkpoints" / "last.ckpt"
    done = calib("fit", "-c", moved / "config.yaml", "--run_dir", moved, "--trainer.max_epochs=4", "--ckpt_path", last)
    assert done.code == 0, done.err
    state = torch.load(last, weights_only=True)["callbacks"]
    scores = [
        float(s["best_model_score"]) for s in state.values() if isinstance(s, dict) and s.get("monitor") == "val/nll"
    ]
    assert scores[0] <= best + 1e-6
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_another_method_from_a_checkpoint_gets_a_folder_of_its_own(calib, tmp_path):
    assert calib(*QUICK, "--trainer.max_epochs=1", "--test_after_fit=false").code == 0
    run = tmp_path / "runs" / "quickstart"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ckpt = ("--ckpt_path", run / "checkpoints/last.ckpt", "--trainer.max_epochs=2")
    assert calib(*QUICK, "--model=focal", *ckpt).code == 0
    assert calib(*QUICK, "--run_dir=runs/named", *ckpt).code == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for name, method in (("quickstart-2", "Focal"), ("named", "CrossEntropy")):
        best = torch.load(tmp_path / "runs" / name / "checkpoints" / "best.ckpt", weights_only=True)
        assert best["calib_lightning"]["class_path"].endswith(method)


def stopped_after_an_epoch(calib, tmp_path, *words):
    """A run of two epochs whose process was killed after the first."""
    before = {path.name for path in (tmp_path / "runs").glob("*")}
    assert calib(*QUICK, *words, "--trainer.max_epochs=1", "--test_after_fit=false").code == 0
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.name not in before)
    config = folder / "config.yaml"
    text = config.read_text().replace("max_epochs: 1\n", "max_epochs: 2\n")
    config.write_text(text.replace("test_after_fit: false", "test_after_fit: true"))
    return folder


def epochs_of(folder):
    with (folder / "metrics.csv").open() as file:
        return len([row for row in csv.DictReader(file) if row["val/nll"]])


AGAIN = (*QUICK, "--trainer.max_epochs=2")


def test_a_job_that_its_scheduler_starts_again_goes_on_in_its_folder(calib, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = stopped_after_an_epoch(calib, tmp_path)
    second = stopped_after_an_epoch(calib, tmp_path, "--model.encoder=digits_cnn", "--seed_everything=1")
    assert (first.name, second.name) == ("quickstart", "quickstart-2")
    other = stopped_after_an_epoch(calib, tmp_path, "--run_dir=runs/quickstart-10-more")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert calib(*AGAIN).code == 0  # not the newest: the one with this configuration
    assert [epochs_of(folder) for folder in (first, second, other)] == [2, 1, 1]
    assert calib(*AGAIN, "--model.encoder=digits_cnn", "--seed_everything=1").code == 0
    assert [epochs_of(folder) for folder in (first, second, other)] == [2, 2, 1]
    assert calib(*AGAIN, "--ckpt_path", other / "checkpoints/last.ckpt", "--run_dir=runs/from").code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 4
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert calib(*AGAIN, "--test_after_fit=false").code == 0
    assert (tmp_path / "runs" / "quickstart-3").is_dir()


def test_a_restarted_job_that_began_with_another_checkpoint_goes_on_from_its_own(calib, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    foreign = stopped_after_an_epoch(calib, tmp_path)
    words = ("--ckpt_path", foreign / "checkpoints/last.ckpt", "--model=focal")
    assert calib(*AGAIN, *words).code == 0
    folder = tmp_path / "runs" / "quickstart-2"
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert calib(*AGAIN, *words).code == 0
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["quickstart", "quickstart-2"]
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    assert epochs_of(folder) == 1  # it had come to its end


def test_the_number_of_a_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert job_id() == "77"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default, which all jobs share
    assert job_id() == "77"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")  # within an allocation of SLURM
    assert job_id() == "mine"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "")
    monkeypatch.setenv("SLURM_JOB_ID", "")
    assert job_id() is None


def test_agents_of_torchrun_agree_on_the_folder_of_a_job(calib, tmp_path, monkeypatch):
    # an agent that is started anew counts its restarts from 0: the answer must not depend on it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    folder = stopped_after_an_epoch(calib, tmp_path)
    config = (folder / "config.yaml").read_text()
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        assert folder_of_restarted_job(folder, config) == folder
        assert folder_of_restarted_job(folder, config.replace("lr: ", "lr: 1")) is None
        assert folder_of_restarted_job(folder.with_name("quick"), config) is None
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
        assert folder_of_restarted_job(folder, config) is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert calib(*AGAIN).code == 0
    assert epochs_of(folder) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quickstart"]
    assert folder_of_restarted_job(folder, config) is None  # it has been tested: the same command begins anew
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-8")
    assert folder_of_restarted_job(folder, config) is None


def test_a_checkpoint_is_not_tested_on_other_splits_of_its_data(calib, tmp_path):
    assert calib(*QUICK, "--trainer.max_epochs=1", "--test_after_fit=false").code == 0
    done = calib("test", "-c", tmp_path / "runs/quickstart/config.yaml", "--data.split.seed=7")
    assert done.code == 1
    assert "splits" in done.err


def test_resuming_on_other_splits_is_refused(calib, tmp_path):
    assert calib(*QUICK, "--test_after_fit=false", "--trainer.max_epochs=1").code == 0
    run = tmp_path / "runs" / "quickstart"
    done = calib(*QUICK, "--trainer.max_epochs=2", "--ckpt_path", run / "checkpoints/last.ckpt", "--data.split.seed=7")
    assert done.code == 1
    assert "splits" in done.err
    done = calib(*QUICK, "--run_dir=runs/new", "--ckpt_path", run / "checkpoints/last.ckpt", "--data.split.seed=7")
    assert done.code == 1
    assert "splits" in done.err


def test_a_method_may_choose_its_checkpoint_by_another_metric(calib, only_run):
    assert calib(*QUICK, "--model", "logit_norm", "--trainer.max_epochs=1").code == 0
    assert json.loads((only_run() / "run.json").read_text())["checkpoint"]["select_on"] == "val/accuracy"


def test_parts_of_a_configuration_compose(calib, tmp_path):
    done = calib(
        *QUICK, "--model", "label_smoothing", "--model.smoothing=0.2", "--trainer.max_epochs=1", "--select_on=last"
    )
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "quickstart"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["class_path"].endswith("LabelSmoothing")
    assert config["model"]["init_args"]["smoothing"] == 0.2
    assert config["model"]["init_args"]["optimizer"]["init_args"]["momentum"] == 0.9
    assert config["model"]["init_args"]["encoder"] == "digits_cnn"
    module = load_module(run / "checkpoints" / "last.ckpt")
    assert isinstance(module, LabelSmoothing)
    assert module.criterion.smoothing == 0.2
    assert not (run / "checkpoints" / "best.ckpt").exists()


def test_same_seed_same_bits_with_and_without_workers(calib, tmp_path):
    short = (*QUICK, "--trainer.max_epochs=2", "--test_after_fit=false")
    for name, options in (("a", ()), ("b", ()), ("c", ("--data.num_workers=2",)), ("d", ("--seed_everything=1",))):
        assert calib(*short, f"--run_dir=runs/{name}", *options).code == 0
    runs = tmp_path / "runs"
    _assert_equal_weights(runs / "a/checkpoints/last.ckpt", runs / "b/checkpoints/last.ckpt")
    _assert_equal_weights(runs / "a/checkpoints/last.ckpt", runs / "c/checkpoints/last.ckpt")
    other = _weights(runs / "d/checkpoints/last.ckpt")
    assert any(
        not torch.equal(value, other[name]) for name, value in _weights(runs / "a/checkpoints/last.ckpt").items()
    )


def test_tensorboard_and_offline_wandb_stand_beside_the_csv_file(calib, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    short = (*QUICK, "--trainer.max_epochs=1", "--test_after_fit=false")
    assert calib(*short, "--run_dir=runs/tb", "-c", "logger/tensorboard").code == 0
    assert list((tmp_path / "runs/tb").rglob("events.out.tfevents*"))
    done = calib(*short, "--run_dir=runs/wb", "-c", "logger/wandb", "--trainer.logger.init_args.offline=true")
    assert done.code == 0, done.err
    assert list((tmp_path / "runs/wb").rglob("*.wandb"))
    # a saved configuration must not send the logs of a later run into the folder of this one
    assert (
        yaml.safe_load((tmp_path / "runs/tb/config.yaml").read_text())["trainer"]["logger"]["init_args"]["save_dir"]
        == "."
    )
    for name in ("tb", "wb"):
        assert (tmp_path / "runs" / name / "metrics.csv").is_file()


@pytest.mark.slow
def test_quickstart_reaches_93_percent_and_label_smoothing_miscalibrates(calib, tmp_path):
    results = {"cross_entropy": [], "label_smoothing": []}
    for method, rows in results.items():
        for seed in range(5):
            folder = f"runs/{method}-{seed}"
            done = calib(*QUICK, "--model", method, f"--seed_everything={seed}", f"--run_dir={folder}")
            assert done.code == 0, done.err
            rows.append(json.loads((tmp_path / folder / "run.json").read_text())["results"])
    for row in results["cross_entropy"]:
        assert row["test/accuracy"] >= 0.93
    ece = {method: np.mean([row["test/ece"] for row in rows]) for method, rows in results.items()}
    assert ece["label_smoothing"] >= ece["cross_entropy"] + 0.03
    for method, rows in results.items():
        for name in ("accuracy", "ece", "nll", "brier", "correctness_auroc"):
            values = [row[f"test/{name}"] for row in rows]
            print(f"{method} {name}: {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}")
