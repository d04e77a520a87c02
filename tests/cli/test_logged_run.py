"""What Weights & Biases, TensorBoard and CSV are told of a run, read back from their own files."""

import csv
import errno
import itertools
import json
import math
import os

import numpy as np
import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from calib_lightning.__main__ import main
from calib_lightning.callbacks import LogRun, log_run
from calib_lightning.callbacks.logged_keys import is_core
from calib_lightning.callbacks.wandb_run import log_files
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import Focal

from .conftest import TOY
from .wandb_records import Logged, logged

wandb = pytest.importorskip("wandb")

RUN = "runs/mine"
CORE = {
    "accuracy": "max",
    "nll": "min",
    "brier": "min",
    "ece": "min",
    "signed_gap": None,  # the last value
    "correctness_auroc": "max",
}
OFFLINE = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True, "project": "ours"}}
TENSORBOARD = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": ".", "name": "tensorboard"},
}
FIT = ("fit", "-c", "quickstart", "--model", "mixup", f"--run_dir={RUN}", "--quiet=true", "--trainer.max_epochs=2")


def _here(patch, folder):
    """Weights & Biases keeps nothing outside the folder, and needs neither network nor key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_SILENT", "true")
    for kind in ("CACHE", "CONFIG", "DATA"):
        patch.setenv(f"WANDB_{kind}_DIR", str(folder / "of-wandb"))
    patch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    _here(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one run with three loggers, that of Weights & Biases offline."""
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _here(patch, folder)
        assert main([*FIT, f"--trainer.logger={json.dumps([OFFLINE, TENSORBOARD])}"]) == 0
    os.environ.pop("PL_GLOBAL_SEED", None)
    return folder / RUN


@pytest.fixture(scope="module")
def record(run):
    return json.loads((run / "run.json").read_text())


def test_the_configuration_is_complete(run, record):
    config = logged(run).config
    short = {name: config[name] for name in ("method", "data", "network", "seed", "recipe", "callbacks")}
    assert short == {
        "method": "mixup",
        "data": "digits_lt",
        "network": "digits_cnn",
        "seed": 0,
        "recipe": "quickstart",
        "callbacks": [],
    }
    assert config["splits"] == record["splits"]
    assert config["config"] == yaml.safe_load((run / "config.yaml").read_text())
    assert config["config"]["model"]["init_args"]["alpha"] == 0.2
    assert config["method_class"].endswith(".Mixup")
    built = {name: config[name] for name in ("optimizer", "learning_rate", "momentum", "weight_decay", "scheduler")}
    assert built == {
        "optimizer": "SGD",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "scheduler": "CosineToEnd",
    }
    assert (config["batch_size"], config["max_epochs"]) == (32, 2)
    for name in ("versions", "revision", "device"):
        assert config[name] == record["stages"][0][name]
    assert not [key for key in config if "." in key]


def test_name_group_type_and_tags_tell_the_run_apart(run):
    told = logged(run)
    assert (told.name, told.group, told.job_type) == ("digits_lt-mixup-0", "digits_lt-digits_cnn-mixup", "fit")
    assert sorted(told.tags) == ["digits_cnn", "digits_lt", "mixup"]
    assert told.exit_code == 0
    assert json.loads((run / "wandb.json").read_text())["id"] == told.id


def test_the_summary_has_core_values_equal_to_those_of_the_record(run, record):
    summary = logged(run).summary
    for name in ("test", "calibration"):
        assert {key: summary[f"{name}/{key}"] for key in CORE} == {
            key: record["results"][f"{name}/{key}"] for key in CORE
        }
    plain = {key for key in summary if "|" not in key and key.partition("/")[0] in ("test", "calibration")}
    assert plain == {f"{name}/{key}" for name in ("test", "calibration") for key in CORE}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key, kind in CORE.items():
        values = [float(row[f"val/{key}"]) for row in rows if row[f"val/{key}"]]
        assert len(values) == 2
        if kind is None:
            assert summary[f"val/{key}"] == pytest.approx(values[-1], rel=1e-6)
        else:
            best = {"max": max, "min": min}[kind](values)
            assert summary[f"val/{key}"] == {kind: pytest.approx(best, rel=1e-6)}
    assert not any(key.startswith(("test/", "calibration/")) for key in rows[0])  # run.json has them
    assert [int(row["epoch"]) for row in rows] == [0, 1]


