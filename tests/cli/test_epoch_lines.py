"""A line for each epoch, where no progress bar shows them."""

import re

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


def test_a_bar_or_quiet_leaves_them_out(calib):
    for option in ("--trainer.enable_progress_bar=true", "--quiet"):
        assert "epoch 1 of" not in calib(*FIT, option).out
