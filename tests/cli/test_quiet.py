"""A run prints what its user needs, and what others say is never hidden."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings

import lightning
import pytest
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import calib_lightning
from calib_lightning.commands.quiet import be_quiet, without_noise

from .conftest import QUICK

RUN = ("fit", "-c", "quickstart", "--run_dir=runs/quickstart", "--trainer.max_epochs=1", "--data.split.calibration=0")


def test_a_run_on_two_processes_is_one_run_and_says_one_line_then_the_table(calib, tmp_path):
    """Lightning starts the second rank itself: one folder, one table, every row once."""
    # a fresh interpreter: what Python and Lightning print depends on what a process has said before
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    environment.pop("PL_GLOBAL_SEED", None)
    command = [sys.executable, "-m", "calib_lightning", *RUN, "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # nobody but Lightning's warning of few workers, which depends on the machine, may speak there
    said = [line for line in done.stderr.splitlines() if "does not have many workers" not in line]
    assert said == []
    lines = [line for line in re.split(r"[\r\n]+", done.stdout) if line.strip()]
    assert re.fullmatch(r"CrossEntropy with digits_cnn, [\d,]+ parameters; 2 x cpu; seed 0; runs/quickstart", lines[0])
    assert lines[0] == next(line for line in lines if "CrossEntropy" in line)
    for noise in ("FLOPs", "Modules in", "Trainable", "train_state"):
        assert noise not in done.stdout
    assert done.stdout.count("runs/quickstart (best.ckpt, chosen by val/nll)") == 1
    assert done.stdout.count("correctness AUROC") == 1
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart"]
    run = tmp_path / "runs" / "quickstart"
    together = json.loads((run / "run.json").read_text())["results"]
    assert together["test/n"] == 400
    assert calib("test", "-c", run / "config.yaml", "--trainer.devices=1", "--trainer.strategy=auto").code == 0
    alone = json.loads((run / "test" / "run.json").read_text())["results"]
    assert alone["test/accuracy"] == together["test/accuracy"]
    assert alone == pytest.approx({key: together[key] for key in alone}, abs=1e-5)


def test_a_quiet_run_prints_only_the_table(calib, tmp_path):
    done = calib(*QUICK[:-1], "--quiet", "--trainer.max_epochs=1")
    assert (done.code, done.err) == (0, "")
    first, *table = done.out.splitlines()
    assert first.strip() == "runs/quickstart (best.ckpt, chosen by val/nll)"
    assert len(table) == 6
    assert all(line[0] in "┏┃┡│└" for line in table)
    done = calib("test", "-c", tmp_path / "runs/quickstart/config.yaml", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].strip().endswith("runs/quickstart/test (best.ckpt)")


def test_lightnings_table_of_modules_is_there_for_those_who_ask(calib):
    done = calib(*RUN, "--test_after_fit=false", "--trainer.enable_model_summary=true", "--run_dir=runs/summary")
    assert "Trainable params" in done.out
    assert "; runs/summary\n" in done.out


def as_of(module, text):
    """Warn as if it came from a module."""
    warnings.warn_explicit(text, UserWarning, f"/somewhere/{module}.py", 1, module=module)


FEW = "The number of training batches (15) is smaller than the logging interval"
MISSING = "Be aware that when using `ckpt_path`, callbacks need. Please add the following callbacks: "
KEPT = "\"RunCheckpoint{'monitor': None, 'mode': 'min'}\""
UNSYNCED = "It is recommended to use `self.log('{}', ..., sync_dist=True)` when logging"
RESULT = "lightning.pytorch.trainer.connectors.logger_connector.result"


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("lightning.pytorch.loops.fit_loop", FEW),
        ("lightning.pytorch.trainer.call", f"{MISSING}[{KEPT}]."),
        ("lightning.pytorch.trainer.call", f"{MISSING}[{KEPT}, {KEPT}]."),
        (RESULT, UNSYNCED.format("train/clipped")),
    ],
)
def test_what_lightning_says_is_left_out_and_the_same_of_others_is_not(module, text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with without_noise():
            as_of(module, text)
            assert caught == []
            as_of("my_module", text)
        as_of(module, text)
    assert [str(warning.message) for warning in caught] == [text, text]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("lightning.pytorch.trainer.call", f"{MISSING}[{KEPT}, 'EMA']."),
        ("lightning.pytorch.loops.fit_loop", "Something else"),
        (RESULT, UNSYNCED.format("val/mine")),
        ("calib_lightning.callbacks.record", "The images are prepared differently from those"),
        ("my_module", "Mine"),
    ],
)
@pytest.mark.filterwarnings("default")
def test_warnings_that_matter_stay(module, text):
    with warnings.catch_warnings(record=True) as caught, without_noise():
        warnings.simplefilter("always", append=True)
        as_of(module, text)
    assert [str(warning.message) for warning in caught] == [text]


def test_warnings_of_a_run_name_no_file_of_lightning_or_ours():
    for module, prefix in (
        (lightning, "calib: warning: "),
        (calib_lightning, "calib: warning: "),
        (json, json.__file__),
    ):
        with without_noise():
            said = warnings.formatwarning("ECE is nan", UserWarning, module.__file__, 177)
        assert said.startswith(prefix)
        assert "ECE is nan\n" in said


def test_a_quiet_run_hides_nothing_of_anybody_but_lightning_and_torch(caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with without_noise():
            be_quiet()
            as_of("lightning.pytorch.anything", "Lightning's")
            as_of("torch.optim.anything", "torch's")
            rank_zero_warn("mine")
            with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
                rank_zero_info("also mine")
    assert [str(warning.message) for warning in caught] == ["mine"]
    assert "also mine" in caplog.messages


@pytest.mark.parametrize(
    ("path", "text", "level", "stays", "stays_in_quiet"),
    [
        (lightning.__file__, "Seed set to 0", "INFO", False, False),
        (lightning.__file__, "[rank: 1] Seed set to 0", "INFO", False, False),
        (lightning.__file__, "`weights_only` was not set, defaulting to `False`.", "INFO", False, False),
        (lightning.__file__, "Restored all states from the checkpoint", "INFO", True, False),
        (lightning.__file__, "Seed set to 0", "WARNING", True, True),
        (calib_lightning.__file__, "Temperature, fitted to 50 calibration rows", "INFO", True, False),
        (calib_lightning.__file__, "Stop requested: wrote last.ckpt, exiting", "INFO", True, True),
        ("/home/me/my_module.py", "Seed set to 0", "INFO", True, True),
    ],
)
def test_who_may_report_what(caplog, path, text, level, stays, stays_in_quiet):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    levels = {"levelno": getattr(logging, level), "levelname": level}
    record = logging.makeLogRecord({"msg": text, "pathname": path, "name": logger.name, **levels})
    for quiet, expected in ((False, stays), (True, stays_in_quiet)):
        caplog.clear()
        with warnings.catch_warnings(), without_noise():
            if quiet:
                be_quiet()
            logger.handle(record)
        assert caplog.messages == ([text] if expected else [])
    logger.handle(record)
    assert caplog.messages[-1] == text


def test_messages_of_lightning(calib, caplog):
    with caplog.at_level(logging.INFO):
        assert calib(*RUN, "--trainer.fast_dev_run=true", "--run_dir=runs/fast").code == 0
        said = list(caplog.messages)
        caplog.clear()
        assert calib(*RUN, "--trainer.fast_dev_run=true", "--run_dir=runs/fast", "--quiet").code == 0
        quiet = list(caplog.messages)
    assert any("fast_dev_run" in message for message in said)
    for noise in ("Seed set", "GPU available", "TPU available", "Tip"):
        assert not any(noise in message for message in said)
    assert quiet == []