def test_metrics_are_defined_over_epochs_with_their_better_direction(run):
    metrics = logged(run).metrics
    for key, kind in CORE.items():
        for name, expected in (("train", kind), ("val", kind), ("test", None), ("calibration", None)):
            found = metrics[f"{name}/{key}"]
            assert found.step_metric == "epoch"
            assert [field.name for field, value in found.summary.ListFields() if value] == (
                [expected] if expected else []
            )


def test_checkpoint_predictions_and_record_are_artifacts(run):
    told = logged(run)
    for kind, root in (("model", run / "checkpoints"), ("predictions", run / "predictions"), ("run", run)):
        name, files = told.artifacts[kind][-1]
        assert name == f"{kind}-{told.id}"
        assert files == {path: (root / path).stat().st_size for path in files}
    assert {kind: sorted(told.artifacts[kind][-1][1]) for kind in ("model", "predictions", "run")} == {
        "model": ["best.ckpt"],
        "predictions": ["calibration.npz", "test.npz"],
        "run": ["config.yaml", "run.json", "splits.npz"],
    }


def test_figures_and_a_table_of_predictions_are_logged(run):
    (files,) = run.glob("wandb/offline-run-*/files")
    for kind in ("reliability", "confidence", "risk_coverage"):
        assert len(list(files.glob(f"media/images/test/{kind}_*.png"))) == 1
    (path,) = files.glob("media/table/test/predictions_*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["index", "label", "prediction", "confidence", "correct"]
    with np.load(run / "predictions/test.npz") as saved:
        assert len(table["data"]) == len(saved["labels"])
        logits = saved["logits"][7].astype(float)
        label = str(saved["labels"][7])
        index = int(saved["index"][7])
    probs = np.exp(logits) / np.exp(logits).sum()
    predicted = str(probs.argmax())
    assert table["data"][7] == [index, label, predicted, pytest.approx(probs.max()), predicted == label]


def test_tensorboard_has_the_same_facts_the_figures_and_columns_for_core_metrics(run, record):
    (folder,) = (run / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for key in CORE:
        assert events.Scalars(f"test/{key}")[-1].value == pytest.approx(record["results"][f"test/{key}"], rel=1e-6)
    assert "hp_metric" not in events.Tags()["scalars"]
    assert "test/smece" not in events.Tags()["scalars"]
    assert "test/reliability" in events.Tags()["images"]
    plugin = {
        part: HParamsPluginData.FromString(events.summary_metadata[f"_hparams_/{part}"].plugin_data.content)
        for part in ("experiment", "session_start_info")
    }
    columns = {info.name.tag for info in plugin["experiment"].experiment.metric_infos}
    assert {f"test/{key}" for key in CORE} <= columns
    told = plugin["session_start_info"].session_start_info.hparams
    assert told["method"].string_value == "mixup"
    assert told["seed"].number_value == 0
    assert told["learning_rate"].number_value == 0.05
    assert told["splits"].string_value == record["splits"]
    assert told["config/model/init_args/alpha"].number_value == 0.2
    kept = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert kept["config"] == yaml.safe_load((run / "config.yaml").read_text())


NETWORK = ("--model.encoder=digits_cnn", "--trainer.accelerator=cpu", "--trainer.max_epochs=1")


def _toy(method="cross_entropy", **arguments):
    """A fit of the tiny set with Weights & Biases offline."""
    asked = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True, **arguments}}
    return ("fit", *TOY, "--model", method, *NETWORK, f"--trainer.logger={json.dumps(asked)}")


