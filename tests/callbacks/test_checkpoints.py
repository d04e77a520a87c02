"""`RunCheckpoint` where nothing is trained; stages and resume: tests/core/test_stages.py, tests/ddp."""

import pytest
import torch

from calib_lightning.callbacks import RunCheckpoint
from calib_lightning.core import ClassificationModule, load_module
from calib_lightning.data import SplitSpec, ToyDataModule
from tests.ddp.cases import digest, sgd, trainer


def module():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ClassificationModule(3, encoder="digits_cnn", optimizer=sgd)


def fit(folder, keepers, epochs, **options):
    own = module()
    trainer(folder, callbacks=keepers, max_epochs=epochs).fit(
        own, datamodule=ToyDataModule(SplitSpec(val=30), train_size=126), **options
    )
    return own


def test_a_network_that_is_not_trained_is_kept_as_it_is(tmp_path):
    best, last = RunCheckpoint(tmp_path, "best", "val/nll"), RunCheckpoint(tmp_path, "last")
    with pytest.warns(match="max_epochs is 0 and the head of ClassificationModule has random weights"):
        fit(tmp_path, [best, last], 0)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    assert last.best_model_path == str(tmp_path / "last.ckpt")
    assert best.best_model_path == ""
    assert digest(load_module(tmp_path / "last.ckpt")) == digest(module())


def test_training_from_it_is_training_from_the_start(tmp_path):
    with pytest.warns(match="has random weights"):
        fit(tmp_path, [RunCheckpoint(tmp_path, "last")], 0)
    start = tmp_path / "last.ckpt"
    ends = [
        fit(tmp_path / name, [RunCheckpoint(tmp_path / name, "last")], 2, **options)
        for name, options in (("whole", {}), ("resumed", {"ckpt_path": start, "weights_only": True}))
    ]
    assert digest(ends[0]) == digest(ends[1]) != digest(module())
    kept = torch.load(tmp_path / "resumed" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 1


def test_a_network_that_is_trained_is_kept_behind_each_epoch_alone(tmp_path):
    class Counted(RunCheckpoint):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            save = trainer.save_checkpoint
            trainer.save_checkpoint = lambda *a, **k: steps.append(trainer.global_step) or save(*a, **k)

    steps = []
    fit(tmp_path, [Counted(tmp_path, "last")], 2)
    assert steps == [3, 6]
