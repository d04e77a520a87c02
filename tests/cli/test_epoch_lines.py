"""A line for each epoch, where no progress bar shows them."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from calib_lightning.commands.fit_report import EpochLines
from calib_lightning.data import SplitSpec, ToyDataModule
from calib_lightning.methods import CrossEntropy

FIT = (
    "fit",
    "-c",
    "quickstart",
    "--data=ToyDataModule",
    "--data.split.val=30",
    "--trainer.max_epochs=2",
    "--run_dir=run",
)


def test_epochs_are_printed_where_there_is_no_bar(calib):
    done = calib(*FIT, "--trainer.enable_progress_bar=false")
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("epoch ")]
    number = r"\d+\.\d{4}"
    for epoch, line in enumerate(lines, 1):
        said = rf"epoch {epoch} of 2, loss {number}, validation NLL {number}, accuracy \d+\.\d\d%, \d+\.\d s"
        assert re.fullmatch(said, line), line
    assert len(lines) == 2


class Watch(Callback):
    """Keeps what each step has logged, by epoch; saves a checkpoint within the second one."""

    def __init__(self):
        self.losses = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.setdefault(trainer.current_epoch, []).append(float(trainer.callback_metrics["train/loss"]))
        if trainer.current_epoch == 1 and batch_idx == 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "within.ckpt")


def _fit(tmp_path, ckpt_path=None, **options):
    torch.manual_seed(0)
    watch = Watch()
    module = CrossEntropy(3, encoder="digits_cnn", optimizer=lambda params: torch.optim.SGD(params, lr=0.05))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EpochLines(quiet=False), watch],
        **options,
    )
    trainer.fit(module, datamodule=ToyDataModule(SplitSpec(val=31), batch_size=16, train_size=96), ckpt_path=ckpt_path)
    return watch.losses


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_loss_is_the_mean_of_the_epoch(tmp_path, capsys, accumulated):
    losses = _fit(tmp_path, accumulate_grad_batches=accumulated)
    said = re.findall(r"^epoch \d of 2, loss ([\d.]+),", capsys.readouterr().out, re.MULTILINE)
    assert [len(steps) for steps in losses.values()] == [4, 4]
    for value, steps in zip(said, losses.values(), strict=True):
        assert float(value) == pytest.approx(sum(steps) / 4, abs=6e-5)
        assert abs(steps[-1] - sum(steps) / 4) > 1e-3


def test_a_run_resumed_within_an_epoch_tells_of_the_rest(tmp_path, capsys):
    _fit(tmp_path)
    capsys.readouterr()
    losses = _fit(tmp_path, tmp_path / "within.ckpt")
    loss, seconds = re.findall(r"loss ([\d.]+),.* ([\d.]+) s$", capsys.readouterr().out, re.MULTILINE)[0]
    assert len(losses[1]) == 2
    assert float(loss) == pytest.approx(sum(losses[1]) / len(losses[1]), abs=6e-5)
    assert float(seconds) < 60


def test_a_bar_or_quiet_leaves_them_out(calib):
    for option in ("--trainer.enable_progress_bar=true", "--quiet"):
        assert "epoch 1 of" not in calib(*FIT, option).out