@pytest.mark.usefixtures("offline")
def test_a_grid_read_back_is_grouped_by_method(calib, tmp_path):
    for method in ("mixup", "label_smoothing"):
        for seed in (0, 1):
            done = calib(*_toy(method), f"--seed_everything={seed}", f"--run_dir=runs/{method}-{seed}")
            assert done.code == 0, done.err
    told = [logged(folder) for folder in sorted(tmp_path.glob("runs/*"))]
    assert len({run.id for run in told}) == 4
    assert [(run.group, run.config["method"], run.config["seed"]) for run in told] == [
        ("toy-digits_cnn-label_smoothing", "label_smoothing", 0),
        ("toy-digits_cnn-label_smoothing", "label_smoothing", 1),
        ("toy-digits_cnn-mixup", "mixup", 0),
        ("toy-digits_cnn-mixup", "mixup", 1),
    ]
    names = ["toy-label_smoothing-0", "toy-label_smoothing-1", "toy-mixup-0", "toy-mixup-1"]
    assert [run.name for run in told] == names
    assert len({run.config["splits"] for run in told}) == 1
    assert told[0].config["config"]["model"]["init_args"]["smoothing"] == 0.05
    for run, folder in zip(told, sorted(tmp_path.glob("runs/*")), strict=True):
        results = json.loads((folder / "run.json").read_text())["results"]
        assert {key: run.summary[f"test/{key}"] for key in CORE} == {key: results[f"test/{key}"] for key in CORE}


@pytest.mark.usefixtures("offline")
def test_a_run_of_a_benchmark_has_the_names_of_its_grid(calib, tmp_path):
    (tmp_path / "runs").mkdir()
    entry = {"folder": "mine", "data": "toy", "network": "small", "method": "focal-2"}
    (tmp_path / "runs/benchmark.json").write_text(json.dumps({"runs": [entry]}))
    assert calib(*_toy("focal"), f"--run_dir={RUN}", "-c", "callback/temperature").code == 0
    told = logged(tmp_path / RUN)
    assert (told.name, told.group) == ("toy-focal-2-0", "toy-small-focal-2")
    assert (told.config["method"], told.config["method_class"].rpartition(".")[2]) == ("focal-2", "Focal")
    assert told.config["callbacks"] == ["post_hoc_calibrate"]


@pytest.mark.usefixtures("offline")
def test_what_the_user_sets_stays(calib, tmp_path, monkeypatch):
    wandb.teardown()  # the package reads its environment once
    monkeypatch.setenv("WANDB_JOB_TYPE", "sweep")
    own = {"name": "mine", "group": "ours", "tags": ["first"]}
    assert calib(*_toy(**own), f"--run_dir={RUN}", "--log_limit=0").code == 0
    told = logged(tmp_path / RUN)
    assert (told.name, told.group, told.job_type, told.tags) == ("mine", "ours", "sweep", ["first"])
    assert set(told.artifacts) <= {"run_table"}  # of the table of predictions


