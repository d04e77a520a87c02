"""A logger that cannot start is told before anything else; one that fails later ends nothing."""

import pickle

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from calib_lightning.callbacks import guarded
from calib_lightning.data import DigitsDataModule

from .conftest import QUICK
from .loggers import Down

SHORT = (*QUICK, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=5")
DOWN = ("--trainer.logger=tests.cli.loggers.Down",)


def _left(folder):
    weights = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return weights, (folder / "metrics.csv").read_text()


@pytest.mark.usefixtures("drawn")
def test_a_logger_that_fails_ends_neither_fit_nor_test(calib, tmp_path):
    failing = calib(*SHORT, *DOWN)
    assert failing.code == 0, failing.err
    assert failing.err.count("Down") == 1
    assert "Down.experiment failed (ConnectionError: no route to host). The run goes on" in failing.err
    assert calib(*SHORT, "--run_dir=runs/alone").code == 0
    (weights, logged), (expected, values) = _left(tmp_path / "runs/quickstart"), _left(tmp_path / "runs/alone")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert logged == values
    assert "val/accuracy" in logged


@pytest.fixture
def untouched_data(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("data was read")

    monkeypatch.setattr(DigitsDataModule, "setup", read)
    monkeypatch.setattr(DigitsDataModule, "prepare_data", read)


@pytest.mark.usefixtures("untouched_data")
@pytest.mark.parametrize(
    ("options", "absent", "words"),
    [
        (
            ("-c", "logger/wandb"),
            ["wandb._WANDB_AVAILABLE"],
            ["WandbLogger, which cannot start", "Install the package"],
        ),
        (
            ("-c", "logger/tensorboard"),
            ["tensorboard._TENSORBOARD_AVAILABLE", "tensorboard._TENSORBOARDX_AVAILABLE"],
            ["TensorBoardLogger, which cannot start", "tensorboardX", "Install the package"],
        ),
        ((*DOWN, "--trainer.logger.at_start=true"), [], ["Down, which cannot start: no route to host."]),
    ],
    ids=["wandb", "tensorboard", "server down"],
)
def test_what_a_logger_lacks_is_told_before_the_start(calib, tmp_path, monkeypatch, options, absent, words):
    for name in absent:
        place = "lightning.fabric.loggers" if "tensorboard" in name else "lightning.pytorch.loggers"
        monkeypatch.setattr(f"{place}.{name}", False)
    done = calib(*SHORT, *options)
    assert done.code == 1
    assert "Traceback" not in done.err
    for word in (*words, "leave the logger out"):
        assert word in done.err
    assert not (tmp_path / "runs/quickstart").exists()


@pytest.mark.usefixtures("untouched_data")
def test_without_a_key_the_remedy_is_told_and_no_folder_is_left(calib, tmp_path, monkeypatch):
    def no_key(self):
        (tmp_path / "runs/quickstart/wandb").mkdir()  # as wandb.init does
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(WandbLogger, "experiment", property(no_key))
    done = calib(*SHORT, "-c", "logger/wandb")
    assert done.code == 1
    assert "No API key configured" in done.err
    assert "--trainer.logger.init_args.offline=true" in done.err
    assert not (tmp_path / "runs/quickstart").exists()


def test_nothing_is_started_in_a_trial_of_one_batch(calib):
    assert calib(*SHORT, *DOWN, "--trainer.logger.at_start=true", "--trainer.fast_dev_run=true").code == 0


def test_a_guarded_logger_stays_what_it_was(tmp_path):
    logger = guarded(CSVLogger(tmp_path, name="", version=""))
    assert isinstance(logger, CSVLogger)
    assert guarded(logger) is logger
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text() == "loss,step\n1.0,0\n"
    copy = pickle.loads(pickle.dumps(logger))
    assert type(copy) is type(logger)
    assert copy.save_dir == logger.save_dir


def test_a_guarded_logger_warns_once_whatever_fails():
    def use(logger):
        logger.log_metrics({"loss": 1.0})
        logger.log_graph(torch.nn.Linear(1, 1))
        logger.save()
        logger.finalize("failed")

    with pytest.raises(ConnectionError):
        use(Down())
    with pytest.warns(UserWarning, match="Down.log_metrics failed") as caught:
        use(guarded(Down()))
    assert len(caught) == 1
