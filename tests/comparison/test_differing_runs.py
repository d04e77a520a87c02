"""What runs that are compared differ in, beside method and seed."""

import pytest

from calib_lightning import compare
from tests.comparison.run_folders import write_grid, write_run


def _said(*runs):
    report = compare(list(runs), metrics="accuracy", exchanges=50)
    return [note for note in report.notes if "differ in more than" in note]


def _optimizer(lr):
    return {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}}}


def test_other_lengths_of_training_are_said(tmp_path):
    runs = [write_run(tmp_path / f"{seed}", 20, seed, config={"trainer": {"max_epochs": 6}}) for seed in range(2)]
    runs.append(write_run(tmp_path / "focal", 25, method="Focal", config={"trainer": {"max_epochs": 10}}))
    assert _said(*runs) == [
        "digits, digits_cnn: these runs differ in more than method and seed: "
        "trainer.max_epochs (6: cross_entropy; 10: focal)"
    ]
    assert "trainer.max_epochs (6: cross_entropy; 10: focal)" in compare(runs, metrics="accuracy").table()


def test_equal_trainings_of_several_methods_are_not_said(tmp_path):
    quiet = {"trainer": {"max_epochs": 15, "enable_progress_bar": False}, "quiet": True, "seed_everything": 7}
    moved = {"class_path": "calib_lightning.data.DigitsDataModule", "init_args": {"batch_size": 32, "root": "there"}}
    callback = {"trainer": {"max_epochs": 15, "callbacks": [{"class_path": "calib_lightning.callbacks.X"}]}}
    runs = [
        write_run(tmp_path / "plain", 20, config={"data": moved}),
        write_run(tmp_path / "smooth", 22, method="LabelSmoothing", options={"label_smoothing": 0.2}, config=quiet),
        write_run(tmp_path / "called", 25, config=callback),
    ]
    assert _said(*runs) == []


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("Focal", _optimizer(0.1), ["model.optimizer.lr (0.05: cross_entropy; 0.1: focal)"]),
        ("Focal", {"scheduler": "CosineToEnd"}, ["model.scheduler (not set: cross_entropy; CosineToEnd: focal)"]),
        ("RefCal", _optimizer(0.5), []),  # its own configuration has an optimiser
    ],
)
def test_the_optimizer_is_said_unless_it_is_the_methods_own(tmp_path, method, options, said):
    runs = [write_run(tmp_path / "plain", 20), write_run(tmp_path / "other", 25, method=method, options=options)]
    assert [note.partition("seed: ")[2] for note in _said(*runs)] == said


def test_many_differing_settings_are_not_all_named(tmp_path):
    settings = dict.fromkeys(("accumulate_grad_batches", "gradient_clip_val", "limit_train_batches"), 1)
    other = {"trainer": {"max_epochs": 15, **settings, "precision": "bf16"}, "select_on": "last", "num_classes": 10}
    runs = [write_run(tmp_path / "plain", 20), write_run(tmp_path / "focal", 25, method="Focal", config=other)]
    (said,) = _said(*runs)
    assert said.count(" (not set: ") == 5
    assert said.endswith(", and 1 more")


def test_what_one_benchmark_asks_for_is_not_said_but_beside_another_run_it_is(tmp_path):
    grid = write_grid(tmp_path / "grid", {"cross_entropy": [20, 21, 22], "label_smoothing": [30, 31, 32]})
    for config in grid.glob("*-label_smoothing-*/config.yaml"):
        config.write_text(config.read_text().replace("max_epochs: 15", "max_epochs: 20"))
    assert _said(grid) == []
    for config in grid.glob("*/config.yaml"):
        config.write_text(config.read_text().replace("max_epochs: 20", "max_epochs: 15"))
    other = write_grid(tmp_path / "other", {"mixup": [40, 41, 42]}, config={"trainer": {"max_epochs": 20}})
    assert len(_said(grid, other)) == 1
