"""The checkpoints that `RunCheckpoint` keeps of an earlier stage: written once, from that stage, and never again."""

import os
import shutil

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from calib_lightning.callbacks import RunCheckpoint
from calib_lightning.core import ClassificationModule, StageSwitch, StepSeed
from calib_lightning.core.module_record import equal_weights
from calib_lightning.data import SplitSpec, ToyDataModule
from tests.ddp.cases import sgd, trainer

STAGE_1 = ("stage-1-best.ckpt", "stage-1-last.ckpt")


class Killed(BaseException):
    pass


class Score(Callback):
    """The first stage is better than the second."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", [0.1, 0.3, 0.2, 0.8, 0.85][trainer.current_epoch])


class KilledBefore(RunCheckpoint):
    """Stands for SIGKILL before a save; nothing of this process runs after it."""

    def _save_checkpoint(self, trainer, filepath):
        if trainer.current_epoch == 2:
            raise Killed
        super()._save_checkpoint(trainer, filepath)


def fit(folder, ckpt_path=None, last=RunCheckpoint, switch=2, epochs=4, mode="min"):
    keepers = [RunCheckpoint(folder, "best", "score", mode), last(folder, "last")]
    switches = [StageSwitch(switch)] if switch else []
    callbacks = [StepSeed(), *switches, Score(), *keepers]
    data = ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=60)
    seed_everything(3)
    try:
        trainer(folder, 1, callbacks, max_epochs=epochs).fit(
            ClassificationModule(3, encoder="digits_cnn", optimizer=sgd), None, None, data, ckpt_path, weights_only=True
        )
    finally:
        os.environ.pop("PL_GLOBAL_SEED", None)
    return keepers


def contents(folder, names=STAGE_1):
    return {name: (folder / name).read_bytes() for name in names}


def stages(folder):
    files = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")}
    return {name: (file["calib_lightning"]["stage"], file["epoch"]) for name, file in files.items()}


ALL = {"best.ckpt": (1, 2), "last.ckpt": (1, 3), "stage-1-best.ckpt": (0, 0), "stage-1-last.ckpt": (0, 1)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fit(folder)
    assert stages(folder) == ALL
    return folder


@pytest.mark.parametrize("name", STAGE_1)
def test_going_on_from_a_file_of_an_earlier_stage_leaves_it_as_it_is(tmp_path, finished, name):
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    fit(run, run / name)
    assert contents(run) == before
    # the second stage is trained again, to the same bits
    assert stages(run) == ALL
    ends = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, finished)]
    assert equal_weights(*ends)


def test_a_run_that_was_killed_between_the_first_saves_of_a_stage_keeps_the_stage_before(tmp_path, finished):
    with pytest.raises(Killed):
        fit(tmp_path, last=KilledBefore)
    assert stages(tmp_path) == {**ALL, "last.ckpt": (0, 1)}  # best of the second stage, last of the first
    before = contents(tmp_path)
    fit(tmp_path, tmp_path / "last.ckpt")
    assert stages(tmp_path) == ALL
    assert contents(tmp_path) == before


def test_a_copy_elsewhere_begins_a_folder_without_the_first_stage(tmp_path, finished):
    start = shutil.copy(finished / "stage-1-last.ckpt", tmp_path / "start.ckpt")
    before = (tmp_path / "start.ckpt").read_bytes()
    with pytest.warns(match="The dirpath has changed"):
        fit(tmp_path / "new", start)
    assert (tmp_path / "start.ckpt").read_bytes() == before
    assert stages(tmp_path / "new") == {name: ALL[name] for name in ("best.ckpt", "last.ckpt")}


def test_a_longer_first_stage_is_kept_beside_the_shorter_one(tmp_path, finished):
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    fit(run, run / "stage-1-last.ckpt", switch=3, epochs=5)
    assert contents(run) == before
    assert stages(run)["stage-1-last-2.ckpt"] == (0, 2)


def test_the_best_of_an_earlier_stage_is_its_own_file(tmp_path, finished):
    """Going on with the first stage alone: ``best.ckpt`` is of the second one by then."""
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run, ALL)
    best, last = fit(run, run / "stage-1-last.ckpt", switch=None, epochs=3)
    assert best.best_model_path == str(run / "stage-1-best.ckpt")
    assert float(best.best_model_score) == pytest.approx(0.1)
    assert last.best_model_path == str(run / "last.ckpt")
    assert contents(run, [*STAGE_1, "best.ckpt"]) == {name: before[name] for name in [*STAGE_1, "best.ckpt"]}
    assert stages(run) == {**ALL, "last.ckpt": (0, 2)}


def test_a_better_epoch_replaces_the_best_but_no_kept_file(tmp_path):
    fit(tmp_path, mode="max")
    kept = contents(tmp_path)
    best, _ = fit(tmp_path, tmp_path / "stage-1-best.ckpt", switch=None, mode="max")
    assert best.best_model_path == str(tmp_path / "best.ckpt")
    assert stages(tmp_path)["best.ckpt"] == (0, 3)
    assert contents(tmp_path) == kept


def test_a_best_whose_file_is_lost_is_forgotten(tmp_path, finished):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "stage-1-best.ckpt").unlink()
    best, _ = fit(run, run / "stage-1-last.ckpt", switch=None, epochs=3)
    assert best.best_model_path == str(run / "best.ckpt")
    assert float(best.best_model_score) == pytest.approx(0.2)  # of the one epoch that was trained
    assert stages(run)["best.ckpt"] == (0, 2)


def test_a_damaged_file_is_not_kept_and_the_run_goes_on(tmp_path):
    class Damage(RunCheckpoint):
        def on_train_epoch_start(self, trainer, pl_module):
            path = tmp_path / "last.ckpt"
            if trainer.current_epoch == 2:
                path.write_bytes(path.read_bytes()[:-5000])
            super().on_train_epoch_start(trainer, pl_module)

    with pytest.warns(match="was not kept as a checkpoint of stage 1: .* is damaged"):
        fit(tmp_path, last=Damage)
    assert stages(tmp_path) == {name: seen for name, seen in ALL.items() if name != "stage-1-last.ckpt"}
