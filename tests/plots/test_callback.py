"""Figures of every test set reach the logger of a run."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from matplotlib.text import Text
from PIL import Image

from calib_lightning.callbacks import LogFigures
from calib_lightning.callbacks import figures as callback_module
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import CrossEntropy
from calib_lightning.metrics import EvaluationState
from calib_lightning.plots import figures


def texts(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.fixture
def run(tmp_path):
    data = ToyDataModule(SplitSpec(val=40, calibration=40), batch_size=16)
    module = CrossEntropy(data.num_classes, encoder="digits_cnn")
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[LogFigures()],
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    return trainer, module, data


def test_every_set_gets_its_three_figures(run, tmp_path):
    trainer, module, data = run
    trainer.test(module, datamodule=data, verbose=False)
    files = sorted(path.name for path in (tmp_path / "figures").iterdir())
    kinds = {"reliability", "confidence", "risk_coverage"}
    names = {prefix.replace("/", "_") for prefix in module.test_sets}
    assert len(names) == 2
    assert {name.removesuffix(".png") for name in files} == {f"{n}_{k}" for n in names for k in kinds}
    for path in (tmp_path / "figures").iterdir():
        assert np.asarray(Image.open(path).convert("L")).std() > 5, path.name  # not an empty sheet


def test_the_figures_show_the_rows_of_the_set(run, monkeypatch):
    trainer, module, data = run
    taken = {}
    monkeypatch.setattr(callback_module, "log_figure", lambda loggers, name, figure, step: taken.update({name: figure}))
    trainer.test(module, datamodule=data, verbose=False)
    for prefix, state in zip(module.test_sets, module.test_states, strict=True):
        ece = state.compute()["ece"].item()
        shown = texts(taken[f"{prefix}/reliability"])
        assert f"{100 * ece:.2f}" in shown, shown
        assert f"{int(state.count):,}" in shown or str(int(state.count)) in shown, shown


def test_a_module_of_another_kind_is_left_alone(tmp_path):
    class Other(LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    trainer = Trainer(
        accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=[LogFigures()], enable_progress_bar=False
    )
    trainer.test(Other(), torch.utils.data.DataLoader(torch.zeros(4, 1)), verbose=False)
    assert not list(tmp_path.rglob("*.png"))


def test_what_the_state_does_not_hold_is_left_out():
    logits, labels = torch.randn(50, 4), torch.arange(50) % 4
    for metrics, kinds in (
        (["ece"], {"reliability"}),
        (["aurc"], {"confidence", "risk_coverage"}),
        (["nll"], set()),
    ):
        state = EvaluationState(metrics)
        state.update(logits, labels)
        assert set(figures(state)) == kinds
    binned = EvaluationState(["ece", "aurc"], rank_bins=1024)
    binned.update(logits, labels)
    assert set(figures(binned)) == {"reliability", "confidence", "risk_coverage"}
    assert set(figures(EvaluationState())) == {"reliability", "confidence", "risk_coverage"}  # no rows: says so


def test_a_figure_that_fails_does_not_cost_the_metrics(run, monkeypatch):
    trainer, module, data = run

    def broken(*args, **options):
        raise RuntimeError("no ink")

    monkeypatch.setattr(callback_module, "figures", broken)
    with pytest.warns(UserWarning, match="no figures of .*no ink"):
        trainer.test(module, datamodule=data, verbose=False)
    assert "calibration/ece" in trainer.callback_metrics