@pytest.mark.usefixtures("offline")
def test_a_resumed_run_goes_on_and_a_test_of_it_names_it(calib, tmp_path):
    folder = tmp_path / RUN
    options = (f"--trainer.logger={json.dumps([OFFLINE])}", "--trainer.max_epochs=1", "--test_after_fit=false")
    assert calib(*FIT, *options).code == 0
    first = logged(folder)
    resumed = calib(
        *("fit", "-c", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/last.ckpt"),
        *("--trainer.max_epochs=2", "--quiet"),
    )
    assert resumed.code == 0, resumed.err
    written = [Logged(path) for path in sorted(folder.glob("wandb/*run-*/run-*.wandb"))]
    assert [run.id for run in written] == [first.id] * 2
    assert [run.config["max_epochs"] for run in written] == [1, 2]
    for name in ("data", "method", "network", "recipe"):
        assert written[1].config[name] == first.config[name]
    assert (
        (written[1].name, written[1].group)
        == (first.name, first.group)
        == (
            "digits_lt-mixup-0",
            "digits_lt-digits_cnn-mixup",
        )
    )
    assert calib("test", "-c", folder / "config.yaml", "--log_all=true", "--quiet").code == 0
    tested = logged(folder / "test")
    assert (tested.job_type, tested.group, tested.name) == ("test", first.group, first.name)
    assert tested.id != first.id
    assert tested.config["trained_in_wandb"] == first.id
    results = json.loads((folder / "test/run.json").read_text())["results"]
    kept = {key: tested.summary[key] for key in results}
    assert len(kept) > 60
    assert kept == {key: "NaN" if math.isnan(value) else value for key, value in results.items()}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "places",
    [
        [(log_run, "facts_of"), (log_run, "define_metrics"), (wandb.Artifact, "add_file"), (wandb, "Table")],
        [(wandb.Run, "log_artifact"), (wandb.Run, "log"), (wandb.Run, "finish")],
    ],
    ids=["before", "at the end"],
)
def test_a_logger_whose_every_call_fails_costs_nothing(calib, tmp_path, monkeypatch, places):
    called = set()

    def failing(name, error):
        def fail(*args, **kwargs):
            called.add(name)
            raise error

        return fail

    errors = itertools.cycle([OSError(errno.ENOSPC, "No space left on device"), ConnectionError("no route to host")])
    with monkeypatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, failing(name, next(errors)))
        done = calib(*_toy(), "--run_dir=runs/failing")
    if wandb.run is not None:
        wandb.finish()
    assert done.code == 0, done.err
    assert called == {name for _, name in places}
    assert done.err.count("WandbLogger.") == 1
    assert "The run goes on" in done.err
    assert calib(*_toy(), "--trainer.logger=false", "--run_dir=runs/alone").code == 0
    values, expected = ((tmp_path / "runs" / name / "metrics.csv").read_text() for name in ("failing", "alone"))
    assert values == expected


@pytest.mark.usefixtures("offline")
def test_with_a_trainer_in_python_the_facts_are_read_from_module_and_data(tmp_path):
    data = ToyDataModule(SplitSpec(val=30))
    loggers = [
        WandbLogger(offline=True, save_dir=tmp_path, name="mine"),
        CSVLogger(tmp_path, name="csv", version=""),
    ]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=loggers,
        callbacks=[LogRun()],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Focal(10, gamma=2.0, encoder="digits_cnn"), data)
    loggers[0].experiment.finish()
    told, kept = logged(tmp_path), yaml.safe_load((tmp_path / "csv/hparams.yaml").read_text())
    for facts in (told.config, kept):
        assert (facts["method"], facts["data"], facts["network"]) == ("focal", "toy", "digits_cnn")
        assert facts["splits"] == data.splits_hash
        assert facts["config"]["model"]["gamma"] == 2.0
        assert facts["optimizer"] == "SGD"
    assert list(told.artifacts) == ["model"]


def test_an_artifact_above_the_limit_is_left_out_with_a_note(tmp_path, caplog):
    class Run:
        id, taken = "abc", []

        def log_artifact(self, artifact):
            self.taken.append((artifact.name, artifact.type, artifact.metadata))

    path = tmp_path / "best.ckpt"
    path.write_bytes(bytes(2**21))
    run = Run()
    with caplog.at_level("INFO"):
        log_files(run, "model", {"best.ckpt": path}, limit=1.9)
        assert "no artifact model: 2 MiB are above log_limit (1.9 MiB)" in caplog.text
        log_files(run, "model", {"best.ckpt": path}, limit=0.0)
    assert not run.taken
    assert caplog.text.count("log_limit") == 1
    log_files(run, "model", {"best.ckpt": path}, limit=2.0)
    assert run.taken == [("model-abc", "model", {"mib": 2.0})]


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_below_zero_is_rejected(limit):
    with pytest.raises(ValueError, match=r"log_limit is .*; it must be at least 0"):
        LogRun(log_limit=limit)


def test_core_keys_are_the_few_by_which_runs_are_compared():
    kept = ("test/ece", "shift/generated/nll", "ood/svhn/fpr95", "train/loss", "lr-SGD", "test/reliability", "epoch")
    dropped = ("test/smece", "test/n", "shift/generated/fog_3/nll", "shift/generated/fog_3/n", "ood/sets")
    assert [key for key in (*kept, *dropped) if is_core(key)] == list(kept)
