"""Benchmarks that are run, changed and run again."""

import json
import shlex
import time

import pytest

from .grids import results_of, runs_of, stages_of, write_grid

OUT = "runs/grid"


def _states(folder):
    return {name: entry["status"] for name, entry in runs_of(folder).items()}


def _times(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/run.json")}


def test_finished_runs_stay_and_only_what_changed_runs_again(run_grid, tmp_path):
    write_grid(tmp_path, method=["cross_entropy", "focal"], baseline="cross_entropy")
    done = run_grid("grid.yaml")
    assert done.code == 0, done.err
    out = tmp_path / OUT
    record = json.loads((out / "benchmark.json").read_text())
    assert (record["file"], record["baseline"]) == ("grid.yaml", "cross_entropy")
    assert [run["folder"] for run in record["runs"]] == ["toy-digits_cnn-cross_entropy-0", "toy-digits_cnn-focal-0"]
    for run in record["runs"]:
        assert (run["data"], run["network"], run["seed"], run["status"]) == ("toy", "digits_cnn", 0, "finished")
        assert run["calibrators"] == ["Temperature"]
        assert run["calibration"] == "calibrate"
        assert run["seconds"] > 0
        assert stages_of(out / run["folder"]) == ["fit", "test"]
        assert "temperature" in results_of(out / run["folder"])
        assert "$ calib fit" in (out / "logs" / f"{run['folder']}.txt").read_text()
    assert f"1 of 2: toy-digits_cnn-cross_entropy-0: log in {OUT}/logs/toy-digits_cnn-cross_entropy-0.txt; " in done.out
    log = (out / "logs" / "toy-digits_cnn-cross_entropy-0.txt").read_text()
    assert log.startswith("$ calib fit")
    assert [line[:12] for line in log.splitlines() if line.startswith("epoch ")] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert "RuntimeWarning" not in log
    assert "calib: note: the grid has 1 seed, so that no difference between methods will be marked" in done.err
    assert " s left\n" in done.out
    first = _times(out)

    # nothing to do
    done = run_grid("grid.yaml")
    assert done.code == 0
    assert _times(out) == first
    assert "1 of 2" not in done.out

    # what changes no result
    write_grid(tmp_path, method=["cross_entropy", "focal"], options={"data.num_workers": 1, "trainer.logger": False})
    assert run_grid("grid.yaml").code == 0
    assert _times(out) == first

    # a new calibrator is fitted to what is there
    write_grid(tmp_path, method=["cross_entropy", "focal"], calibrators=["Temperature", "VectorScaling"])
    assert run_grid("grid.yaml").code == 0
    assert _times(out) == first
    assert {run["calibration"] for run in runs_of(out).values()} == {"calibrate-2"}
    report = json.loads((out / "toy-digits_cnn-focal-0/calibrate-2/report.json").read_text())
    assert set(report["calibrators"]) == {"Temperature", "VectorScaling"}

    # another option of one method
    focal = {"method": "focal", "options": {"model.gamma": 1}}
    write_grid(tmp_path, method=["cross_entropy", focal])
    assert run_grid("grid.yaml").code == 0
    assert list(runs_of(out)) == ["toy-digits_cnn-cross_entropy-0", "toy-digits_cnn-focal-0-2"]
    assert {name: changed for name, changed in _times(out).items() if name in first} == first

    # other splits are other runs
    data = {"as": "toy", "data": "ToyDataModule", "options": {"data.split": {"val": 30, "calibration": 30, "seed": 1}}}
    write_grid(tmp_path, data=data, method="cross_entropy")
    assert run_grid("grid.yaml").code == 0
    assert list(runs_of(out)) == ["toy-digits_cnn-cross_entropy-0-2"]

    # and back again: the first folders hold these runs
    write_grid(tmp_path, method=["cross_entropy", "focal"])
    before = _times(out)
    assert run_grid("grid.yaml").code == 0
    assert _times(out) == before
    assert list(runs_of(out)) == ["toy-digits_cnn-cross_entropy-0", "toy-digits_cnn-focal-0"]


def test_a_failing_run_leaves_the_others_and_is_tried_again(run_grid, tmp_path):
    broken = {"trainer.callbacks": "tests.benchmark.grids.Raises"}
    methods = [
        {"as": "late", "method": "cross_entropy", "options": broken | {"trainer.callbacks.epoch": 1}},
        {"as": "killed", "method": "cross_entropy", "options": broken | {"trainer.callbacks.kill": True}},
        "focal",
    ]
    write_grid(tmp_path, method=methods, calibrators=["Temperature"])
    done = run_grid("grid.yaml")
    assert done.code == 1
    out = tmp_path / OUT
    assert list(_states(out).values()) == ["failed", "failed", "finished"]
    late, killed, _ = runs_of(out).values()
    assert late["error"] == "the loss is lost"
    assert killed["error"] == "ended by SIGKILL, as the system does when memory runs out"
    assert f"calib: error: {OUT}/{late['folder']}: the loss is lost (see {OUT}/logs/{late['folder']}.txt)" in done.err
    assert "1 of 3 runs are finished" in done.out
    assert "Traceback" in (out / late["folder"] / "error.log").read_text()

    # tried again: from its checkpoint, and from the start where there is none
    done = run_grid("grid.yaml")
    assert done.code == 1
    assert stages_of(out / late["folder"]) == ["fit", "fit"]
    assert list(runs_of(out)) == [late["folder"], killed["folder"], "toy-digits_cnn-focal-0"]
    assert stages_of(out / "toy-digits_cnn-focal-0") == ["fit", "test"]


def test_a_calibrator_that_fails_is_said_and_only_calibration_is_tried_again(run_grid, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_BROKEN_CALIBRATOR", "1")
    write_grid(tmp_path, method="cross_entropy", calibrators=["Temperature", "VectorScaling"])
    done = run_grid("grid.yaml")
    out = tmp_path / OUT
    (run,) = runs_of(out).values()
    assert (done.code, run["status"]) == (1, "failed"), done.err
    assert run["error"] == "Temperature: no temperature is right"
    monkeypatch.delenv("TEST_BROKEN_CALIBRATOR")
    assert run_grid("grid.yaml").code == 0
    assert _states(out) == {run["folder"]: "finished"}
    assert stages_of(out / run["folder"]) == ["fit", "test"]


def test_two_at_once_are_refused(run_grid, forked, tmp_path):
    write_grid(tmp_path, method="cross_entropy", options={"trainer.max_epochs": 100000})
    first = forked("benchmark", "grid.yaml")
    first.wait_for(lambda: any((tmp_path / OUT).glob("*/checkpoints/last.ckpt")))
    done = run_grid("grid.yaml")
    assert done.code == 1
    assert f"The benchmark {OUT} is run by process {first.pid}" in done.err
    assert "--output" in done.err
    # the run that the first one has left is not begun a second time while it ends
    first.kill()
    write_grid(tmp_path, method="focal")
    assert run_grid("grid.yaml").code == 0


def test_printed_commands_are_runs_of_the_benchmark(run_grid, calib, tmp_path):
    masked = {"method": "mac_cal", "options": {"model.switch.at_epoch": -1}}
    write_grid(tmp_path, method=[masked, "cross_entropy", "focal"], seeds=[0, 1])
    done = run_grid("grid.yaml", "--print")
    lines = done.out.splitlines()
    assert done.code == 0
    assert len(lines) == 6
    assert "the first 2 of 6 commands train first stages" in done.err
    out = tmp_path / OUT
    assert set(_states(out).values()) == {"waiting"}
    for line in lines:
        fit, calibrate = (shlex.split(command) for command in line.split(" && "))
        for words in (fit, calibrate):
            assert words[0] == "calib"
            done = calib(*words[1:])
            assert done.code == 0, done.err
    assert "--ckpt_path=runs/grid/toy-digits_cnn-cross_entropy-1/checkpoints/last.ckpt" in lines[-1]
    before, folders = _times(out), list(runs_of(out))
    assert len(before) == 6
    assert run_grid("grid.yaml", "--print").out == ""
    done = run_grid("grid.yaml")
    assert done.code == 0
    assert _times(out) == before
    assert list(runs_of(out)) == folders
    assert set(_states(out).values()) == {"finished"}
    assert all(run["seconds"] > 0 for run in runs_of(out).values())


def test_a_dry_run_lists_and_starts_nothing(run_grid, tmp_path):
    masked = {"method": "mac_cal", "options": {"model.switch.at_epoch": -1}}
    write_grid(tmp_path, method=["cross_entropy", masked])
    done = run_grid("grid.yaml", "--dry-run")
    assert done.code == 0, done.err
    assert not (tmp_path / "runs").exists()
    lines = done.out.splitlines()
    assert lines[0].split() == ["toy-digits_cnn-cross_entropy-0", "to", "do", "unknown"]
    assert lines[1].endswith("shares the first stage of toy-digits_cnn-cross_entropy-0")
    assert lines[2] == "2 runs: 2 to do."
    assert lines[3] == "Time: unknown until a run is finished."
    # two runs, two checkpoints each, a value and a momentum of four bytes for each parameter
    from calib_lightning.methods import CrossEntropy

    count = sum(parameter.numel() for parameter in CrossEntropy(3, encoder="digits_cnn").parameters())
    assert lines[4].startswith(f"Disk: about {2 * 2 * 8 * count / 2**20:.0f} MiB more in {OUT}; ")

    write_grid(tmp_path, method="cross_entropy")
    assert run_grid("grid.yaml").code == 0
    (finished,) = runs_of(tmp_path / OUT).values()
    write_grid(tmp_path, method=["cross_entropy", masked], seeds=[0, 1])
    lines = run_grid("grid.yaml", "--dry-run").out.splitlines()
    seconds = f"{max(1, round(finished['seconds']))} s"
    assert lines[0].split() == ["toy-digits_cnn-cross_entropy-0", "finished", *seconds.split()]
    assert lines[1].split() == ["toy-digits_cnn-cross_entropy-1", "to", "do", *seconds.split()]
    assert lines[4] == "4 runs: 1 finished, 3 to do."
    assert lines[5] == f"Time: about {max(1, round(3 * finished['seconds']))} s one after another."
    assert run_grid("grid.yaml", "--dry-run", "--print").code == 2


def test_an_unfinished_run_of_an_earlier_grid_is_said(run_grid, tmp_path):
    write_grid(tmp_path, method="cross_entropy")
    left = tmp_path / OUT / "toy-digits_cnn-focal-0"
    left.mkdir(parents=True)
    (left / "config.yaml").write_text("seed_everything: 0\nmodel: {class_path: calib_lightning.methods.Focal}\n")
    (left / "run.json").write_text('{"stages": [{"stage": "fit", "status": "stopped by SIGINT"}]}')
    note = f"calib: note: {OUT}/toy-digits_cnn-focal-0 is unfinished and no run of this grid; remove it"
    assert note in run_grid("grid.yaml", "--dry-run").err
    (left / "run.json").write_text('{"stages": [{"stage": "test", "status": "finished"}]}')
    assert note not in run_grid("grid.yaml", "--dry-run").err


def test_runs_on_two_processes(calib, tmp_path):
    # with figures: a process that Lightning launches draws them, which is a collective
    write_grid(tmp_path, method="cross_entropy", options={"trainer.devices": 2, "trainer.strategy": "ddp"})
    done = calib("benchmark", "grid.yaml")
    assert done.code == 0, done.err
    (run,) = runs_of(tmp_path / OUT)
    record = json.loads((tmp_path / OUT / run / "run.json").read_text())
    assert record["stages"][0]["world_size"] == 2


@pytest.mark.parametrize("name", ["nothing", "missing.yaml"])
def test_a_file_that_is_not_there(run_grid, name):
    done = run_grid(name)
    assert done.code == 1
    assert f"FILE is '{name}', which does not exist" in done.err


def test_all_impossible_runs_are_said_at_once_and_nothing_starts(run_grid, tmp_path):
    (tmp_path / "own.py").write_text(
        "from lightning.pytorch import LightningDataModule\n"
        "from calib_lightning.data import ToyDataModule\n"
        "class Loaders(LightningDataModule):\n"
        "    num_classes = 3\n"
        "    def train_dataloader(self):\n"
        "        data = ToyDataModule()\n"
        "        data.setup()\n"
        "        return data.train_dataloader()\n"
    )
    toy = {"as": "toy", "data": "ToyDataModule", "options": {"data.split": {"val": 30, "calibration": 30}}}
    without = {"as": "unsplit", "data": "ToyDataModule"}
    files = {"as": "files", "data": "cifar10", "options": {"data.root": "nowhere", "data.download": False}}
    methods = [
        "cross_entropy",
        {"method": "mac_cal", "options": {"model.switch.at_epoch": 7}},
        {"method": "focal", "options": {"model.gama": 2}},
        {"as": "none", "method": "fokal"},
    ]
    began = time.monotonic()
    write_grid(tmp_path, data=[toy, without, files, {"data": "own.Loaders"}], method=methods, calibrators="Temprature")
    done = run_grid("grid.yaml")
    assert time.monotonic() - began < 60
    assert done.code == 1
    lines = [line for line in done.err.splitlines() if line.startswith("calib: error: grid.yaml: ")]
    told = {line.removeprefix("calib: error: grid.yaml: ") for line in lines}

    def said(*words):
        return any(all(word in line for word in words) for line in told)

    assert said("calibrators: ", "Did you mean Temperature?"), told
    assert said("toy-digits_cnn-mac_cal", "at_epoch of MaskedClassifier is 7"), told
    assert said("toy-digits_cnn-focal", "gama", "gamma"), told
    assert said("toy-digits_cnn-none", "fokal", "Did you mean focal?"), told
    assert said("files-digits_cnn-cross_entropy", "nowhere"), told
    assert said("Loaders-digits_cnn-cross_entropy", "nothing is tested"), told
    assert "Nothing was started." in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"network": {"as": "colour", "network": {"name": "resnet18_cifar", "in_channels": 3}}},
            ("toy-colour-cross_entropy", "channels"),
        ),
        ({"data": "ToyDataModule"}, ("ToyDataModule: calibrators need a calibration split",)),
        ({"baseline": "cros_entropy"}, ("baseline: it is 'cros_entropy'", "Did you mean cross_entropy?")),
        ({"network": ["digits_cnn", {"as": "digits_cnn", "network": "digits_cnn"}]}, ("two runs have this name",)),
        ({"config": "callback/temprature"}, ("Did you mean callback/temperature?",)),
        ({"calibrators": "Temperature("}, ("calibrators: ", "cannot be parsed")),
    ],
)
def test_an_impossible_grid(run_grid, tmp_path, changes, words):
    write_grid(tmp_path, **{"method": "cross_entropy", **changes})
    done = run_grid("grid.yaml", "--dry-run")
    assert done.code == 1
    for word in words:
        assert word in done.err, done.err
    assert len(done.err.splitlines()) == 2
