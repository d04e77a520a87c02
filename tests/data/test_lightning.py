"""The data modules inside Lightning: resume, skipped validation, configuration files."""

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer

from calib_lightning.data import BenchmarkDataModule, CIFAR10DataModule, DigitsDataModule, SplitSpec, ToyDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:(?s).*instantiate_classes"),
    pytest.mark.filterwarnings("ignore:(?s).*JsonargparseDeprecationWarning"),
]


class Recorder(LightningModule):
    """A linear classifier that writes down which rows it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 3)
        self.seen = {}

    def training_step(self, batch):
        self.seen.setdefault(self.current_epoch, []).append(batch.index.tolist())
        return torch.nn.functional.cross_entropy(self.layer(batch.image.flatten(1)), batch.label)

    def validation_step(self, batch):
        self.seen.setdefault("val", []).extend(batch.index.tolist())

    def test_step(self, batch):
        self.seen.setdefault("test", []).extend(batch.index.tolist())

    def predict_step(self, batch):
        return batch.index

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class StopAt(Callback):
    """Save after a step and leave."""

    def __init__(self, step, path, hook):
        self.step, self.path, self.hook = step, path, hook

    def on_train_batch_end(self, trainer, *_):
        if self.hook == "batch" and trainer.global_step == self.step:
            self.leave(trainer)

    def on_train_epoch_end(self, trainer, _):
        if self.hook == "epoch" and trainer.global_step == self.step:
            self.leave(trainer)

    def leave(self, trainer):
        trainer.save_checkpoint(self.path)
        raise KeyboardInterrupt


def make_trainer(tmp_path, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "devices": 1}
    return Trainer(default_root_dir=tmp_path, max_epochs=3, **(quiet | options))


def make_data(**options):
    return ToyDataModule(**({"train_size": 64, "batch_size": 4} | options))


def fit(tmp_path, **options):
    module = Recorder()
    ckpt_path = options.pop("ckpt_path", None)
    data = options.pop("data", None) or make_data()
    make_trainer(tmp_path, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("step", "hook"), [(5, "batch"), (21, "batch"), (31, "batch"), (16, "epoch"), (32, "epoch")])
def test_resumed_run_is_the_uninterrupted_run(tmp_path, step, hook):
    whole = fit(tmp_path)
    assert [len(whole.seen[epoch]) for epoch in range(3)] == [16, 16, 16]
    path = tmp_path / "stop.ckpt"
    stopped = Recorder()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        make_trainer(tmp_path, callbacks=[StopAt(step, path, hook)]).fit(stopped, make_data())
    resumed = fit(tmp_path, ckpt_path=path)
    for epoch in range(3):
        rows = stopped.seen.get(epoch, []) + resumed.seen.get(epoch, [])
        assert rows == whole.seen[epoch]
        assert sorted(sum(map(tuple, rows), ())) == list(range(64))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_every_epoch_has_its_own_order(tmp_path):
    seen = fit(tmp_path).seen
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_validation_is_skipped_without_a_validation_set(tmp_path):
    assert "val" not in fit(tmp_path).seen
    with_val = fit(tmp_path, data=make_data(split=SplitSpec(val=10)), num_sanity_val_steps=1)
    assert with_val.seen["val"] == [0, 1, 2, 3] + 3 * list(range(10))


def test_test_and_predict_see_every_row_once(tmp_path):
    module, trainer = Recorder(), make_trainer(tmp_path)
    data = make_data(test_size=101)
    trainer.test(module, data, verbose=False)
    assert module.seen["test"] == list(range(101))
    assert torch.cat(trainer.predict(module, data)).tolist() == list(range(101))


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_sees_the_same_batches_in_every_epoch(tmp_path):
    seen = fit(tmp_path, overfit_batches=2).seen
    assert seen[0] == seen[1] == seen[2] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_limited_epochs_start_from_their_first_batch(tmp_path):
    seen, whole = fit(tmp_path, limit_train_batches=5).seen, fit(tmp_path).seen
    assert [seen[epoch] for epoch in range(3)] == [whole[epoch][:5] for epoch in range(3)]


CONFIG = """
class_path: calib_lightning.data.CIFAR10DataModule
init_args:
  root: somewhere
  batch_size: 64
  split: {val: 5000, imbalance: 0.1, profile: step, subset: null}
"""


def test_data_module_from_a_configuration_file(tmp_path):
    parser = ArgumentParser()
    parser.add_subclass_arguments(BenchmarkDataModule, "data")
    path = tmp_path / "data.yaml"
    path.write_text(CONFIG)
    config = parser.parse_args([f"--data={path}", "--data.num_workers=2", "--data.split.calibration=100"])
    data = parser.instantiate_classes(config).data
    assert type(data) is CIFAR10DataModule
    assert data.split == SplitSpec(val=5000, calibration=100, imbalance=0.1, profile="step")
    assert (data.batch_size, data.num_workers, data.root.name) == (64, 2, "somewhere")
    again = parser.parse_object(yaml.safe_load(parser.dump(config)))
    assert parser.instantiate_classes(again).data.split == data.split


@pytest.mark.parametrize(("name", "kind"), [("ToyDataModule", ToyDataModule), ("DigitsDataModule", DigitsDataModule)])
def test_data_module_by_name(name, kind):
    parser = ArgumentParser()
    parser.add_subclass_arguments(BenchmarkDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args([f"--data={name}", "--data.batch_size=8"])).data
    assert type(data) is kind
    assert data.split == kind.default_split
    assert data.batch_size == 8


def test_impossible_split_in_a_configuration(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BenchmarkDataModule, "data")
    config = parser.parse_args(["--data=ToyDataModule", "--data.split.imbalance=2"])
    with pytest.raises(ValueError, match="imbalance is 2"):
        parser.instantiate_classes(config)
